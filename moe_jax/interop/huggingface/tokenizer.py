"""The tokenizer of a Hugging Face folder."""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from moe_jax.data.tokenizers import Tokenizer, TokenizerConfig, utf8
from moe_jax.errors import UserError
from moe_jax.interop.huggingface import files
from moe_jax.interop.huggingface.families import FAMILIES
from moe_jax.interop.huggingface.fields import shortened

_FILE = "tokenizer.json"
_GENERATION = "generation_config.json"
_SENTINEL = re.compile(r"<extra_id_\d+>")


class FolderTokenizer(Tokenizer):
    """tokenizer.json with the special tokens that generation_config.json or config.json name.

    Attributes:
      PAD, BOS, EOS: this folder's; EOS in place of one that it does not name.
      ends: all tokens that end a text, the first of which is EOS.
      extra_ids: how many of T5's sentinels `<extra_id_0>` and on there are.
    """

    frames_inputs = True

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        name: str,
        hf: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        """Uses the library's tokenizer.

        Args:
          library: of tokenizer.json.
          name: tells tokenizers apart.
          hf: config.json.
          generation: generation_config.json, which counts where it names a token.

        Raises:
          UserError: neither names an end of a text or, for an encoder-decoder, a beginning of a
            target, or one names what is no token.
        """
        tokens = _SpecialTokens(hf, generation or {})
        self.name = name
        self._ends = tokens.several("eos_token_id")
        if not self._ends:
            raise UserError(
                f"{files.CONFIG} has eos_token_id={shortened(hf.get('eos_token_id'))}; name the token that ends "
                "a text."
            )
        self.EOS = self._ends[0]
        pad = tokens.one("pad_token_id", padding=True)
        translates = hf.get("is_encoder_decoder")
        begin = tokens.one("decoder_start_token_id") if translates else None
        begin = tokens.one("bos_token_id") if begin is None else begin
        if translates and begin is None:
            raise UserError(
                f"{files.CONFIG} has decoder_start_token_id="
                f"{shortened(hf.get('decoder_start_token_id'))}; name the token that targets begin "
                "with, which is 0 for T5 and Switch."
            )
        self.PAD = self.EOS if pad is None else pad
        self.BOS = self.EOS if begin is None else begin
        self.vocab_size = self.text_ids = library.get_vocab_size()
        self._sentinels = _sentinels(library)
        self.extra_ids = len(self._sentinels)
        self._library = library
        added = library.get_added_tokens_decoder()
        # As the library drops them, but T5's sentinels say which gap of the input a text fills.
        self._unwritten = frozenset(
            number
            for number, token in added.items()
            if token.special and not _SENTINEL.fullmatch(token.content)
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """See `Tokenizer`."""
        return self._ends

    @property
    def sentinels(self) -> np.ndarray:
        """See `Tokenizer`: from the top down in the released T5, upwards in others."""
        return self._sentinels

    @classmethod
    def load(cls, folder: os.PathLike[str] | str) -> "FolderTokenizer":
        """Of a folder with tokenizer.json.

        Raises:
          UserError: there is none, or a file is damaged.
        """
        path = pathlib.Path(folder) / _FILE
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is no folder; name the folder of a Hugging Face model.")
        if not os.path.exists(path):
            raise UserError(
                f"{folder} has no {_FILE}; transformers writes it: "
                "AutoTokenizer.from_pretrained(PATH).save_pretrained(PATH)."
            )
        try:
            library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises this very class.
            raise UserError(f"{path} is damaged ({error}); copy it again.") from error
        hf, generation = files.read_config(folder), pathlib.Path(folder) / _GENERATION
        family = FAMILIES.get(str(hf.get("model_type")))
        hf = {**(family.tokens if family else {}), **hf}
        settings = files.read_json(generation) if generation.is_file() else {}
        # Texts are packed once for each name.
        names = ("eos_token_id", "bos_token_id", "decoder_start_token_id")
        special = {n: [f.get(n) for f in (settings, hf)] for n in names}
        content = path.read_bytes() + json.dumps(special).encode()
        return cls(library, f"hf-{hashlib.sha256(content).hexdigest()[:16]}", hf, settings)

    def encode(self, text: str | bytes, where: str = "text") -> np.ndarray:
        """See `Tokenizer`."""
        encoding = self._library.encode(utf8(text, where), add_special_tokens=False)
        return np.array(encoding.ids, self.dtype)

    def encode_prompt(self, text: str) -> np.ndarray:
        """With the special tokens that the folder's tokenizer puts around a text; BOS if nothing."""
        ids = self._library.encode(text).ids
        return np.array(ids or [self.BOS], self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token numbers, without special tokens other than T5's sentinels."""
        written = [int(number) for number in ids if int(number) not in self._unwritten]
        return self._library.decode(written, skip_special_tokens=False)

    def may_be_drawn(self, num_ids: int) -> np.ndarray:
        """See `Tokenizer`: all, as transformers draws them; special ones are no text."""
        return np.ones(num_ids, bool)

    def _decode_text(self, ids: np.ndarray) -> str:
        return self.decode(ids)


@dataclasses.dataclass
class FolderTokens(TokenizerConfig):
    """The tokens of a model's folder, in place of those that a run learns.

    Attributes:
      folder: with tokenizer.json.
    """

    folder: str = ""

    @property
    def vocab_size(self) -> int:
        """See `TokenizerConfig`."""
        return FolderTokenizer.load(self.folder).vocab_size

    def train(
        self, texts: Iterable[str | bytes], corpus: str, cache: os.PathLike[str]
    ) -> Tokenizer:
        """Learns nothing: the folder's."""
        return FolderTokenizer.load(self.folder)

    def load(self, folder: epath.PathLike) -> Tokenizer:
        """The folder's, whatever a run's folder has."""
        return FolderTokenizer.load(self.folder)


def _sentinels(library: tokenizers.Tokenizer) -> np.ndarray:
    """`<extra_id_0>`, `<extra_id_1>` and so on until one is missing, int64 [sentinels]."""
    numbers = (library.token_to_id(f"<extra_id_{n}>") for n in itertools.count())
    return np.array(list(itertools.takewhile(lambda n: n is not None, numbers)), np.int64)


class _SpecialTokens:
    """Token numbers that a folder names."""

    def __init__(self, hf: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
        self._hf, self._generation = hf, generation

    def several(self, name: str) -> tuple[int, ...]:
        """One or a list; none where nobody names one.

        Raises:
          UserError: they are no tokens of the model.
        """
        for file, fields in ((_GENERATION, self._generation), (files.CONFIG, self._hf)):
            value = fields.get(name)
            if value is None or value == []:
                continue
            numbers = value if isinstance(value, list) else [value]
            for number in numbers:
                self._check(file, name, number)
            return tuple(dict.fromkeys(numbers))
        return ()

    def one(self, name: str, padding: bool = False) -> int | None:
        """One, the first of several.

        Args:
          name: of the field.
          padding: whether a number outside of the vocabulary is none, because nothing reads it.

        Raises:
          UserError: it is no token of the model.
        """
        value = self._generation.get(name)
        value = self._hf.get(name) if value is None else value
        if padding and type(value) is int and not 0 <= value < self._vocab_size:
            return None
        return next(iter(self.several(name)), None)

    @property
    def _vocab_size(self) -> int:
        size = self._hf.get("vocab_size")
        return size if type(size) is int else 2**31

    def _check(self, file: str, name: str, number: Any) -> None:
        if type(number) is not int or not 0 <= number < self._vocab_size:
            raise UserError(
                f"{file} has {name}={shortened(number)}, which is no token of the model; its tokens are 0 to "
                f"{self._vocab_size - 1}."
            )
