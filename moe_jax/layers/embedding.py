"""Embeddings of tokens and of positions, and the output layer.

Axis letters: B batch, L length, V vocabulary, d width.
"""

import enum

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from moe_jax.errors import UserError
from moe_jax.layers.initializers import Scale, scaled_truncated_normal
from moe_jax.layers.projection import project


class EmbeddingScaling(enum.StrEnum):
    """Which use of a tied table is scaled, so that vectors and logits both start at unit variance.

    INPUTS: the table's variance is 1/d and vectors are rows times sqrt(d) (Vaswani 2017).
    LOGITS: the table's variance is 1 and logits are divided by sqrt(d) (T5 v1.0, Switch).
    NONE: neither; a tied table's variance is 1/d (GPT), an untied one's 1.
    """

    INPUTS = "inputs"
    LOGITS = "logits"
    NONE = "none"


class TokenEmbedding(nnx.Module):
    """Embedding table and output layer.

    Attributes:
      table: [V, d] float32.
      output: [V, d] float32 of the output layer; None where it is the table.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        scale: Scale,
        key: Key[Array, ""],
        *,
        tied: bool = True,
        scaling: EmbeddingScaling = EmbeddingScaling.INPUTS,
    ) -> None:
        """Draws the parameters; `scale` as of matrices with fan-in d (here of unit-variance use)."""
        unit = scaling == EmbeddingScaling.LOGITS or (scaling == EmbeddingScaling.NONE and not tied)
        table = scaled_truncated_normal(key, (vocab_size, width), 1 if unit else width, scale)
        self.table = nnx.Param(table, axes=("vocabulary", "embed"))
        output = scaled_truncated_normal(
            jax.random.fold_in(key, 1), (vocab_size, width), width, scale
        )
        self.output = None if tied else nnx.Param(output, axes=("vocabulary", "embed"))
        self.scaling = scaling

    @jax.named_scope("embedding")
    def __call__(self, tokens: Int[Array, "B L"], dtype: jnp.dtype) -> Float[Array, "B L d"]:
        """Ids [B, L] int32 to vectors [B, L, d]."""
        table = self.table[...].astype(dtype)
        rows = table[tokens]
        if self.scaling == EmbeddingScaling.INPUTS:
            rows = rows * jnp.sqrt(table.shape[1]).astype(dtype)
        return rows

    @jax.named_scope("logits")
    def logits(self, x: Float[Array, "B L d"]) -> Float[Array, "B L V"]:
        """[B, L, d] to [B, L, V] float32."""
        output = self.table if self.output is None else self.output
        logits = project(x, output[...].T, dtype=jnp.float32)
        if self.scaling == EmbeddingScaling.LOGITS:
            logits = logits / jnp.sqrt(jnp.float32(x.shape[-1]))
        return logits


class LearnedPositions(nnx.Module):
    """A vector for each absolute position.

    Attributes:
      table: [length, d] float32, normal of deviation 0.02 (GPT-2, ViT).
    """

    def __init__(self, length: int, width: int, key: Key[Array, ""]) -> None:
        self.table = nnx.Param(
            0.02 * jax.random.normal(key, (length, width)), axes=("positions", "embed")
        )

    @jax.named_scope("embedding")
    def __call__(self, positions: Int[Array, "B L"], dtype: jnp.dtype) -> Float[Array, "B L d"]:
        """Positions [B, L] int32, below `length`, to vectors [B, L, d]."""
        return self.table[...].astype(dtype)[positions]


def check_tied(scaling: EmbeddingScaling, tied: bool) -> None:
    """Raises UserError for a scaling that only a tied table has."""
    if scaling == EmbeddingScaling.LOGITS and not tied:
        raise UserError(
            "model.embedding_scaling is logits, but model.tied is false; with an output layer of "
            "its own use none."
        )
