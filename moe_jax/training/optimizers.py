"""Optimizers as configs; the algorithms are optax's, and Adafactor's in `factored_moments`."""

import abc
import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.training.factored_moments import (
    clip_by_matrix_rms,
    scale_by_factored_moments,
    scale_by_matrix_rms,
)
from moe_jax.training.matrices import is_matrix
from moe_jax.training.schedules import Schedule, ScheduledRate

# The first dimension of tables, of which a token or a position reads one row.
_TABLES = ("vocabulary", "positions")


class Decayed(enum.StrEnum):
    """What weight decay shrinks.

    MATRICES: neither vectors (norm scales, biases) nor embedding tables (Vision Transformers).
    MATRICES_AND_TABLES: the tables too (Megatron, and so DeepSpeed-MoE).
    ALL: vectors too (OLMoE).
    """

    MATRICES = "matrices"
    MATRICES_AND_TABLES = "matrices_and_tables"
    ALL = "all"


@dataclasses.dataclass
class Optimizer(ScheduledRate, abc.ABC):
    """The contract: a config that builds an optax transformation.

    It clips gradients, scales them by its own rule, adds decayed weights, and multiplies all by the
    learning rate.

    Attributes:
      weight_decay: decoupled; multiplied by the learning rate (Loshchilov & Hutter 2019).
      decayed: what decays.
      head_weight_decay: of the matrix that gives classes, 0 for `weight_decay` (Soft MoE: 3.0).
      clip_norm: largest global gradient norm; 0 switches clipping off.
      clip_excludes_experts: measure that norm without the experts' gradients, and clip all by it
        (BASE: an expert's gradient is on its own device only).
    """

    weight_decay: float = field(0.0, at_least=0)
    decayed: Decayed = Decayed.MATRICES
    head_weight_decay: float = field(0.0, at_least=0)
    clip_norm: float = field(0.0, at_least=0)
    clip_excludes_experts: bool = False

    def validate(self) -> None:
        """Raises UserError for values that cannot work."""
        super().validate()
        if self.clip_excludes_experts and not self.clip_norm:
            raise UserError(
                "optimizer.clip_excludes_experts is true, but optimizer.clip_norm is 0 and clips "
                "nothing; set clip_norm or leave clip_excludes_experts out."
            )

    @abc.abstractmethod
    def scaling(self, axes: Any) -> optax.GradientTransformation:
        """What makes a direction of clipped gradients; `axes` as in `build`."""

    def build(self, steps: int, axes: Any) -> optax.GradientTransformation:
        """The transformation.

        Args:
          steps: of the whole run.
          axes: tree of the parameters' dimension names.
        """
        return optax.chain(
            self._clipping(axes),
            self.scaling(axes),
            *self._decays(axes),
            optax.scale_by_learning_rate(self.learning_rate_at(steps)),
        )

    def _clipping(self, axes: Any) -> optax.GradientTransformation:
        if self.clip_excludes_experts:
            return clip_by_norm_of_shared(self.clip_norm, axes)
        return optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()

    def _decays(self, axes: Any) -> list[optax.GradientTransformation]:
        """Each matrix is in one of these, or in none."""
        head_decay = self.head_weight_decay or self.weight_decay
        decays = {False: self.weight_decay, True: head_decay}

        def mask(head: bool) -> Any:
            return _map_names(
                lambda names: is_decayed(names, self.decayed) and ("classes" in names) == head, axes
            )

        return [
            optax.add_decayed_weights(decay, mask(head)) for head, decay in decays.items() if decay
        ]


@dataclasses.dataclass
class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019); Adam with `weight_decay` 0.

    Attributes:
      b1, b2, epsilon: Adam's.
    """

    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    b1: float = field(0.9, at_least=0, below=1)
    b2: float = field(0.95, at_least=0, below=1)
    epsilon: float = field(1e-8, above=0)

    def scaling(self, axes: Any) -> optax.GradientTransformation:
        """See `Optimizer`."""
        return optax.scale_by_adam(self.b1, self.b2, self.epsilon)


@dataclasses.dataclass
class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018), by default as T5 and Switch Transformers use it.

    Every layer, every expert, and queries, keys and values have moments, clipping and scale of their
    own, as if they were not stacked. Weight decay is multiplied by the learning rate, which in optax
    it is not.

    The Adam of Shazeer et al. 2017 appendix D, without first and with factored second moments, is
    `clipping_threshold=0, scale_by_parameters=False, decay_exponent=1, b2=0.999`: moments that are
    means of all steps at first, as Adam's corrected ones are, and decay by b2 later.

    Attributes:
      b1: of the momentum of updates; 0 for none and no memory for it.
      b2: upper bound of the second moments' decay (GShard, GLaM: 0.99; Zhai 2021: 0.999).
      decay_exponent: that decay is 1 - t^-exponent in step t below its bound.
      epsilon: added to squared gradients.
      clipping_threshold: largest root mean square of a matrix's update; 0 switches this off.
      scale_by_parameters: multiply a matrix's update by its own root mean square.
      min_size_to_factor: a matrix with fewer rows or columns has a moment for each element.
    """

    learning_rate: float = 0.01
    schedule: Schedule = Schedule.INVERSE_SQRT
    constant_steps: int = 10_000
    b1: float = field(0.0, at_least=0, below=1)
    b2: float = field(1.0, at_least=0, at_most=1)
    decay_exponent: float = field(0.8, above=0)
    epsilon: float = field(1e-30, above=0)
    clipping_threshold: float = field(1.0, at_least=0)
    scale_by_parameters: bool = True
    min_size_to_factor: int = field(128, at_least=1)

    def scaling(self, axes: Any) -> optax.GradientTransformation:
        """See `Optimizer`."""
        parts = [
            scale_by_factored_moments(
                axes, self.decay_exponent, self.b2, self.min_size_to_factor, self.epsilon
            )
        ]
        if self.clipping_threshold:
            parts.append(clip_by_matrix_rms(axes, self.clipping_threshold))
        if self.scale_by_parameters:
            parts.append(scale_by_matrix_rms(axes))
        if self.b1:
            parts.append(optax.ema(self.b1, debias=False))
        return optax.chain(*parts)


@dataclasses.dataclass
class SGD(Optimizer):
    """Stochastic gradient descent.

    Attributes:
      momentum: of Polyak's heavy ball (the sum of decayed gradients); 0 for none.
    """

    learning_rate: float = 0.1
    schedule: Schedule = Schedule.CONSTANT
    momentum: float = field(0.0, at_least=0, below=1)

    def scaling(self, axes: Any) -> optax.GradientTransformation:
        """See `Optimizer`."""
        return optax.trace(self.momentum) if self.momentum else optax.identity()


def updates_done(state: optax.OptState) -> int | None:
    """How many updates an optimizer's state has seen, by which its learning rate goes.

    None if it is of an optimizer with another rate than `Optimizer.build` gives.
    """

    def counts(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    found = [node for node in jax.tree.leaves(state, is_leaf=counts) if counts(node)]
    return int(found[0].count) if found else None


def is_decayed(names: tuple[str, ...], decayed: Decayed) -> bool:
    """Whether weight decay shrinks a parameter with these dimension names."""
    if decayed == Decayed.ALL:
        return True
    table = bool(set(_TABLES) & set(names))
    return is_matrix(names) and (decayed == Decayed.MATRICES_AND_TABLES or not table)


def clip_by_norm_of_shared(max_norm: float, axes: Any) -> optax.GradientTransformation:
    """Shrinks all gradients so that the norm of those outside the experts is `max_norm` at most."""
    shared = _map_names(lambda names: "experts" not in names, axes)

    def update(gradients: Any, _: Any) -> Any:
        counted = jax.tree.map(lambda g, counts: g if counts else None, gradients, shared)
        norm = optax.tree_utils.tree_norm(counted)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: factor * g, gradients)

    return optax.stateless(update)


def _map_names(function: Any, axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
