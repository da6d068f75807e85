"""Positions in attention: rotary, relative biases, and Transformer-XL's relative scores.

Axis letters: B batch, L query length, M key length, H heads, h head width, d width, R buckets.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Num

from moe_jax.component import Component
from moe_jax.errors import UserError
from moe_jax.layers.initializers import Scale, scaled_truncated_normal
from moe_jax.parallel.mesh import platform_in_force


@dataclasses.dataclass
class RotaryScaling(Component):
    """YaRN: texts longer than those of the training (Peng et al. 2023, sections 3.2 and 3.4).

    As DeepSeek-V2 has it (section 3.1.4 and its code), where rotated vectors and scores are scaled by
    different factors; m(a) = 0.1 a ln(factor) + 1.

    Attributes:
      factor: by which texts are longer; 1 changes nothing.
      original_length: tokens of the texts of the training.
      beta_fast, beta_slow: pairs that turn more often than `beta_fast` over that length keep their
        frequency, those that turn less often than `beta_slow` have it divided by `factor`, and it is
        interpolated between them.
      mscale: rotated queries and keys are multiplied by m(mscale) / m(mscale_all_dim).
      mscale_all_dim: scores are multiplied by m(mscale_all_dim)^2.
    """

    factor: float = 1.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        path = "model.attention.rotary_scaling"
        if not self.factor >= 1:
            raise UserError(
                f"{path}.factor is {self.factor}; it must be above 1, or 1 for no scaling."
            )
        if self.original_length < 1:
            raise UserError(
                f"{path}.original_length is {self.original_length}; it must be at least 1 token."
            )
        if not self.beta_fast > self.beta_slow > 0:
            raise UserError(
                f"{path}.beta_slow is {self.beta_slow}; it must be above 0 and below "
                f"beta_fast={self.beta_fast}."
            )

    def frequencies(self, half: int, base: float) -> Float[Array, " {half}"]:
        """[h/2] float32 radians per position of each pair."""
        plain = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if self.factor == 1:
            return plain
        low = max(math.floor(self._pair(self.beta_fast, half, base)), 0)
        high = min(math.ceil(self._pair(self.beta_slow, half, base)), 2 * half - 1)
        # The authors' code has 0.001 where both are the same pair.
        slowed = jnp.clip((jnp.arange(half) - low) / max(high - low, 0.001), 0, 1)
        return plain * (1 - slowed + slowed / self.factor)

    def _pair(self, turns: float, half: int, base: float) -> float:
        """Index of the pair that turns so often over the original length; no whole number."""
        return half * math.log(self.original_length / (2 * math.pi * turns)) / math.log(base)

    def _m(self, a: float) -> float:
        return 0.1 * a * math.log(self.factor) + 1

    @property
    def of_vectors(self) -> float:
        """What rotated queries and keys are multiplied by."""
        return self._m(self.mscale) / self._m(self.mscale_all_dim)

    @property
    def of_scores(self) -> float:
        """What scores are multiplied by."""
        return self._m(self.mscale_all_dim) ** 2


def rotate(
    x: Float[Array, "B L H h"],
    positions: Int[Array, "B L"],
    base: float = 10_000.0,
    scaling: RotaryScaling | None = None,
) -> Float[Array, "B L H h"]:
    """Rotary position embedding (Su et al. 2021, eq. 34), pairing entry i with i + h/2.

    The product of a rotated query and a rotated key depends on the difference of their positions.

    Args:
      x: [B, L, H, h], h even.
      positions: [B, L] int32.
      base: the slowest pair turns by base^(2/h - 1) a position.
      scaling: of frequencies and of the result; None for none.

    Returns:
      [B, L, H, h] in the dtype of `x`; the rotation is computed in float32.
    """
    scaling = RotaryScaling() if scaling is None else scaling
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] * scaling.frequencies(half, base)
    sine, cosine = (scaling.of_vectors * turn for turn in (jnp.sin(angle), jnp.cos(angle)))
    wide = x.astype(jnp.float32)
    if platform_in_force() == "cpu":
        # Each entry's partner by a roll: with two rotated halves put together, the loops of XLA's CPU
        # backend take a third of the time of queries, keys and values (19 ms in place of 13, for 2,048
        # tokens of width 256, forward and backward on a core of an AMD EPYC). On TPUs it would cost
        # memory, 2.6 GiB of a device for Mixtral 8x22B.
        sine, cosine = (jnp.concatenate(halves, -1) for halves in ((-sine, sine), (cosine, cosine)))
        return (wide * cosine + jnp.roll(wide, half, axis=-1) * sine).astype(x.dtype)
    first, second = jnp.split(wide, 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class RelativeBias(nnx.Module):
    """A learned number for each head and bucket of distances (Raffel et al. 2020, section 2.1).

    Attributes:
      table: [R, H] float32.
    """

    BUCKETS = 32
    MAX_DISTANCE = 128

    def __init__(
        self, num_heads: int, bidirectional: bool, scale: Scale, key: Key[Array, ""]
    ) -> None:
        table = scaled_truncated_normal(key, (self.BUCKETS, num_heads), self.BUCKETS, scale)
        self.table = nnx.Param(table, axes=("positions", "heads"))
        self.bidirectional = bidirectional

    def __call__(
        self, query_index: Int[Array, " L"], key_index: Int[Array, " M"]
    ) -> Float[Array, "1 H L M"]:
        """[1, H, L, M] float32, to be added to scores; indices [L] and [M] int32."""
        distance = key_index[None, :] - query_index[:, None]
        bucket = relative_bucket(distance, self.bidirectional, self.BUCKETS, self.MAX_DISTANCE)
        return self.table[...][bucket].transpose(2, 0, 1)[None]


def relative_bucket(
    distance: Int[Array, "*shape"], bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "*shape"]:
    """Bucket of each distance (key minus query): exact when near, logarithmic when far.

    Half of a direction's buckets are for single distances from 0, the others grow up to
    `max_distance`, beyond which all fall into the last. With `bidirectional` later keys have the
    second half of all buckets; else they share the bucket of distance 0.

    Args:
      distance: int32 of any shape.
      bidirectional, buckets, max_distance: static.

    Returns:
      int32 below `buckets`.
    """
    first = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = jnp.where(distance > 0, buckets, 0)
        far = jnp.abs(distance)
    else:
        far = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(far, 1) / exact) / math.log(max_distance / exact)
    grown = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return first + jnp.where(far < exact, far, grown)


class RelativeScores(nnx.Module):
    """Scores of queries with sinusoids of the distance (Dai et al. 2019, section 3.3, term b).

    Attributes:
      projection: [d, H, h] float32, of the sinusoids.
    """

    def __init__(
        self, width: int, num_heads: int, head_width: int, scale: Scale, key: Key[Array, ""]
    ) -> None:
        shape = (width, num_heads, head_width)
        self.projection = nnx.Param(
            scaled_truncated_normal(key, shape, width, scale), axes=("embed", "heads", "head")
        )

    def __call__(
        self,
        query: Float[Array, "B L H h"],
        query_index: Int[Array, " L"],
        key_index: Int[Array, " M"],
    ) -> Float[Array, "B H L M"]:
        """[B, H, L, M] scores, unscaled; query [B, L, H, h], indices [L] and [M] int32, M >= L."""
        projection = self.projection[...].astype(query.dtype)
        distances = jnp.arange(key_index.shape[0])
        keys = jnp.einsum(
            "md,dHh->mHh", sinusoids(distances, projection.shape[0]).astype(query.dtype), projection
        )
        scores = jnp.einsum("blHh,mHh->bHlm", query, keys)
        # Entry (l, m) is at the distance between them; later keys are masked by the caller.
        distance = jnp.clip(query_index[:, None] - key_index[None, :], 0)
        return jnp.take_along_axis(scores, distance[None, None], axis=-1)


def sinusoids(positions: Num[Array, " M"], width: int) -> Float[Array, "M {width}"]:
    """[M, d] float32 sines, then cosines, of [M] positions (Vaswani 2017, section 3.5)."""
    frequency = 10_000.0 ** (-jnp.arange(width // 2) / (width // 2))
    angle = positions[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
