"""ST-MoE-32B: 64 experts in every fourth layer, 269B parameters.

Zoph et al. 2022, Table 1: the FLOPs of a dense model of 32B parameters; 1.5T tokens of C4 and of
GLaM's mixture (Table 19), of which C4 is here. Pre-trained on 64 x 16 TPU cores (experts x model
parallelism). The printed 20.2T FLOPs are met with both experts of every token, to half a percent
with the attention scores and exactly without.
"""

from configs.st_moe.transformer import st_moe
from configs.switch import t5
from moe_jax.analysis.published import Published, Quantity
from moe_jax.models.stack import Remat
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.layouts import PodLayout
from moe_jax.training.experiment import Experiment

PUBLISHED = (
    Published(Quantity.PARAMETERS, "269B", "ST-MoE, Table 1"),
    Published(
        Quantity.FLOPS_PER_SEQUENCE,
        "20.2T",
        "ST-MoE, Table 1",
        note="not reproduced: 20.3T; 20.2T without attention scores",
    ),
)

PODS = (
    PodLayout(
        "v3:16x32",
        MeshConfig(expert=64, model=16),
        {"model.encoder.remat": Remat.FULL, "model.decoder.remat": Remat.FULL},
        note="the mesh is the paper's; it does not say of which TPU the 1,024 cores are",
    ),
)


def get_config() -> Experiment:
    shape = t5.Shape(5120, 20480, 64, 24, t5.GEGLU, head_width=128)
    return st_moe(shape, 64, tied=False, steps=1_430_000)  # 1.5T tokens.
