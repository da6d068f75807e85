"""Mixtral 8x22B (Mistral AI 2024).

Published: MMLU 77.8. Source: mistral.ai/news/mixtral-8x22b and the model's config.json (56
layers, width 6,144, 48 heads, 16,384 wide experts, vocabulary 32,768, context 65,536).
"""

from configs.mixtral.decoders import decoder
from moe_jax.analysis.published import Published, Quantity
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.layouts import PodLayout
from moe_jax.training.experiment import Experiment

PUBLISHED = (
    Published(Quantity.PARAMETERS, "141B", "mistral.ai/news/mixtral-8x22b"),
    Published(Quantity.ACTIVATED, "39B", "mistral.ai/news/mixtral-8x22b"),
)

PODS = (
    PodLayout(
        "v5p:4x8x8",
        MeshConfig(data=32, expert=8),
        {"model.moe.dispatch.buffer_factor": 2.0},
        note="nothing is published of the machine, batch and optimizer; buffers have room for twice as "
        "many rows as at balance",
    ),
)


def get_config() -> Experiment:
    return decoder(56, 6144, 48, 16384, 32_768, 65_536)
