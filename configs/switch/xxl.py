"""Switch-XXL: 395B parameters of the FLOPs of T5-XXL; GEGLU, output layer of its own.

Fedus et al. 2021, Table 9, which prints 64 experts in every other layer: 201B parameters.
Google's config has 128 experts in every other layer, which is the 395B that are published, and is
what is here. (The headers of the table's columns for experts and layers are swapped in print.) At
least 2 slots an expert in Google's config: groups of 4096 tokens have 40, so that this decides
nothing.
"""

from configs.switch import t5
from configs.switch.transformer import switch
from moe_jax.analysis.published import Published, Quantity
from moe_jax.models.stack import Remat
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.layouts import PodLayout
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.training.experiment import Experiment

PUBLISHED = (
    Published(
        Quantity.PARAMETERS,
        "395B",
        "Switch, Table 9",
        note="erratum: 128 experts make 395B; the 64 that the table prints would make 201B",
    ),
    Published(Quantity.FLOPS_PER_SEQUENCE, "6.3T", "Switch, Table 9"),
)

PODS = (
    PodLayout(
        "v5p:4x8x8",
        MeshConfig(expert=64, model=4),
        {"model.encoder.remat": Remat.FULL, "model.decoder.remat": Remat.FULL},
        note="the paper does not name its machine",
    ),
)


def get_config() -> Experiment:
    capacity = Capacity(1.25, 4.0, CapacityRule.FLAXFORMER)  # 4.0 is this model's own.
    return switch(t5.XXL_V1_1, 128, tied=False, group_size=4096, steps=500_000, capacity=capacity)
