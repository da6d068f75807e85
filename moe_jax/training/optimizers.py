"""Optimizers as configs; the algorithms are optax's."""

import dataclasses
import enum
from typing import Any, Protocol

import jax
import optax

from moe_jax.errors import UserError

# Dimensions that only norm scales and embedding tables have.
_NOT_DECAYED = ("norm", "vocabulary")


class Schedule(enum.StrEnum):
    """Learning rate after the linear warm-up.

    COSINE: from the peak to `final_fraction` of it at the last step.
    INVERSE_SQRT: peak * sqrt(warmup_steps / step) (Vaswani 2017, T5).
    """

    COSINE = "cosine"
    INVERSE_SQRT = "inverse_sqrt"


class Optimizer(Protocol):
    """The contract: a config that builds an optax transformation."""

    def validate(self) -> None:
        """Raises UserError for values that cannot work."""

    def learning_rate_at(self, steps: int) -> optax.Schedule:
        """Learning rate by step, for a run of `steps` steps."""

    def build(self, steps: int, axes: Any) -> optax.GradientTransformation:
        """The transformation; `axes` is the tree of the parameters' dimension names."""


@dataclasses.dataclass
class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with clipping by global norm.

    Attributes:
      learning_rate: at the peak.
      schedule: after the warm-up.
      warmup_steps: linear from 0.
      final_fraction: of the peak, at the end of COSINE.
      b1, b2, epsilon: Adam's.
      weight_decay: decoupled; on matrices only, not on norm scales and embedding tables.
      clip_norm: largest global gradient norm; 0 switches clipping off.
    """

    learning_rate: float = 1e-3
    schedule: Schedule = Schedule.COSINE
    warmup_steps: int = 100
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def validate(self) -> None:
        """Raises UserError for values that cannot work."""
        if not self.learning_rate > 0:
            raise UserError(
                f"optimizer.learning_rate is {self.learning_rate}; it must be above 0, such as 1e-3."
            )
        if self.warmup_steps < 1:
            raise UserError(
                f"optimizer.warmup_steps is {self.warmup_steps}; it must be at least 1."
            )
        for name in ("b1", "b2", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1].")
        for name in ("weight_decay", "clip_norm", "epsilon"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be at least 0."
                )

    def learning_rate_at(self, steps: int) -> optax.Schedule:
        """Learning rate by step, for a run of `steps` steps."""
        warmup = optax.schedules.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        if self.schedule == Schedule.COSINE:
            # A run shorter than its warm-up never leaves it.
            after = optax.schedules.cosine_decay_schedule(
                self.learning_rate, max(steps - self.warmup_steps, 1), self.final_fraction
            )
        else:

            def after(count: jax.typing.ArrayLike) -> jax.Array:
                # join_schedules also evaluates this before its time, at negative counts.
                ratio = self.warmup_steps / (self.warmup_steps + jax.numpy.maximum(count, 0))
                return self.learning_rate * jax.numpy.sqrt(ratio)

        return optax.schedules.join_schedules([warmup, after], [self.warmup_steps])

    def build(self, steps: int, axes: Any) -> optax.GradientTransformation:
        """Clipping, Adam, decay of matrices, schedule."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
            optax.adamw(
                self.learning_rate_at(steps),
                b1=self.b1,
                b2=self.b2,
                eps=self.epsilon,
                weight_decay=self.weight_decay,
                mask=weight_decay_mask(axes),
            ),
        )


def weight_decay_mask(axes: Any) -> Any:
    """True for matrices, False for norm scales and embedding tables, by dimension names."""
    return jax.tree.map(
        lambda names: not any(name in _NOT_DECAYED for name in names),
        axes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
