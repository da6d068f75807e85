"""From a token's vector to a score per expert: logits, exploration noise, soft cap.

Axis letters: S tokens in a group, E experts, d width.
Everything is float32 whatever the compute dtype (Switch section 2.4, ST-MoE section 3.3); routers
that have a `dtype` can be made to round, to see what that does.
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moe_jax.errors import UserError
from moe_jax.routing.router import RouterInputs

INIT_DEVIATION = 0.02
"""Of router weights in flaxformer, OLMoE and sparse upcycling."""


class Exploration(enum.StrEnum):
    """How a router tries other experts in training (Switch section 2.2 and Table 11).

    ARGMAX: it does not. SAMPLE: experts are drawn from the softmax without replacement.
    INPUT_DROPOUT: dropout of rate `exploration_rate` on the router's input (Mesh TensorFlow: 0.1).
    JITTER: the router's input times U(1 - rate, 1 + rate) (Mesh TensorFlow: 1e-2).
    """

    ARGMAX = "argmax"
    SAMPLE = "sample"
    INPUT_DROPOUT = "input_dropout"
    JITTER = "jitter"


class RouterDtype(enum.StrEnum):
    """What the numbers of a router are rounded to (Switch Table 2).

    BFLOAT16 rounds inputs, weights, logits, probabilities and gates, and the gradients that pass
    them; sums of products are float32, as on the matrix units of TPUs and GPUs.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def rounded(x: Float[Array, "*shape"], dtype: RouterDtype) -> Float[Array, "*shape"]:
    """float32 numbers that the dtype can represent."""
    if dtype == RouterDtype.FLOAT32:
        return x
    # A conversion to bfloat16 and back may be left out by XLA, which takes it for excess precision.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def initial_weights(
    key: Key[Array, ""], width: int, num_experts: int, deviation: float = INIT_DEVIATION
) -> Float[Array, "{width} {num_experts}"]:
    """[d, E] float32, normal with a deviation."""
    return deviation * jax.random.normal(key, (width, num_experts))


def validate_init_deviation(deviation: float) -> None:
    """Raises UserError unless it is above 0."""
    if not deviation > 0:
        raise UserError(
            f"router.init_deviation is {deviation}; it must be above 0, such as {INIT_DEVIATION}."
        )


def explored_input(
    inputs: RouterInputs, exploration: Exploration, rate: float
) -> Float[Array, "S d"]:
    """The group's input [S, d] as float32, with noise in training only."""
    x = inputs.x.astype(jnp.float32)
    if not inputs.train:
        return x
    if exploration == Exploration.JITTER:
        return x * jax.random.uniform(inputs.key, x.shape, minval=1 - rate, maxval=1 + rate)
    if exploration == Exploration.INPUT_DROPOUT:
        return jnp.where(jax.random.bernoulli(inputs.key, 1 - rate, x.shape), x / (1 - rate), 0)
    return x


def product(x: Float[Array, "S d"], weights: Float[Array, " d *E"]) -> Float[Array, " S *E"]:
    """x W at full float32 precision, also on TPUs: [S, d] and [d, ...] to [S, ...]."""
    return jnp.tensordot(x.astype(jnp.float32), weights, 1, precision=jax.lax.Precision.HIGHEST)


def soft_cap(logits: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    """cap * tanh(logits / cap), so that no logit exceeds the cap; 0 for none (praxis)."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def validate_exploration(exploration: Exploration, rate: float) -> None:
    """Raises UserError unless the rate is in [0, 1)."""
    if not 0 <= rate < 1:
        raise UserError(f"router.exploration_rate is {rate}; it must be in [0, 1).")
    noisy = exploration in (Exploration.JITTER, Exploration.INPUT_DROPOUT)
    if rate and not noisy:
        raise UserError(
            f"router.exploration_rate is {rate}, which router.exploration={exploration} does not "
            "read; set exploration=jitter or input_dropout, or the rate to 0."
        )
    if noisy and not rate:
        raise UserError(
            f"router.exploration_rate is 0, so router.exploration={exploration} does nothing; "
            "set a rate such as 0.01, or exploration=argmax."
        )
