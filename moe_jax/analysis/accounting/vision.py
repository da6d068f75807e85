"""Counts of Vision Transformers.

Axis letters: L tokens of an image, N patches, p side of a patch, d width, V classes.
"""

from moe_jax.analysis.accounting.costs import Accounting, count
from moe_jax.analysis.accounting.stack import of_stack
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.vision import VisionConfig
from moe_jax.routing.soft import SoftMoE


def account(config: VisionConfig) -> Accounting:
    """Counts a classifier, per image.

    Algorithmic FLOPs of Soft MoE have its mixtures and their logits, because the paper counts them
    (Table 8: without them S/16 with 128 experts would have 8.2 GFLOPs an image, and 8.6 is printed).
    """
    shapes = AbstractModel.of(config).shapes
    parameters = count(shapes)
    cost = of_stack(config, shapes["stack"])
    tokens = config.num_tokens
    embedding = config.grid**2 * count(shapes["patches"]["kernel"])
    # One vector of each image is classified.
    head = count(shapes["head"]["kernel"])
    if config.pre_logits:
        head += count(shapes["pre_logits"]["kernel"])
    ends = 2.0 * (embedding + head)
    mixtures = 2.0 * cost.routers if isinstance(config.moe.router, SoftMoE) else 0.0
    return Accounting(
        parameters,
        round(parameters - cost.unvisited_parameters),
        ends + tokens * (cost.algorithmic(tokens) + mixtures),
        ends + tokens * cost.executed(tokens),
        "image",
    )
