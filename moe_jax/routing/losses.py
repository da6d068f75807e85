"""Auxiliary losses of one group, by the names of the papers, before any coefficient.

Axis letters: S tokens in a group, K choices per token, E experts, D devices (expert groups), M
devices that a token may be sent to.

How a loss becomes one number, in this order:
  tokens   the mean over the group's real tokens, as each formula says
  groups   the mean over all groups of the global batch (groups of padding only do not count);
           `sequence_wise` is a mean over sequences and `router_z` over tokens instead
  mesh     the (sum, count) pairs are added over devices first, so the layout changes nothing
  layers   sum or mean: `auxiliary_reduction` of the task
A paper's T, the tokens that are to be balanced, is therefore a group: choose `moe.group_size`.
Counts f carry no gradient; the router learns through its probabilities P.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.component import Component
from moe_jax.errors import UserError
from moe_jax.routing.router import Mean
from moe_jax.special_functions import normal_cdf


@dataclasses.dataclass
class Losses(Component):
    """Coefficients of the losses that any token-choice router can have; 0 leaves one out.

    Attributes:
      load_balancing: GShard and Switch, first choices counted (Switch: 1e-2).
      load_balancing_all_choices: flaxformer, all K choices counted (t5x: 1e-2).
      expert_level: DeepSeekMoE eq. 12, MegaBlocks, OLMoE (DeepSeekMoE 16B: 1e-3, OLMoE: 1e-2).
      device_level: DeepSeekMoE eq. 15 (145B: 0.05).
      communication: DeepSeek-V2 eq. 29 (0.02).
      sequence_wise: DeepSeek-V3 eq. 17 (1e-4).
      importance: V-MoE, on noise-free probabilities (0.005).
      router_z: ST-MoE eq. 5 (1e-3).
      devices: D of `device_level` and `communication`: expert e is on device e // (E / D).
      devices_per_token: M of `communication` (DeepSeek-V2: 3).
    """

    load_balancing: float = 0.0
    load_balancing_all_choices: float = 0.0
    expert_level: float = 0.0
    device_level: float = 0.0
    communication: float = 0.0
    sequence_wise: float = 0.0
    importance: float = 0.0
    router_z: float = 0.0
    devices: int = 1
    devices_per_token: int = 1

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficients that are not 0, by name."""
        return {name: getattr(self, name) for name in _NAMES if getattr(self, name)}

    def validate(self, num_experts: int) -> None:
        """Raises UserError for a negative coefficient or devices that do not divide E."""
        for name in _NAMES:
            if not getattr(self, name) >= 0:
                raise UserError(
                    f"router.losses.{name} is {getattr(self, name)}; a coefficient is at least 0."
                )
        if self.devices < 1 or num_experts % self.devices:
            raise UserError(
                f"router.losses.devices is {self.devices}, which does not divide the {num_experts} "
                "experts; use a divisor."
            )
        for name in ("device_level", "communication"):
            if getattr(self, name) and self.devices == 1:
                raise UserError(
                    f"router.losses.{name} is {getattr(self, name)}, but router.losses.devices is 1, "
                    "where it is constant; set devices."
                )
        if not 1 <= self.devices_per_token <= self.devices:
            raise UserError(
                f"router.losses.devices_per_token is {self.devices_per_token}; it must be between "
                f"1 and router.losses.devices={self.devices}."
            )


_NAMES = [field.name for field in dataclasses.fields(Losses) if field.type is float]


def load_balancing(
    probabilities: Float[Array, "S E"], experts: Int[Array, "S K"], mask: Bool[Array, " S"]
) -> Mean:
    """E * sum_e f_e P_e (Switch eq. 4-6, coefficient 1e-2); 1 at perfect balance.

    f_e is the fraction of tokens whose FIRST choice is e, counted before any drop; P_e is the mean
    router probability of e. GShard's l_aux is this over E^2.

    Args:
      probabilities: [S, E] float32, rows sum to 1.
      experts: [S, K] int32 chosen experts, first choice first; E for no choice.
      mask: False for padding.

    Returns:
      The group's loss with count 1, or 0 with count 0 for a group of padding: groups weigh alike.
    """
    return _balance(probabilities, experts[:, :1], mask, scale=1.0)


def load_balancing_all_choices(
    probabilities: Float[Array, "S E"], experts: Int[Array, "S K"], mask: Bool[Array, " S"]
) -> Mean:
    """As `load_balancing`, but f_e counts all K choices (flaxformer); K at balance.

    The coefficient of t5x is 1e-2. For a model of one layer it is also transformers' loss (Mixtral:
    0.02), which joins the tokens of all layers before it counts. Arguments and result as in `load_balancing`.
    """
    return _balance(probabilities, experts, mask, scale=1.0)


def expert_level(
    probabilities: Float[Array, "S E"], experts: Int[Array, "S K"], mask: Bool[Array, " S"]
) -> Mean:
    """sum_e f_e P_e with f_e = E / (K T) * (tokens that chose e) (DeepSeekMoE eq. 12-14).

    1 at perfect balance whatever K is; coefficient 1e-2 (2B), 1e-3 (16B), 3e-3 (145B). MegaBlocks
    and OLMoE (1e-2) mean the same, averaged over layers. Arguments and result as in `load_balancing`.
    """
    return _balance(probabilities, experts, mask, scale=1.0 / experts.shape[1])


def _balance(probabilities: jax.Array, experts: jax.Array, mask: jax.Array, scale: float) -> Mean:
    """E * scale * sum_e f_e P_e with f_e = the fraction of tokens of which e is a choice."""
    num_experts = probabilities.shape[-1]
    fraction = Mean.of(_chosen(experts, num_experts), mask).value()
    mean_probability = Mean.of(probabilities, mask).value()
    loss = num_experts * scale * jnp.sum(jax.lax.stop_gradient(fraction) * mean_probability)
    return Mean.of_group(loss, mask)


def device_level(
    probabilities: Float[Array, "S E"],
    experts: Int[Array, "S K"],
    mask: Bool[Array, " S"],
    devices: int,
) -> Mean:
    """sum_i f'_i P'_i over devices (DeepSeekMoE eq. 15-17); 1 at perfect balance.

    f'_i is the mean over the device's experts of `expert_level`'s f, P'_i the sum of their mean
    probabilities. Coefficient 0.05 (145B, DeepSeek-V2).

    Args:
      probabilities, experts, mask: as in `load_balancing`.
      devices: D; expert e is on device e // (E / D).
    """
    num_experts, choices = probabilities.shape[-1], experts.shape[1]
    chosen = Mean.of(_chosen(experts, num_experts), mask).value()
    fraction = (num_experts / choices * chosen).reshape(devices, -1).mean(axis=1)
    mass = Mean.of(probabilities, mask).value().reshape(devices, -1).sum(axis=1)
    return Mean.of_group(jnp.sum(jax.lax.stop_gradient(fraction) * mass), mask)


def communication(
    probabilities: Float[Array, "S E"],
    experts: Int[Array, "S K"],
    mask: Bool[Array, " S"],
    devices: int,
    devices_per_token: int,
) -> Mean:
    """sum_i f''_i P''_i with f''_i = D / (M T) * (tokens sent to device i) (DeepSeek-V2 eq. 29-31).

    1 at perfect balance when every token goes to M devices; coefficient 0.02.

    Args:
      probabilities, experts, mask: as in `load_balancing`.
      devices: D; expert e is on device e // (E / D).
      devices_per_token: M.
    """
    num_experts = probabilities.shape[-1]
    chosen = _chosen(experts, num_experts).reshape(len(mask), devices, -1)
    sent = Mean.of(chosen.max(axis=2), mask).value()
    mass = Mean.of(probabilities, mask).value().reshape(devices, -1).sum(axis=1)
    loss = devices / devices_per_token * jnp.sum(jax.lax.stop_gradient(sent) * mass)
    return Mean.of_group(loss, mask)


def sequence_wise(
    probabilities: Float[Array, "S E"],
    experts: Int[Array, "S K"],
    mask: Bool[Array, " S"],
    sequence_ids: Int[Array, " S"],
) -> Mean:
    """`expert_level` of each sequence, averaged over sequences (DeepSeek-V3 eq. 17-20).

    1 at perfect balance of every sequence; coefficient 1e-4. A sequence that is cut by the end of
    a group counts as two.

    Args:
      probabilities: [S, E] float32, rows sum to 1 (V3: sigmoid scores over their sum).
      experts: [S, K] int32; E for no choice.
      mask: False for padding.
      sequence_ids: [S] int32, tokens of a sequence are consecutive.

    Returns:
      Sum over sequences, and the number of sequences with a real token.
    """
    num_tokens, num_experts = probabilities.shape
    starts = jnp.diff(sequence_ids, prepend=sequence_ids[:1]) != 0
    sequence = jnp.cumsum(starts)  # 0, 1, ... within the group.
    real = mask.astype(jnp.float32)[:, None]
    sums = jax.ops.segment_sum(
        jnp.concatenate([probabilities * real, _chosen(experts, num_experts) * real], axis=1),
        sequence,
        num_tokens,
    )
    # Apart, so that who needs the number of sequences only need not route.
    length = jax.ops.segment_sum(real[:, 0], sequence, num_tokens)
    mean = sums / jnp.maximum(length, 1.0)[:, None]
    mean_probability, fraction = mean[:, :num_experts], mean[:, num_experts:]
    products = (mean_probability * jax.lax.stop_gradient(fraction)).sum()
    return Mean(num_experts / experts.shape[1] * products, (length > 0).sum(dtype=jnp.float32))


def importance(probabilities: Float[Array, "S E"], mask: Bool[Array, " S"]) -> Mean:
    """Squared coefficient of variation over experts of sum_s p_se (Shazeer eq. 6-7, V-MoE).

    0 at perfect balance, where its gradient is finite (0); E - 1 when one expert has everything.
    Coefficient: 0.1 (Shazeer's language models, with gates for p), 0.005 (V-MoE).

    Args:
      probabilities: [S, E] float32, noise-free.
      mask: False for padding.
    """
    return Mean.of_group(squared_variation(Mean.of(probabilities, mask).value()), mask)


def load(
    logits: Float[Array, "S E"],
    threshold: Float[Array, " S #E"],
    deviation: Float[Array, "S E"] | float,
    mask: Bool[Array, " S"],
) -> Mean:
    """Squared variation of the expected load under new noise (V-MoE eq. 10-13, Shazeer eq. 8-11).

    The chance that expert e of token s is chosen again when its noise is drawn anew is
    Phi((logits - threshold) / deviation). 0 at perfect balance; coefficient 0.005 (V-MoE), 0.1
    (Shazeer's language models).

    Args:
      logits: [S, E] float32, noise-free.
      threshold: [S, 1] or [S, E] noisy logit that an expert must exceed to be chosen.
      deviation: of the noise, a number or [S, E].
      mask: False for padding.
    """
    chance = normal_cdf((logits - threshold) / deviation)
    return Mean.of_group(squared_variation(Mean.of(chance, mask).value()), mask)


def squared_variation(values: Float[Array, " E"]) -> Float[Array, ""]:
    """(population standard deviation / mean)^2 of [E], as variance / mean^2.

    A standard deviation would have an infinite derivative where all values are equal; 0 where all
    are 0, as in a group of padding only.
    """
    mean = values.mean()
    # Divided before squaring: a derivative by mean^2 overflows long before one by the mean.
    return jnp.mean(((values - mean) / jnp.where(mean == 0, 1.0, mean)) ** 2)


def router_z(logits: Float[Array, "S E"], mask: Bool[Array, " S"]) -> Mean:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE eq. 5, coefficient 1e-3).

    (ln E)^2 where all logits are 0.

    Args:
      logits: [S, E] float32.
      mask: False for padding.
    """
    return Mean.of(jax.nn.logsumexp(logits, axis=-1) ** 2, mask)


def _chosen(experts: jax.Array, num_experts: int) -> jax.Array:
    """[S, E] float32, 1 where the expert is a choice of the token; experts are [S, K]."""
    return jax.nn.one_hot(experts, num_experts).sum(axis=1)
