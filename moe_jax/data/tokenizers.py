"""Text to token numbers and back: the contract, and a token per byte."""

import abc
import dataclasses
import itertools
import os
from collections.abc import Iterable

import numpy as np
from etils import epath

from moe_jax.component import Component, field
from moe_jax.errors import UserError


class Tokenizer(abc.ABC):
    """A tokenizer that is ready for use.

    Tokens 0, 1 and 2 are PAD, BOS and EOS; text follows; the `extra_ids` last numbers stand for
    nothing in a text, such as T5's sentinels. Between these two some numbers may be without use.

    Attributes:
      name: tells tokenizers apart that turn a text into other tokens.
      text_ids: the numbers below this one are PAD, BOS, EOS or text.
      extra_ids: how many numbers at the top are extra.
      vocab_size: all numbers, those without use included.
      frames_inputs: whether `encode_prompt` gives a whole input of a text-to-text model, with its end
        and its sentinels, as the tokenizers of Hugging Face's folders do.
    """

    PAD = 0
    BOS = 1
    EOS = 2
    SPECIALS = 3

    name: str
    text_ids: int
    extra_ids: int
    vocab_size: int
    frames_inputs: bool = False

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every token: uint16 or uint32, little-endian."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text where a model draws one of them."""
        return (self.EOS,)

    @property
    def sentinels(self) -> np.ndarray:
        """T5's: the extra ids, int64 [extra ids], the first from the top."""
        return self.vocab_size - 1 - np.arange(self.extra_ids)

    @abc.abstractmethod
    def encode(self, text: str | bytes, where: str = "text") -> np.ndarray:
        """Returns the tokens of `text`, `dtype` [tokens], without BOS or EOS.

        Args:
          text: a string, or bytes of UTF-8.
          where: what the error calls the text.

        Raises:
          UserError: bytes are not UTF-8; the message gives the offset.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token numbers (any integer array or sequence, one axis).

        PAD, BOS and EOS are dropped; bytes that are not UTF-8, as at a cut, become U+FFFD; extra
        token n from the top becomes `<extra_id_n>`, as T5 writes it.

        Raises:
          UserError: a number is not in the vocabulary.
        """
        numbers = np.fromiter(ids, np.int64)
        first_extra = self.vocab_size - self.extra_ids
        known = (numbers >= 0) & (numbers < self.vocab_size)
        unused = (numbers >= self.text_ids) & (numbers < first_extra)
        outside = numbers[~known | unused]
        if outside.size:
            raise UserError(
                f"token {outside[0]} is not in the {self.name} vocabulary, whose tokens are 0 to "
                f"{self.text_ids - 1}{self._extra_tokens()}."
            )
        parts = []
        content = numbers[numbers >= self.SPECIALS]
        for is_extra, run in itertools.groupby(content, lambda number: number >= first_extra):
            if is_extra:
                parts += [f"<extra_id_{self.vocab_size - 1 - number}>" for number in run]
            else:
                parts.append(self._decode_text(np.fromiter(run, np.int64)))
        return "".join(parts)

    def encode_prompt(self, text: str) -> np.ndarray:
        """The tokens of the beginning of a text: after EOS, which separates texts in training."""
        return np.concatenate([np.array([self.EOS], self.dtype), self.encode(text)])

    def may_be_drawn(self, num_ids: int) -> np.ndarray:
        """Bool [num_ids]: the tokens that a model with an output for each may generate."""
        ids = np.arange(num_ids)
        return (ids == self.EOS) | ((ids >= self.SPECIALS) & (ids < self.text_ids))

    def _extra_tokens(self) -> str:
        first = self.vocab_size - self.extra_ids
        return f" and {first} to {self.vocab_size - 1}" if self.extra_ids else ""

    @abc.abstractmethod
    def _decode_text(self, ids: np.ndarray) -> str:
        """The text of int64 [tokens], all of them text."""

    def save(self, folder: epath.Path) -> None:  # noqa: B027 - not every tokenizer was trained.
        """Writes what `TokenizerConfig.load` needs to a run's folder."""


@dataclasses.dataclass
class TokenizerConfig(Component, abc.ABC):
    """Which tokenizer a run uses; a component of a config.

    Attributes:
      extra_ids: how many numbers at the top of the vocabulary are free for a task: T5's sentinels,
        a mask.
    """

    extra_ids: int = field(0, at_least=0)

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, extra ones included: what a model's embedding must hold."""

    def validate(self) -> None:
        """Raises UserError for fields out of range."""
        self.check_ranges("data.tokenizer")

    @abc.abstractmethod
    def train(
        self, texts: Iterable[str | bytes], corpus: str, cache: os.PathLike[str]
    ) -> Tokenizer:
        """Makes the tokenizer, unless `cache` has it; nothing in it is random.

        Args:
          texts: what to learn from; read only if the tokenizer must be learned.
          corpus: identifies the texts in `cache`.
          cache: a folder for tokenizers.
        """

    @abc.abstractmethod
    def load(self, folder: epath.PathLike) -> Tokenizer:
        """The tokenizer that was saved in a run's folder."""


def utf8(text: str | bytes, where: str) -> str:
    """Returns `text` as a string.

    Raises:
      UserError: bytes are not UTF-8; the message gives the offset.
    """
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: byte {text[error.start]:#04x} at offset {error.start} "
            f"({error.reason}); re-encode the text as UTF-8 and prepare it again."
        ) from error


class ByteTokenizer(Tokenizer):
    """A token per byte of UTF-8, with the numbering of ByT5 (arXiv:2105.13626): b is token b + 3."""

    name = "byte"
    text_ids = Tokenizer.SPECIALS + 256

    def __init__(self, extra_ids: int = 0) -> None:
        """Adds `extra_ids` numbers after the bytes'."""
        self.extra_ids = extra_ids
        self.vocab_size = self.text_ids + extra_ids

    def encode(self, text: str | bytes, where: str = "text") -> np.ndarray:
        """See `Tokenizer`."""
        content = utf8(text, where).encode("utf-8")
        return np.frombuffer(content, np.uint8).astype(self.dtype) + self.dtype.type(self.SPECIALS)

    def _decode_text(self, ids: np.ndarray) -> str:
        content = (ids - self.SPECIALS).astype(np.uint8)
        return content.tobytes().decode("utf-8", errors="replace")


@dataclasses.dataclass
class Bytes(TokenizerConfig):
    """A token per byte: 259 and the extra ones. Nothing to learn, and any text fits."""

    @property
    def vocab_size(self) -> int:
        """See `TokenizerConfig`."""
        return ByteTokenizer.text_ids + self.extra_ids

    def train(
        self, texts: Iterable[str | bytes], corpus: str, cache: os.PathLike[str]
    ) -> ByteTokenizer:
        """See `TokenizerConfig`."""
        return ByteTokenizer(self.extra_ids)

    def load(self, folder: epath.PathLike) -> ByteTokenizer:
        """See `TokenizerConfig`."""
        return ByteTokenizer(self.extra_ids)
