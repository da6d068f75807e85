"""Subwords learned from a corpus: byte-pair encoding of bytes, by the `tokenizers` library.

Sennrich et al. 2016 (arXiv:1508.07909); over bytes, so that no text is out of vocabulary, as in
GPT-2 (Radford et al. 2019, section 2.2), whose rule also says where words begin and end.
"""

import dataclasses
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Iterable

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_jax.data.tokenizers import Tokenizer, TokenizerConfig, utf8
from moe_jax.errors import UserError

TOKENIZER_FILE = "tokenizer.json"

# In the order of PAD, BOS and EOS. No text has these tokens: bytes are written in other letters.
_SPECIALS = ("⟨pad⟩", "⟨bos⟩", "⟨eos⟩")
_BYTES = 256


class SubwordTokenizer(Tokenizer):
    """A trained byte-pair encoding; decoding returns every text exactly."""

    def __init__(self, library: tokenizers.Tokenizer, vocab_size: int, extra_ids: int) -> None:
        """Uses the library's tokenizer, whose tokens 0, 1 and 2 are PAD, BOS and EOS.

        Args:
          library: the trained tokenizer.
          vocab_size: at least as many as `library` has, and the extra ones.
          extra_ids: numbers at the top that stand for no text.
        """
        library.encode_special_tokens = True  # A text that spells a special token is only text.
        self._library = library
        self._json = library.to_str()
        self.name = f"subword-{hashlib.sha256(self._json.encode()).hexdigest()[:16]}"
        self.text_ids = library.get_vocab_size()
        self.extra_ids, self.vocab_size = extra_ids, vocab_size

    def encode(self, text: str | bytes, where: str = "text") -> np.ndarray:
        """See `Tokenizer`."""
        encoding = self._library.encode(utf8(text, where), add_special_tokens=False)
        return np.array(encoding.ids, self.dtype)

    def _decode_text(self, ids: np.ndarray) -> str:
        return self._library.decode(ids.tolist())

    def save(self, folder: epath.Path) -> None:
        """Writes tokenizer.json, as the `tokenizers` library and others read it."""
        temporary = folder / (TOKENIZER_FILE + ".tmp")
        temporary.write_text(self._json)
        temporary.replace(folder / TOKENIZER_FILE)


@dataclasses.dataclass
class Subword(TokenizerConfig):
    """Byte-pair encoding learned from the run's training split, once for each dataset and size.

    Attributes:
      vocab_size: number of tokens: specials, bytes, subwords and extra ones. A small corpus may
        give fewer subwords; the extra numbers are the last below vocab_size all the same.
    """

    vocab_size: int = 8192

    def validate(self) -> None:
        """Raises UserError for fields out of range."""
        super().validate()
        least = Tokenizer.SPECIALS + _BYTES + self.extra_ids
        if self.vocab_size < least:
            raise UserError(
                f"data.tokenizer.vocab_size is {self.vocab_size}; it must be at least {least}, for "
                f"{Tokenizer.SPECIALS} special tokens, {_BYTES} bytes and extra_ids="
                f"{self.extra_ids}."
            )

    def train(
        self, texts: Iterable[str | bytes], corpus: str, cache: os.PathLike[str]
    ) -> SubwordTokenizer:
        """See `TokenizerConfig`.

        Raises:
          UserError: a text is not UTF-8, or `cache` cannot be written.
        """
        learned = self.vocab_size - self.extra_ids
        digest = hashlib.sha256(f"{corpus} {learned}".encode()).hexdigest()
        path = pathlib.Path(cache) / f"{digest[:16]}.json"
        if not path.exists():
            text = _learn(texts, learned).to_str()
            try:
                _write(path, text)
            except OSError as error:
                raise UserError(
                    f"the tokenizer cannot be written to {str(cache)!r} ({error.strerror}); choose "
                    "a data_dir with room that you may write to."
                ) from error
        return self._from_file(epath.Path(path))

    def load(self, folder: epath.PathLike) -> SubwordTokenizer:
        """See `TokenizerConfig`.

        Raises:
          UserError: the folder has no tokenizer.json, or a damaged one.
        """
        return self._from_file(epath.Path(folder) / TOKENIZER_FILE)

    def _from_file(self, path: epath.Path) -> SubwordTokenizer:
        if not path.exists():
            raise UserError(
                f"{path.parent} has no {path.name}, which data.tokenizer=Subword() needs; name the "
                "folder of a run."
            )
        try:
            library = tokenizers.Tokenizer.from_str(path.read_text())
        except Exception as error:  # The library raises this very class.
            raise UserError(f"{path} is damaged ({error}); restore it or delete it.") from error
        return SubwordTokenizer(library, self.vocab_size, self.extra_ids)


def _learn(texts: Iterable[str | bytes], size: int) -> tokenizers.Tokenizer:
    """Learns `size` tokens, or as many as the texts give; equal texts give an equal tokenizer."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator((utf8(text, "text") for text in texts), trainer)
    return library


def _write(path: pathlib.Path, text: str) -> None:
    """By one rename, so that processes may learn at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)  # Temporary files are private; the cache may be shared.
    os.replace(file.name, path)
