"""Tables of tokens that a checkpoint may have once, or several times and then equal or not.

transformers ties tables whose names are in the folder only if their numbers are equal, whatever
config.json says; a name that is missing gets the table that is there. Nothing is skipped here by its
name either: what is said to be a copy is compared.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import files
from moe_jax.interop.huggingface.files import Stored
from moe_jax.layers.embedding import EmbeddingScaling

# What is compared at once.
_ENTRIES = 2**19

SHARED, ENCODER = "shared.weight", "encoder.embed_tokens.weight"
DECODER, HEAD = "decoder.embed_tokens.weight", "lm_head.weight"
_EMBEDDED = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Tables:
    """What a folder's tables make of a model.

    Attributes:
      config: with the tables tied that are.
      sources: tensors that are read under another name: {the model's: the folder's}.
      known: names of the folder that need no reading of their own.
    """

    config: Any
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    known: frozenset[str] = frozenset()


def same(one: Stored, other: Stored) -> bool:
    """Whether two tensors have the same numbers; read in blocks."""
    if one.shape != other.shape:
        return False
    rows = max(1, _ENTRIES // max(1, int(np.prod(one.shape[1:]))))
    for first in range(0, one.shape[0], rows):
        region = (slice(first, min(first + rows, one.shape[0])), *map(slice, one.shape[1:]))
        a, b = files.read(one, region), files.read(other, region)
        if a.tobytes() != b.tobytes() and not np.array_equal(a, b):
            return False
    return True


def of_decoder(config: Any, stored: Mapping[str, Stored]) -> Tables:
    """The table and the output layer of a decoder; arguments as of `Family.tables`."""
    if not config.tied or HEAD not in stored:
        return Tables(config)
    if _EMBEDDED not in stored:
        return Tables(config, {_EMBEDDED: HEAD}, frozenset({HEAD}))
    if same(stored[_EMBEDDED], stored[HEAD]):
        return Tables(config, known=frozenset({HEAD}))
    return Tables(dataclasses.replace(config, tied=False))


def of_encoder_decoder(
    config: Any, stored: Mapping[str, Stored], always_tied: bool = False
) -> Tables:
    """The tables of the encoder, of the decoder and of the output layer.

    Args:
      config: with `tied` as config.json has it.
      stored: the folder's.
      always_tied: whether transformers ties what it can whatever config.json says (T5).

    Raises:
      UserError: logits are scaled as a tied table's, but the output layer is none.
    """
    names = (SHARED, ENCODER, DECODER, HEAD)
    known = frozenset(names & stored.keys())
    ties = config.tied or always_tied
    # A table that is not there is the shared one or, where all are tied, the first that is there.
    fallback = next((name for name in names if ties and name in known), SHARED)
    encoder, decoder = (name if name in known else fallback for name in (ENCODER, DECODER))
    head = fallback if ties and HEAD not in known else HEAD
    if not {encoder, decoder, head} <= known:
        return Tables(config)

    def equal(one: str, other: str) -> bool:
        return one == other or same(stored[one], stored[other])

    # Untied, the output layer is a parameter of its own even if its numbers are the table's.
    tied = (config.tied or head != HEAD) and equal(decoder, head)
    if not tied and config.embedding_scaling == EmbeddingScaling.LOGITS:
        raise UserError(
            f"tensor {head} differs from {decoder}, but config.json has logits scaled as with a tied "
            "table (by tie_word_embeddings or scale_decoder_outputs); such a model is not supported."
        )
    config = dataclasses.replace(config, tied=tied)
    if equal(encoder, decoder):
        return Tables(config, {SHARED: encoder, HEAD: head}, known)
    separate = dataclasses.replace(config, target_vocab_size=config.vocab_size)
    return Tables(separate, {ENCODER: encoder, DECODER: decoder, HEAD: head}, known)
