"""Soft MoE: slots take weighted means of all tokens (Puigcerver et al. 2023).

Axis letters: S tokens in a group, E experts, P slots per expert, d width.

Nothing is chosen and nothing dropped, so there is no loss, and all of it is differentiable.
"""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.routing import scores, statistics
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.published import PublishedRouter
from moe_jax.routing.router import Arrays, Router, RouterInputs, Routing, SoftAssignment

# Far below any logit, yet finite: a softmax over padding only has no NaN.
NEVER = -1e9


class SoftVariant(enum.StrEnum):
    """Which half of the mixing is learned: dispatch / combine (Soft MoE, Table 2).

    SOFT: both. SOFT_UNIFORM: slots are learned mixtures, tokens read the plain mean of all slots.
    UNIFORM_SOFT: slots are the plain mean of all tokens, tokens read learned mixtures.
    UNIFORM: plain means twice. IDENTITY: the i-th token goes to the i-th slot and reads only that;
    needs as many slots as tokens.
    """

    SOFT = "soft"
    SOFT_UNIFORM = "soft_uniform"
    UNIFORM_SOFT = "uniform_soft"
    UNIFORM = "uniform"
    IDENTITY = "identity"


LEARNED = (SoftVariant.SOFT, SoftVariant.SOFT_UNIFORM, SoftVariant.UNIFORM_SOFT)


@dataclasses.dataclass
class SoftMoE(Router):
    """Two softmaxes of the same logits, one over tokens and one over slots (Soft MoE eq. 1-2).

    The buffers have `slots_per_expert` slots; the layer's capacity is not used. The paper's models
    have 1 slot per expert, about as many experts as tokens, and one image per group.

    Attributes:
      slots_per_expert: P.
      variant: the paper's ablations.
      noise: deviation of Gaussian noise on the logits in training (vmoe; the paper: none). Unlike
        V-MoE's it is not divided by E.
    """

    slots_per_expert: int = field(1, at_least=1)
    variant: SoftVariant = SoftVariant.SOFT
    noise: float = field(0.0, at_least=0)

    def experts_per_token(self, tokens: int, num_experts: int, capacity: int) -> float:
        """E P slots are evaluated for S tokens."""
        return num_experts * self.slots_per_expert / tokens

    def expert_capacity(self, policy: Capacity, tokens: int, num_experts: int, train: bool) -> int:
        """P, whatever the capacity policy says.

        Raises:
          UserError: `identity` has not as many slots as tokens.
        """
        if self.variant == SoftVariant.IDENTITY:
            slots = num_experts * self.slots_per_expert
            if slots != tokens:
                raise UserError(
                    f"router.slots_per_expert is {self.slots_per_expert}, which gives {num_experts} "
                    f"experts {slots} slots, but router.variant=identity needs one for each of the "
                    f"{tokens} tokens of a group; change it or moe.group_size."
                )
        return self.slots_per_expert

    @property
    def tokens_choose(self) -> bool:
        """False: slots mix the tokens of a group, or number them."""
        return False

    @property
    def leak(self) -> str | None:
        """Slots mix the whole group, but for `identity`."""
        if self.variant == SoftVariant.IDENTITY:
            return None
        return "the slots that a token reads are mixtures of all tokens of its group"

    def validate(self, num_experts: int) -> None:
        """Raises UserError for fields out of range, or noise on logits that do not exist."""
        self.check_ranges("router")
        if self.noise and self.variant not in LEARNED:
            raise UserError(
                f"router.noise is {self.noise}, but router.variant={self.variant} has no logits; "
                "set router.noise=0."
            )

    def init(self, key: Key[Array, ""], width: int, num_experts: int) -> Arrays:
        """mu: [d, E, P] float32, LeCun normal over d; scale: [] float32, 1. Nothing if unlearned."""
        if self.variant not in LEARNED:
            return {}
        lecun = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        shape = (width, num_experts, self.slots_per_expert)
        return {"mu": lecun(key, shape), "scale": jnp.ones(())}

    def route(
        self, parameters: Arrays, inputs: RouterInputs, num_experts: int, capacity: int
    ) -> Routing:
        """Routes one group in float32; padding is neither in a slot nor reads one."""
        assignment = self._assignment(parameters, inputs, num_experts)
        spread = jnp.where(inputs.mask[:, None], assignment.combine.sum(axis=2), 1.0 / num_experts)
        return Routing(
            assignment,
            jax.lax.stop_gradient(spread),
            losses={},
            statistics=statistics.of_soft(assignment, spread, inputs.mask),
        )

    def _assignment(
        self, parameters: Arrays, inputs: RouterInputs, num_experts: int
    ) -> SoftAssignment:
        shape = (len(inputs.mask), num_experts, self.slots_per_expert)
        if self.variant == SoftVariant.IDENTITY:
            return identity(inputs.mask, *shape[1:])
        uniform = jnp.zeros(shape)
        learned = uniform
        if self.variant in LEARNED:
            learned = slot_logits(inputs.x, parameters["mu"], parameters["scale"])
        if inputs.train and self.noise:
            learned = learned + self.noise * jax.random.normal(inputs.key, shape)
        return SoftAssignment(
            dispatch_weights(
                uniform if self.variant == SoftVariant.UNIFORM_SOFT else learned, inputs.mask
            ),
            combine_weights(
                uniform if self.variant == SoftVariant.SOFT_UNIFORM else learned, inputs.mask
            ),
        )


def slot_logits(
    x: Float[Array, "S d"], mu: Float[Array, "d E P"], scale: Float[Array, ""]
) -> Float[Array, "S E P"]:
    """scale * cosine of each token and each slot's vector (Soft MoE section 2.3).

    Args:
      x: [S, d] any float dtype.
      mu: [d, E, P] float32.
      scale: [] float32.

    Returns:
      [S, E, P] float32 in [-scale, scale].
    """
    return scores.product(_unit(x.astype(jnp.float32), axis=1), scale * _unit(mu, axis=0))


def _unit(vectors: jax.Array, axis: int) -> jax.Array:
    """x / sqrt(|x|^2 + 1e-6), whose gradient is finite at 0."""
    return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, axis=axis, keepdims=True) + 1e-6)


def dispatch_weights(
    logits: Float[Array, "S E P"], mask: Bool[Array, " S"]
) -> Float[Array, "S E P"]:
    """Softmax of [S, E, P] over the real tokens: sums to 1 for each slot (Soft MoE eq. 1).

    0 for padding, and everywhere in a group of padding only.
    """
    real = mask[:, None, None]
    return jnp.where(real, jax.nn.softmax(jnp.where(real, logits, NEVER), axis=0), 0.0)


def combine_weights(
    logits: Float[Array, "S E P"], mask: Bool[Array, " S"]
) -> Float[Array, "S E P"]:
    """Softmax of [S, E, P] over all slots of all experts: sums to 1 for each token (eq. 2).

    0 for padding.
    """
    return jnp.where(mask[:, None, None], jax.nn.softmax(logits, axis=(1, 2)), 0.0)


def identity(mask: Bool[Array, " S"], num_experts: int, slots_per_expert: int) -> SoftAssignment:
    """Token e * P + p alone in slot p of expert e, which it alone reads; 0 for padding.

    There must be as many slots as tokens; `SoftMoE.expert_capacity` checks that.
    """
    weights = jnp.diag(mask.astype(jnp.float32)).reshape(-1, num_experts, slots_per_expert)
    return SoftAssignment(weights, weights)


PUBLISHED: tuple[PublishedRouter, ...] = (
    PublishedRouter(
        "Soft MoE",
        "Puigcerver et al. 2023",
        "l = scale x/|x| . mu/|mu|; slots take tokens by softmax over tokens, tokens take slots by "
        "softmax over slots",
        (1, 1),
        "by construction: every slot takes a mean of all tokens",
        SoftMoE(),
        None,
    ),
    *(
        PublishedRouter(
            f"Soft MoE, {name}",
            "Puigcerver et al. 2023, Table 2",
            formula,
            (1, 1),
            "by construction",
            SoftMoE(variant=variant, slots_per_expert=slots),
            None,
        )
        for name, variant, slots, formula in (
            ("soft/uniform", SoftVariant.SOFT_UNIFORM, 1, "soft dispatch, uniform combine"),
            ("uniform/soft", SoftVariant.UNIFORM_SOFT, 1, "uniform dispatch, soft combine"),
            ("uniform", SoftVariant.UNIFORM, 1, "uniform dispatch and combine"),
            ("identity", SoftVariant.IDENTITY, 8, "slot i takes token i (E P = S)"),
        )
    ),
)
"""What papers do with the routers of this file."""
