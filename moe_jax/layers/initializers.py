"""How weights start."""

import dataclasses
import math

import jax
from jaxtyping import Array, Float, Key

# Standard deviation of a normal truncated at 2, so that truncation does not shrink the variance.
_TRUNCATED_STD = 0.87962566103423978


@dataclasses.dataclass(frozen=True)
class Deviation:
    """One standard deviation for every matrix, whatever its fan-in (DeepSeek: 0.006, GPT-2: 0.02)."""

    value: float


# s of the variance s / fan_in (1 is the usual choice, Switch recommends 0.1), or a deviation.
Scale = float | Deviation


def scaled_truncated_normal(
    key: Key[Array, ""], shape: tuple[int, ...], fan_in: int, scale: Scale
) -> Float[Array, "..."]:
    """Truncated normal at two deviations with variance scale / fan_in (Switch section 2.4).

    Args:
      key: PRNG key.
      shape: shape of the float32 result.
      fan_in: n, inputs that are summed into one output.
      scale: s, or the deviation itself.
    """
    deviation = scale.value if isinstance(scale, Deviation) else math.sqrt(scale / fan_in)
    return deviation / _TRUNCATED_STD * jax.random.truncated_normal(key, -2, 2, shape)
