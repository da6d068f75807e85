"""Token-choice routers: every token chooses its K best experts.

Axis letters: S tokens in a group, K choices per token, E experts, C slots per expert, d width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.routing import losses, statistics
from moe_jax.routing.assignment import RouterInputs, Routing, TokenChoice

ROUTER_INIT_SCALE = 0.02  # Normal, as flaxformer's router weights.


@dataclasses.dataclass
class TopK:
    """Softmax over all experts, then the K largest; K=1 is the Switch router.

    Tokens are served left to right, each with all its choices, so whether a token is dropped never
    depends on later ones: the router is causal.

    Attributes:
      k: experts per token.
      renormalize: divide the K gates by their sum (GShard: True, Switch: False).
      gate_scale: multiplies the gates (DeepSeek-V2: 16, V3: 2.5, Switch: 1). A gate starts near 1/E,
        so E lets an expert's output start as large as a dense layer's.
      jitter: epsilon of the multiplicative noise U(1 - epsilon, 1 + epsilon) on the router's input
        in training (Switch appendix C: 1e-2).
      load_balancing_weight: coefficient of `losses.load_balancing` (Switch: 1e-2).
      z_weight: coefficient of `losses.router_z` (ST-MoE: 1e-3).
    """

    k: int = 1
    renormalize: bool = False
    gate_scale: float = 1.0
    jitter: float = 0.0
    load_balancing_weight: float = 1e-2
    z_weight: float = 0.0

    @property
    def causal(self) -> bool:
        """True: service is left to right by token."""
        return True

    @property
    def choices(self) -> int:
        """K."""
        return self.k

    @property
    def loss_weights(self) -> dict[str, float]:
        """Coefficients by the names in `Routing.losses`."""
        return {"load_balancing": self.load_balancing_weight, "router_z": self.z_weight}

    def validate(self, num_experts: int) -> None:
        """Raises UserError unless 1 <= K <= E."""
        if not 1 <= self.k <= num_experts:
            raise UserError(
                f"router.k is {self.k} but there are {num_experts} experts; "
                f"choose k between 1 and num_experts."
            )
        if not self.gate_scale > 0:
            raise UserError(f"router.gate_scale is {self.gate_scale}; it must be above 0.")
        if not 0 <= self.jitter < 1:
            raise UserError(f"router.jitter is {self.jitter}; it must be in [0, 1).")

    def init(self, key: jax.Array, width: int, num_experts: int) -> dict[str, jax.Array]:
        """weights: [d, E] float32."""
        return {"weights": ROUTER_INIT_SCALE * jax.random.normal(key, (width, num_experts))}

    def route(
        self,
        parameters: dict[str, jax.Array],
        inputs: RouterInputs,
        num_experts: int,
        capacity: int,
    ) -> Routing:
        """Routes one group; logits, gates and losses are float32 whatever the compute dtype."""
        logits = router_logits(parameters["weights"], inputs, self.jitter)
        probabilities = jax.nn.softmax(logits)
        gates, experts = jax.lax.top_k(probabilities, self.k)
        if self.renormalize:
            gates = gates / jnp.maximum(gates.sum(axis=-1, keepdims=True), 1e-9)
        gates = self.gate_scale * gates
        slots = slots_in_token_order(experts, inputs.mask, num_experts, capacity)
        assignment = TokenChoice(experts, slots, gates, capacity)
        return Routing(
            assignment,
            losses={
                "load_balancing": losses.load_balancing(probabilities, experts, inputs.mask),
                "router_z": losses.router_z(logits, inputs.mask),
            },
            statistics=statistics.of_token_choice(assignment, logits, probabilities, inputs.mask),
        )


def router_logits(weights: jax.Array, inputs: RouterInputs, jitter: float) -> jax.Array:
    """x W in float32, with multiplicative input jitter in training (Switch section 2.4).

    Args:
      weights: [d, E] float32.
      inputs: the group's inputs; its key is read only where jitter applies.
      jitter: epsilon.

    Returns:
      [S, E] float32.
    """
    x = inputs.x.astype(jnp.float32)
    if inputs.train and jitter and inputs.key is not None:
        x = x * jax.random.uniform(inputs.key, x.shape, minval=1 - jitter, maxval=1 + jitter)
    return jnp.dot(x, weights, precision=jax.lax.Precision.HIGHEST)


def slots_in_token_order(
    experts: jax.Array, mask: jax.Array, num_experts: int, capacity: int
) -> jax.Array:
    """Serves tokens left to right, each with all its choices.

    Args:
      experts: [S, K] int32.
      mask: [S] bool; padding takes no slot.
      num_experts: E.
      capacity: C.

    Returns:
      [S, K] int32 slots in [0, C); C for assignments that found the buffer full, and for padding.
    """
    chosen = jax.nn.one_hot(experts.reshape(-1), num_experts, dtype=jnp.int32)
    chosen = chosen * jnp.repeat(mask, experts.shape[1])[:, None]
    before = jnp.cumsum(chosen, axis=0) - chosen
    slots = jnp.take_along_axis(before, experts.reshape(-1, 1), axis=1).reshape(experts.shape)
    return jnp.where(mask[:, None], jnp.minimum(slots, capacity), capacity)
