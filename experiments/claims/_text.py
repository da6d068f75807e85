"""What the claims about language models share: configs and the grid of learning rates."""

from collections.abc import Mapping
from typing import Any

from moe_jax.reproduction.claim import TEST, Measurement, Profile, Side

FILES = {Profile.CPU: "configs/claims/text_cpu.py", Profile.GPU: "configs/claims/text_gpu.py"}
LEARNING_RATES = {Profile.CPU: (4e-3, 8e-3, 1.6e-2), Profile.GPU: (5e-4, 1e-3, 2e-3)}
DENSE = {"model.moe_every": 0}
"""Changes that make the dense twin of equal algorithmic FLOPs per token."""


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
