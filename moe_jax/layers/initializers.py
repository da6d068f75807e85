"""How weights start."""

import math

import jax

# Standard deviation of a normal truncated at 2, so that truncation does not shrink the variance.
_TRUNCATED_STD = 0.87962566103423978


def scaled_truncated_normal(
    key: jax.Array, shape: tuple[int, ...], fan_in: int, scale: float
) -> jax.Array:
    """Truncated normal at two deviations with variance scale / fan_in (Switch section 2.4).

    Args:
      key: PRNG key.
      shape: shape of the float32 result.
      fan_in: n, inputs that are summed into one output.
      scale: s; 1 is the usual choice, Switch recommends 0.1.
    """
    deviation = math.sqrt(scale / fan_in) / _TRUNCATED_STD
    return deviation * jax.random.truncated_normal(key, -2, 2, shape)
