"""How many slots an expert's buffer has.

Axis letters: S tokens in a group, K choices per token, E experts, C slots per expert.
"""

import dataclasses
import math

from moe_jax.errors import UserError


@dataclasses.dataclass
class Capacity:
    """Slots per expert and group: ceil(S * K * factor / E) (Switch eq. 3, with K as in V-MoE).

    Attributes:
      train_factor: capacity factor in training (Switch: 1.25).
      evaluation_factor: capacity factor in evaluation (Switch: 2.0).
    """

    train_factor: float = 1.25
    evaluation_factor: float = 2.0

    def slots(self, tokens: int, choices: int, num_experts: int, train: bool) -> int:
        """C; never more than S, because a token takes at most one slot of an expert."""
        factor = self.train_factor if train else self.evaluation_factor
        # Rounded first, so that 64 * 1.1 / 8 = 8.8000000000000007 and not its float error counts.
        return min(tokens, math.ceil(round(tokens * choices * factor / num_experts, 6)))

    def validate(self) -> None:
        """Raises UserError for a factor that leaves no slot."""
        for name in ("train_factor", "evaluation_factor"):
            factor = getattr(self, name)
            if not factor > 0:
                raise UserError(
                    f"capacity.{name} is {factor}, which gives experts no slot (zero capacity); "
                    "use a factor above 0, such as 1.25."
                )
            if not math.isfinite(factor):
                raise UserError(f"capacity.{name} is {factor}; it must be a finite number.")
