"""Mixtral 8x7B (Jiang et al. 2024, Table 1).

Published: MMLU 70.6, above LLaMA2 70B on most benchmarks with 13B active parameters. Source:
https://arxiv.org/abs/2401.04088. MaxText reports 52.6% MFU on TPU v5p.
"""

from configs.mixtral.decoders import decoder
from moe_jax.analysis.published import Published, Quantity
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.layouts import PodLayout
from moe_jax.training.experiment import Experiment

PUBLISHED = (
    Published(Quantity.PARAMETERS, "46.7B", "mistral.ai/news/mixtral-of-experts"),
    Published(Quantity.ACTIVATED, "12.9B", "mistral.ai/news/mixtral-of-experts"),
    Published(Quantity.PARAMETERS, "47B", "section 1"),
    Published(Quantity.ACTIVATED, "13B", "section 1"),
)

PODS = (
    PodLayout(
        "v5p:4x4x8",
        MeshConfig(data=16, expert=8),
        {"model.moe.dispatch.buffer_factor": 2.0},
        note="the machine is that of MaxText's figure, batch and optimizer are not published; buffers have room for twice as many rows as at "
        "balance",
    ),
)


def get_config() -> Experiment:
    return decoder(32, 4096, 32, 14336, 32_000, 32_768)
