"""How many slots an expert's buffer has, by the rules of the papers and their code.

Axis letters: S tokens in a group, K choices per token, E experts, C slots per expert.
"""

import dataclasses
import enum
import math
from collections.abc import Callable

from moe_jax.component import Component
from moe_jax.errors import UserError


class CapacityRule(enum.StrEnum):
    """C as a function of S, K, E and the capacity factor cf.

    SWITCH: ceil(S K cf / E) (Switch eq. 3, where K is 1).
    MESH: max(min(S, int(S cf / E)), 4); K is left out (Mesh TensorFlow: Switch, ST-MoE).
    FLAXFORMER: max(round(S cf / E), 4), halves to even; K is left out.
    PRAXIS: int(S cf / E); K is left out, and there is no minimum (GLaM).
    GSHARD: ceil(2 S cf / E): the paper's 2 S / E at cf = 1.
    VMOE_CEIL: ceil(S K cf / E), then up to a multiple of 4 (vmoe).
    VMOE_ROUND: round(S K cf / E), halves to even, then up to a multiple of 4 (V-MoE's paper).
    EXPERT_CHOICE: ceil(S cf / E), where cf is the mean number of experts per token.
    SOFT_MOE: round(S cf / E), halves to even: how vmoe sets P, the slots per expert of Soft MoE, for a
      config to set `SoftMoE.slots_per_expert` by; the router itself reads no capacity.
    DEEPSPEED: max(ceil(S K cf / E), 4).
    NO_DROPS: S: a buffer that no routing can fill (cf is not read). Costs E times the memory of
      a dense layer.
    """

    SWITCH = "switch"
    MESH = "mesh"
    FLAXFORMER = "flaxformer"
    PRAXIS = "praxis"
    GSHARD = "gshard"
    VMOE_CEIL = "vmoe_ceil"
    VMOE_ROUND = "vmoe_round"
    EXPERT_CHOICE = "expert_choice"
    SOFT_MOE = "soft_moe"
    DEEPSPEED = "deepspeed"
    NO_DROPS = "no_drops"


def capacity_by_rule(
    rule: CapacityRule, tokens: int, choices: int, num_experts: int, factor: float
) -> int:
    """The reference's number, which may be 0 or above S.

    Float errors of S cf / E below 1e-6 are rounded off first, where a reference keeps them: int of
    100 * 0.29 is 29 here and 28 in Python.

    Args:
      rule: whose.
      tokens: S.
      choices: K.
      num_experts: E.
      factor: cf.
    """
    # Rounded first, so that 100 * 1.1 / 10 = 11.000000000000002 does not round up to 12.
    share = round(tokens * factor / num_experts, 6)
    all_choices = round(tokens * choices * factor / num_experts, 6)
    rules: dict[CapacityRule, Callable[[], int]] = {
        CapacityRule.SWITCH: lambda: math.ceil(all_choices),
        CapacityRule.MESH: lambda: max(min(tokens, int(share)), 4),
        CapacityRule.FLAXFORMER: lambda: max(round(share), 4),
        CapacityRule.PRAXIS: lambda: int(share),
        CapacityRule.GSHARD: lambda: math.ceil(2 * share),
        CapacityRule.VMOE_CEIL: lambda: _up_to_multiple(math.ceil(all_choices), 4),
        CapacityRule.VMOE_ROUND: lambda: _up_to_multiple(round(all_choices), 4),
        CapacityRule.EXPERT_CHOICE: lambda: math.ceil(share),
        CapacityRule.SOFT_MOE: lambda: round(share),
        CapacityRule.DEEPSPEED: lambda: max(math.ceil(all_choices), 4),
        CapacityRule.NO_DROPS: lambda: tokens,
    }
    return rules[rule]()


def _up_to_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


@dataclasses.dataclass
class Capacity(Component):
    """The capacity policy of a MoE layer.

    Attributes:
      train_factor: capacity factor in training (Switch: 1.25).
      evaluation_factor: capacity factor in evaluation (Switch: 2.0).
      rule: whose formula.
    """

    train_factor: float = 1.25
    evaluation_factor: float = 2.0
    rule: CapacityRule = CapacityRule.SWITCH

    def expert_capacity(self, tokens: int, choices: int, num_experts: int, train: bool) -> int:
        """C; never more than S, because a token takes at most one slot of an expert.

        Raises:
          UserError: the rule gives no slot at all.
        """
        factor = self.train_factor if train else self.evaluation_factor
        slots = capacity_by_rule(self.rule, tokens, choices, num_experts, factor)
        if slots < 1:
            name = "train_factor" if train else "evaluation_factor"
            raise UserError(
                f"capacity.{name} is {factor}, which with capacity.rule={self.rule}, {tokens} tokens "
                f"per group and {num_experts} experts gives experts no slot (zero capacity); raise "
                "the factor or moe.group_size."
            )
        return min(tokens, slots)

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
