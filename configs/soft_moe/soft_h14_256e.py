"""Soft MoE H/14 with 256 experts in 16 of 32 blocks: 54.1B parameters, 342.4 GFLOPs an image.

Puigcerver et al. 2023, Tables 1 and 8: 10.9 ms an image on TPU v3. 256 slots for the 256 patches of an
image: the experts work as much as dense layers.
"""

from configs.soft_moe import jft4b
from moe_jax.analysis.published import Published, Quantity
from moe_jax.models.stack import Remat
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.layouts import PodLayout
from moe_jax.training.experiment import Experiment

PUBLISHED = (
    Published(
        Quantity.PARAMETERS,
        "54.1B",
        "Soft MoE, Table 1",
        note=jft4b.CUT_OFF,
        cut_off=True,
    ),
    Published(
        Quantity.FLOPS_PER_IMAGE,
        "342.4G",
        "Soft MoE, Table 8",
        note=f"not reproduced: 341.4G; {jft4b.PRODUCTS_ALONE}",
    ),
)

PODS = (
    PodLayout(
        "v3:16x16",
        MeshConfig(data=2, expert=256),
        {"model.remat": Remat.FULL},
        note="the paper used TPU v3; this number of cores is ours",
    ),
)


def get_config() -> Experiment:
    return jft4b.pretraining(jft4b.soft(jft4b.dense(jft4b.H, 14), 256), steps=2_000_000)
