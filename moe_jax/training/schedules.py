"""Learning rates by step."""

import dataclasses
import enum

import jax
import jax.numpy as jnp
import optax

from moe_jax.component import Component, field
from moe_jax.errors import UserError


class Schedule(enum.StrEnum):
    """Learning rate after the warm-up and the constant steps, which end at step s.

    CONSTANT: the peak.
    COSINE: from the peak to `final_fraction` of it at the last step.
    LINEAR: the same along a line (V-MoE to 1e-5, BASE to 0).
    INVERSE_SQRT: peak * sqrt(T / (T + step - s)), with T the `timescale`, or s where that is 0: then
      peak * sqrt(s / step) (Vaswani 2017).
    STEPS: the peak times `decay_factor` for every fraction in `decay_at` that has passed (DeepSeek).
    """

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"
    INVERSE_SQRT = "inverse_sqrt"
    STEPS = "steps"


@dataclasses.dataclass
class ScheduledRate(Component):
    """A learning rate that rises, stays, falls by its schedule, and cools down.

    T5's rate of 1 / sqrt(max(step, 10k)), "base 1.0", is INVERSE_SQRT with a peak of 0.01, no
    warm-up and 10k constant steps; so is GLaM's 0.01. Soft MoE's has a warm-up of 10k, a timescale of
    10k and cools down for 50k (500k in the long runs). OLMoE's is COSINE and cools down.

    Attributes:
      learning_rate: at the peak.
      schedule: see `Schedule`.
      warmup_steps: linear from 0.
      constant_steps: at the peak, after the warm-up.
      timescale: of INVERSE_SQRT, in steps; 0 for the warm-up and the constant steps together.
      final_fraction: of the peak, at the end of COSINE and LINEAR.
      decay_at: fractions of the run at which STEPS goes down; V2 has (0.6, 0.9).
      decay_factor: of STEPS.
      cooldown_steps: at the end of the run, over which the rate is drawn to 0 by a linear factor.
        COSINE and LINEAR have come to their end before.
    """

    learning_rate: float = field(1e-3, above=0, factor=True)
    schedule: Schedule = Schedule.COSINE
    warmup_steps: int = field(0, at_least=0)
    constant_steps: int = field(0, at_least=0)
    timescale: int = field(0, at_least=0)
    final_fraction: float = field(0.1, at_least=0, at_most=1)
    decay_at: tuple[float, ...] = (0.8, 0.9)
    decay_factor: float = field(0.316, at_least=0, at_most=1)
    cooldown_steps: int = field(0, at_least=0)

    def validate(self) -> None:
        """Raises UserError for values that cannot work."""
        self.check_ranges("optimizer")
        if not all(0 < fraction < 1 for fraction in self.decay_at):
            raise UserError(
                f"optimizer.decay_at is {self.decay_at}; it must have fractions between 0 and 1."
            )
        inverse_sqrt = self.schedule == Schedule.INVERSE_SQRT
        if inverse_sqrt and not (self.timescale or self.warmup_steps + self.constant_steps):
            raise UserError(
                "optimizer.schedule is inverse_sqrt, which needs a timescale, but timescale, "
                "warmup_steps and constant_steps are 0; set one of them."
            )

    def learning_rate_at(self, steps: int) -> optax.Schedule:
        """Learning rate by step, for a run of `steps` steps."""
        begin = self.warmup_steps + self.constant_steps
        # A run shorter than its warm-up never leaves it.
        decay_steps = max(steps - self.cooldown_steps - begin, 1)
        uncooled = optax.schedules.join_schedules(
            [
                optax.schedules.linear_schedule(0.0, self.learning_rate, max(self.warmup_steps, 1)),
                optax.schedules.constant_schedule(self.learning_rate),
                self._decay(steps, begin, decay_steps),
            ],
            [self.warmup_steps, begin],
        )
        if not self.cooldown_steps:
            return uncooled

        def cooled(step: jax.typing.ArrayLike) -> jax.Array:
            return uncooled(step) * jnp.clip((steps - step) / self.cooldown_steps, 0.0, 1.0)

        return cooled

    def _decay(self, steps: int, begin: int, decay_steps: int) -> optax.Schedule:
        """What follows step `begin`, by the number of steps since."""
        peak = self.learning_rate

        def inverse_sqrt(count: jax.typing.ArrayLike) -> jax.Array:
            timescale = self.timescale or begin
            # join_schedules also evaluates this before its time, at negative counts.
            return peak * jnp.sqrt(timescale / (timescale + jnp.maximum(count, 0)))

        def by_steps(count: jax.typing.ArrayLike) -> jax.Array:
            passed = jnp.asarray(count) + begin >= jnp.array(self.decay_at) * steps
            return peak * jnp.power(self.decay_factor, passed.sum())

        match self.schedule:
            case Schedule.CONSTANT:
                return optax.schedules.constant_schedule(peak)
            case Schedule.COSINE:
                return optax.schedules.cosine_decay_schedule(peak, decay_steps, self.final_fraction)
            case Schedule.LINEAR:
                final = self.final_fraction * peak
                return optax.schedules.linear_schedule(peak, final, decay_steps)
            case Schedule.INVERSE_SQRT:
                return inverse_sqrt
            case Schedule.STEPS:
                return by_steps
