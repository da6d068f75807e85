"""Switch-C: 2048 experts in every layer, 1.6T parameters; ReLU, output layer of its own.

Fedus et al. 2021, Table 9 and section 5: trained with expert parallelism alone, four times faster
than T5-XXL to equal quality. 32 heads as printed; Google's config has 30, which makes 1571.3B
parameters too, and 870B FLOPs.

Capacity factor 1.0 in training and 2.0 in evaluation at 2 slots at least, which groups of 2048
tokens for 2048 experts always have: the same as a factor of 2 here.
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
    Published(Quantity.PARAMETERS, "1571B", "Switch, Table 9"),
    Published(
        Quantity.FLOPS_PER_SEQUENCE,
        "890B",
        "Switch, Table 9",
        note="printed to two digits",
        relative_tolerance=0.005,
    ),
)

PODS = (
    PodLayout(
        "v5p:8x8x8",
        MeshConfig(expert=128, model=4),
        {"model.encoder.remat": Remat.FULL, "model.decoder.remat": Remat.FULL},
        note="the paper has expert parallelism alone and does not name its machine; the decoder's 128 "
        "groups of tokens divide over at most 128 devices, so that four work on each group here",
    ),
)


def get_config() -> Experiment:
    return switch(
        t5.Shape(2080, 6144, 32, 15, t5.RELU),
        2048,
        tied=False,
        moe_every=1,
        capacity=Capacity(2.0, 2.0, CapacityRule.SWITCH),
        group_size=2048,
        steps=500_000,
    )
