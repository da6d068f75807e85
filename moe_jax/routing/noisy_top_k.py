"""Noisy top-K gating, flat and hierarchical (Shazeer et al. 2017, section 2.1, appendices A and B).

Axis letters: S tokens in a group, K choices per token, E experts, d width; in a hierarchy A groups
of B = E / A experts each: expert e is number e % B of group e // B.

The noise on a logit has the learned deviation softplus(x W_noise). All weights start at 0, so that
the first tokens are spread evenly by the noise alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from moe_jax.errors import UserError
from moe_jax.routing import losses, scores
from moe_jax.routing.published import NO_DROPS, PublishedRouter
from moe_jax.routing.router import Arrays, Mean, RouterInputs
from moe_jax.routing.token_choice import Choice, TokenChoice, validate_expert_groups
from moe_jax.special_functions import normal_cdf

# softplus underflows to 0 in the end, where the chance of being kept would be 0 / 0.
LEAST_DEVIATION = 1e-6
# For a threshold of -inf, at which the gradient of the chance would be 0 * inf.
NO_THRESHOLD = -1e9


def noisy_logits(
    x: Float[Array, "S d"],
    weights: Float[Array, " d *E"],
    noise_weights: Float[Array, " d *E"],
    key: Key[Array, ""],
    train: bool,
) -> tuple[Float[Array, " S *E"], Float[Array, " S *E"], Float[Array, " S *E"]]:
    """H = x W_g + N(0, 1) * softplus(x W_noise) (eq. 4).

    Args:
      x: [S, d].
      weights: [d, ...] float32 W_g.
      noise_weights: [d, ...] float32 W_noise.
      key: of the noise.
      train: there is noise only then.

    Returns:
      x W_g, H and the deviation of the noise, all [S, ...] float32.
    """
    clean = scores.product(x, weights)
    deviation = jnp.maximum(jax.nn.softplus(scores.product(x, noise_weights)), LEAST_DEVIATION)
    noise = deviation * jax.random.normal(key, clean.shape) if train else 0.0
    return clean, clean + noise, deviation


def kth_excluding(values: Float[Array, "*rows E"], k: int) -> Float[Array, "*rows E"]:
    """The K-th largest of a row without the entry itself, which it must exceed to be kept (eq. 9).

    Args:
      values: [..., E] float32.
      k: K.

    Returns:
      [..., E] float32: the (K+1)-th largest for the K largest, the K-th largest for the others;
      `NO_THRESHOLD` where K = E, because then an entry is kept whatever its value.
    """
    if k == values.shape[-1]:
        return jnp.full_like(values, NO_THRESHOLD)
    top, _ = jax.lax.top_k(values, k + 1)
    kth, next_best = top[..., k - 1 : k], top[..., k:]
    return jnp.where(values > next_best, next_best, kth)


def kept_by_top_k(values: Float[Array, "*rows E"], k: int) -> Bool[Array, "*rows E"]:
    """[..., E] bool, True for exactly K entries of a row: the largest, of equal ones the first."""
    _, best = jax.lax.top_k(values, k)
    return jax.nn.one_hot(best, values.shape[-1], dtype=jnp.bool_).any(axis=-2)


def log_gates(
    values: Float[Array, "*rows E"], kept: Bool[Array, "*rows E"]
) -> Float[Array, "*rows E"]:
    """Logarithm of softmax(KeepTopK(H, K)) (eq. 3 and 5); the kept gates of a row sum to 1.

    Args:
      values: [..., E] float32 H.
      kept: from `kept_by_top_k`.

    Returns:
      [..., E] float32, at most 0. Entries that are not kept are finite too: what they would weigh
      against the kept ones, exp(H_e) / sum of exp(H) over the kept.
    """
    return values - jax.nn.logsumexp(values, axis=-1, where=kept, keepdims=True)


def hierarchical_load(
    primary: Float[Array, "S A"],
    secondary: Float[Array, "S A B"],
    chosen: Bool[Array, "S A"],
    mask: Bool[Array, " S"],
) -> Mean:
    """Squared coefficient of variation over all E experts of Load_H (appendix B).

    Load_H(X)_ij = Load_primary(X)_i * Load_i(X^(i))_j / |X^(i)|, where X^(i) are the tokens that
    chose group i; 0 for a group that no token chose. 0 at perfect balance; coefficient 0.1.

    Args:
      primary: [S, A] float32 chance that a token chooses a group, from `chance_kept`.
      secondary: [S, A, B] float32 chance that it chooses an expert, once it is in the group.
      chosen: True where the token did choose the group.
      mask: False for padding.
    """
    members = (chosen & mask[:, None]).astype(jnp.float32)
    within = (secondary * members[..., None]).sum(axis=0)
    within = within / jnp.maximum(members.sum(axis=0), 1.0)[:, None]
    # The mean over tokens stands for the sum, by which the variation does not change.
    load = Mean.of(primary, mask).value()[:, None] * within
    return Mean.of_group(losses.squared_variation(load.reshape(-1)), mask)


def chance_kept(
    clean: Float[Array, "*rows E"],
    noisy: Float[Array, "*rows E"],
    deviation: Float[Array, "*rows E"],
    k: int,
) -> Float[Array, "*rows E"]:
    """[..., E] P(x, i) that an entry is among the K largest if its noise is drawn anew (eq. 8-9).

    Args:
      clean: [..., E] float32 without noise.
      noisy: [..., E] float32 H, of which the other entries keep their noise.
      deviation: [..., E] float32 of the noise.
      k: K.
    """
    return normal_cdf((clean - kth_excluding(noisy, k)) / deviation)


@dataclasses.dataclass
class NoisyTopK(TokenChoice):
    """Softmax over the K largest noisy logits (Shazeer eq. 3-11); the gates sum to 1.

    In evaluation there is no noise and so no load loss. With K = 1 the gate is always 1 and the
    task's loss has no gradient to the router.

    Attributes:
      importance_weight: coefficient of the loss "gate_importance", which is `losses.importance` of
        the sparse gates (0.1; translation: 0.01).
      load_weight: coefficient of the loss "load", in training only: `losses.load`, or
        `hierarchical_load` (0.1; translation: 0.01).
    """

    k: int = 4
    importance_weight: float = 0.1
    load_weight: float = 0.1

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """Coefficients by the names in `Routing.losses`, without those that are 0."""
        own = {"gate_importance": self.importance_weight, "load": self.load_weight}
        return self.losses.coefficients | {name: weight for name, weight in own.items() if weight}

    def validate(self, num_experts: int) -> None:
        """Raises UserError for fields out of range."""
        super().validate(num_experts)
        for name in ("importance_weight", "load_weight"):
            if not getattr(self, name) >= 0:
                raise UserError(
                    f"router.{name} is {getattr(self, name)}; a coefficient is at least 0."
                )

    def init(self, key: Key[Array, ""], width: int, num_experts: int) -> Arrays:
        """weights, noise_weights: [d, E] float32 zeros (appendix A)."""
        zeros = jnp.zeros((width, num_experts))
        return {"weights": zeros, "noise_weights": zeros}

    def choose(self, parameters: Arrays, inputs: RouterInputs, num_experts: int) -> Choice:
        """The K experts with the largest noisy logits."""
        clean, noisy, deviation = noisy_logits(
            inputs.x,
            parameters["weights"],
            parameters["noise_weights"],
            inputs.key,
            inputs.train,
        )
        _, experts = jax.lax.top_k(noisy, self.k)
        kept = kept_by_top_k(noisy, self.k)
        weights = jnp.exp(log_gates(noisy, kept))
        extra = {}
        if self.importance_weight:
            gates = jnp.where(kept, weights, 0.0)
            extra["gate_importance"] = losses.importance(gates, inputs.mask)
        if self.load_weight and inputs.train:
            threshold = kth_excluding(noisy, self.k)
            extra["load"] = losses.load(clean, threshold, deviation, inputs.mask)
        return Choice(noisy, experts, weights, clean=jax.nn.softmax(clean), losses=extra)


@dataclasses.dataclass
class HierarchicalNoisyTopK(NoisyTopK):
    """Noisy top-K of groups, then of the experts in each chosen group (Shazeer appendix B).

    An expert's gate is G_primary,i * G_i,j, so that a token's K_1 * K gates sum to 1. Every token's
    logits are computed in all groups, which costs what a flat router does: S * d * E.

    Attributes:
      groups: A, groups of consecutive experts (MoE-256-h to MoE-4096-h: 16).
      groups_per_token: K_1 (2).
      k: experts chosen in each of these groups (2).
    """

    k: int = 2
    groups: int = 16
    groups_per_token: int = 2

    @property
    def choices(self) -> int:
        """K_1 * K."""
        return self.groups_per_token * self.k

    def validate(self, num_experts: int) -> None:
        """Raises UserError for fields out of range."""
        super().validate(num_experts)
        validate_expert_groups(self.groups, self.groups_per_token, num_experts)
        if self.k > num_experts // self.groups:
            raise UserError(
                f"router.k is {self.k} but a group has {num_experts // self.groups} experts "
                f"({num_experts} in {self.groups} groups); lower router.k or router.groups."
            )

    def init(self, key: Key[Array, ""], width: int, num_experts: int) -> Arrays:
        """primary, primary_noise: [d, A]; secondary, secondary_noise: [d, A, B]; float32 zeros."""
        primary = jnp.zeros((width, self.groups))
        secondary = jnp.zeros((width, self.groups, num_experts // self.groups))
        return {
            "primary": primary,
            "primary_noise": primary,
            "secondary": secondary,
            "secondary_noise": secondary,
        }

    def choose(self, parameters: Arrays, inputs: RouterInputs, num_experts: int) -> Choice:
        """The K best experts in each of the K_1 best groups, by descending gate.

        `weights` of an expert that is not chosen is the product of what its group and it would
        weigh against the chosen ones; see `log_gates`.
        """
        # Folded with 2 and 3, because `route` folds the group's key with 1.
        group_clean, group_noisy, group_deviation = noisy_logits(
            inputs.x,
            parameters["primary"],
            parameters["primary_noise"],
            jax.random.fold_in(inputs.key, 2),
            inputs.train,
        )
        clean, noisy, deviation = noisy_logits(
            inputs.x,
            parameters["secondary"],
            parameters["secondary_noise"],
            jax.random.fold_in(inputs.key, 3),
            inputs.train,
        )
        chosen = kept_by_top_k(group_noisy, self.groups_per_token)
        kept_within = kept_by_top_k(noisy, self.k)
        kept = _flat(chosen[..., None] & kept_within)
        log_weights = _flat(
            log_gates(group_noisy, chosen)[..., None] + log_gates(noisy, kept_within)
        )
        # By the logarithm, of which the kept stay above the others when a gate underflows to 0.
        _, experts = jax.lax.top_k(jnp.where(kept, log_weights, -jnp.inf), self.choices)
        weights = jnp.exp(log_weights)
        extra = {}
        if self.importance_weight:
            gates = jnp.where(kept, weights, 0.0)
            extra["gate_importance"] = losses.importance(gates, inputs.mask)
        if self.load_weight and inputs.train:
            extra["load"] = hierarchical_load(
                chance_kept(group_clean, group_noisy, group_deviation, self.groups_per_token),
                chance_kept(clean, noisy, deviation, self.k),
                chosen,
                inputs.mask,
            )
        logits = joint_logits(group_noisy, noisy)
        dense_clean = jax.nn.softmax(joint_logits(group_clean, clean))
        return Choice(logits, experts, weights, clean=dense_clean, losses=extra)


def joint_logits(
    primary: Float[Array, "S A"], secondary: Float[Array, "S A B"]
) -> Float[Array, "S A*B"]:
    """[S, E] float32 whose softmax is softmax(primary)_i * softmax(secondary_i)_j.

    Its logsumexp is that of the primary logits alone, which is what a router z-loss then sees.

    Args:
      primary: [S, A] float32.
      secondary: [S, A, B] float32.
    """
    return _flat(primary[..., None] + jax.nn.log_softmax(secondary))


def _flat(by_group: jax.Array) -> jax.Array:
    """[S, A, B] to [S, E], the experts of a group next to each other."""
    return by_group.reshape(len(by_group), -1)


PUBLISHED: tuple[PublishedRouter, ...] = (
    PublishedRouter(
        "Noisy top-K",
        "Shazeer et al. 2017, eq. 3-5",
        "H = x W + N(0, 1) softplus(x W_noise); g = softmax of the K largest H",
        (1, 1),
        "importance and load losses",
        NoisyTopK(),
        NO_DROPS,
    ),
    PublishedRouter(
        "Hierarchical noisy top-K",
        "Shazeer et al. 2017, appendix B",
        "noisy top-K over groups of experts, then within each; g = product of the two",
        (1, 1),
        "importance and load losses",
        HierarchicalNoisyTopK(groups=4, groups_per_token=2, k=2),
        NO_DROPS,
    ),
)
"""What papers do with the routers of this file."""
