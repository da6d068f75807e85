"""Text to token numbers and back."""

from collections.abc import Iterable

import numpy as np

from moe_jax.errors import UserError


class ByteTokenizer:
    """A token per byte of UTF-8, with the numbering of ByT5 (arXiv:2105.13626).

    Tokens 0, 1 and 2 are PAD, BOS and EOS; byte `b` is token `b + 3`.
    """

    NAME = "bytes"
    PAD = 0
    BOS = 1
    EOS = 2
    _SPECIALS = 3
    vocab_size = _SPECIALS + 256

    def encode(self, text: str | bytes, where: str = "text") -> np.ndarray:
        """Returns the tokens of `text`, uint16 [bytes], without BOS or EOS.

        Args:
            text: A string, or bytes of UTF-8.
            where: What the error calls the text.

        Raises:
            UserError: Bytes are not UTF-8; the message gives the offset.
        """
        if isinstance(text, bytes):
            try:
                text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where} is not UTF-8: byte {text[error.start]:#04x} at offset {error.start} "
                    f"({error.reason}); re-encode the text as UTF-8 and prepare it again."
                ) from error
        else:
            text = text.encode("utf-8")
        return np.frombuffer(text, np.uint8).astype(np.uint16) + self._SPECIALS

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token numbers (any integer array or sequence, one axis).

        PAD, BOS and EOS are dropped; bytes that are not UTF-8, as at a cut, become U+FFFD.

        Raises:
            UserError: A number is not in the vocabulary.
        """
        numbers = np.fromiter(ids, np.int64)
        outside = numbers[(numbers < 0) | (numbers >= self.vocab_size)]
        if outside.size:
            raise UserError(
                f"token {outside[0]} is not in the byte vocabulary, whose tokens are 0 to "
                f"{self.vocab_size - 1}."
            )
        content = numbers[numbers >= self._SPECIALS] - self._SPECIALS
        return content.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
