"""Which layers are measured, and tokens that a real router sends where the case wants them.

Axis letters: T tokens, K choices per token, N = T * K assignments, E experts, d width, f expert
width.
"""

import dataclasses
import enum

import jax
import jax.numpy as jnp

ZIPF_EXPONENT = 1.5
# Above the largest of 128 Gumbel draws (mean 5.4, deviation 1.3) in all but one token of a million.
ONE_HOT_ADVANTAGE = 20.0


class Skew(enum.StrEnum):
    """How popular the experts are.

    UNIFORM: random vectors and random router weights, so near-uniform loads.
    ZIPF: the K experts of a token are draws without replacement from p(e) ~ (e + 1)^-1.5.
    ONE_HOT: every token's first choice is expert 0, its others are uniform draws.
    """

    UNIFORM = "uniform"
    ZIPF = "zipf1.5"
    ONE_HOT = "one_hot"


class Pass(enum.StrEnum):
    """FORWARD: outputs. FORWARD_BACKWARD: outputs and the gradients of input and all parameters."""

    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one layer.

    Attributes:
      tokens: T.
      width: d.
      experts: E.
      k: K.
    """

    tokens: int
    width: int
    experts: int
    k: int

    def __str__(self) -> str:
        return f"T={self.tokens} d={self.width} E={self.experts} K={self.k}"

    @property
    def mlp_width(self) -> int:
        """f = 4 d."""
        return 4 * self.width

    @property
    def assignments(self) -> int:
        """N."""
        return self.tokens * self.k

    @property
    def rows_per_expert(self) -> int:
        """N / E; every shape of the grid divides."""
        return self.assignments // self.experts


def log_popularity(skew: Skew, experts: int) -> jax.Array:
    """[E] float32: log-probabilities of the experts up to a constant."""
    match skew:
        case Skew.UNIFORM:
            return jnp.zeros(experts)
        case Skew.ZIPF:
            return -ZIPF_EXPONENT * jnp.log1p(jnp.arange(experts))
        case Skew.ONE_HOT:
            return jnp.zeros(experts).at[0].set(ONE_HOT_ADVANTAGE)


def parameters(shape: Shape, key: jax.Array) -> dict[str, jax.Array | dict[str, jax.Array]]:
    """Of a `moe_jax.layers.moe.MoE` with the router TopK, float32: normal with variance 1 / fan_in.

    The router's columns are then made equally long: of 64 random columns of width 256, the longest
    would be chosen about twice as often as the shortest.
    """
    router_key, in_key, out_key = jax.random.split(key, 3)
    experts, width, mlp_width = shape.experts, shape.width, shape.mlp_width
    router = _normal(router_key, (width, experts), width)
    return {
        "router": {"weights": router / jnp.linalg.norm(router, axis=0)},
        "w_in": _normal(in_key, (experts, width, mlp_width), width),
        "w_out": _normal(out_key, (experts, mlp_width, width), mlp_width),
    }


def _normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    return jax.random.normal(key, shape) / fan_in**0.5


def tokens(shape: Shape, skew: Skew, router_weights: jax.Array, key: jax.Array) -> jax.Array:
    """Vectors whose router logits follow the popularity.

    Nothing but the data is special: the router is the real one. Random vectors are changed within
    the span of the router's columns (E <= d of them), by the least change that gives each token the
    logits log p(e) + Gumbel noise; the K largest of those are K draws from p without replacement.

    Args:
      shape: of the layer.
      skew: which popularity.
      router_weights: [d, E] float32.
      key: of the random vectors and the draws.

    Returns:
      [T, d] float32.
    """
    vector_key, noise_key = jax.random.split(key)
    x = jax.random.normal(vector_key, (shape.tokens, shape.width))
    if skew == Skew.UNIFORM:
        return x
    noise = jax.random.gumbel(noise_key, (shape.tokens, shape.experts))
    missing = log_popularity(skew, shape.experts) + noise - x @ router_weights
    return x + missing @ jnp.linalg.pinv(router_weights)
