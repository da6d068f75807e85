"""What the claims about language models share: configs and the grid of learning rates."""

import math
from collections.abc import Mapping
from typing import Any

from moe_jax.dispatch.gather import Gather
from moe_jax.reproduction.claim import TEST, Measurement, Profile, Side

FILES = {Profile.CPU: "configs/claims/text_cpu.py", Profile.GPU: "configs/claims/text_gpu.py"}
LEARNING_RATES = {Profile.CPU: (8e-3, 1.6e-2), Profile.GPU: (5e-4, 1e-3, 2e-3)}
WIDE_GRID = {Profile.CPU: (4e-3, 8e-3, 1.6e-2), Profile.GPU: (5e-4, 1e-3, 2e-3)}
"""Of claim more_experts; on a CPU the others do without the lowest rate, to fit their time."""
DENSE = {"model.moe_every": 0}
"""Changes that make the dense twin of equal algorithmic FLOPs per token."""
LIMITED = {"model.moe.dispatch": Gather()}
"""Changes that limit the tokens of an expert to the capacity factor, 1.25 in training."""
LONGER: Mapping[Profile, Mapping[str, Any]] = {Profile.CPU: {"steps": 1500}, Profile.GPU: {}}
"""On a CPU more steps than in the config: learned routing becomes good later than fixed routing."""


def gate_scale(num_experts: int) -> float:
    """What gates are multiplied by: 4 for the 8 experts of the configs, whose docstrings say why."""
    return math.sqrt(2 * num_experts)


def side(
    profile: Profile,
    name: str,
    changes: Mapping[str, Any],
    *,
    learning_rates: tuple[float, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    measurements: tuple[Measurement, ...] = (TEST,),
) -> Side:
    """A side on the text of the profile; the grid of learning rates unless others are given."""
    rates = learning_rates or LEARNING_RATES[profile]
    return Side(name, FILES[profile], changes, rates, seeds, measurements)
