"""What the claims about image classifiers share: configs, data and the grid of learning rates."""

from collections.abc import Mapping
from typing import Any

from moe_jax.models.vision import VisionConfig
from moe_jax.reproduction.claim import TEST, Measurement, Profile, Side, read_config
from moe_jax.reproduction.results import FinishedRun

FILES = {Profile.CPU: "configs/claims/images_cpu.py", Profile.GPU: "configs/claims/images_gpu.py"}
LEARNING_RATES = {Profile.CPU: (2e-3, 4e-3), Profile.GPU: (3e-4, 1e-3)}
DENSE = {"model.moe_every": 0, "model.moe_at": ()}
"""Changes that make the dense twin."""


def dataset(name: str, classes: int) -> dict[str, Any]:
    """Changes that train on another dataset, whose classes are not told apart in evaluation."""
    return {
        "data.dataset": name,
        "data.domains_are_classes": False,
        "data.num_classes": classes,
        "model.num_classes": classes,
    }


def backbone(profile: Profile) -> VisionConfig:
    """The model of the profile's config."""
    model: Any = read_config(FILES[profile]).model
    return model


def side(
    profile: Profile,
    name: str,
    changes: Mapping[str, Any],
    measurements: tuple[Measurement, ...] = (TEST,),
) -> Side:
    """A side on the images of the profile."""
    rates = LEARNING_RATES[profile]
    return Side(name, FILES[profile], changes, rates, measurements=measurements)


def test_accuracy(run: FinishedRun) -> float:
    """Percent of test images; 0 if the run diverged."""
    return 0.0 if run.diverged_at is not None else 100 * run.measured["test"]["eval/accuracy"]
