"""DeepSeek-V3, 671B (DeepSeek-AI 2024, section 4.2).

Published: MMLU 87.1, 14.8T tokens. Hardware: 2,048 H800, 2.788M GPU hours in all (2.664M for pre-
training), about 5.6M dollars. Source: https://arxiv.org/abs/2412.19437.
"""

from configs.deepseek_v3.decoders import full
from moe_jax.analysis.published import Published, Quantity
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.layouts import PodLayout
from moe_jax.training.experiment import Experiment

PUBLISHED = (
    Published(Quantity.PARAMETERS, "671B", "section 4.2"),
    Published(
        Quantity.ACTIVATED_WITHOUT_INPUT,
        "37B",
        "section 4.2",
        note="37.55B with the input embedding",
    ),
)

PODS = (
    PodLayout(
        "v5p:8x8x16",
        MeshConfig(data=16, expert=64),
        {"microbatches": 15, "model.moe.dispatch.buffer_factor": 1.25},
        note="the paper trained on 2,048 H800 GPUs, in FP8 and with pipeline parallelism; buffers have "
        "room for a quarter more rows than at balance, where the paper drops nothing",
    ),
)


def get_config() -> Experiment:
    return full()
