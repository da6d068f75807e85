"""GShard MoE(2048E, 36L): 600B parameters.

Lepikhin et al. 2020, Tables 1 and 3: average BLEU 44.3 on 2048 TPU v3 cores. It took 4 days, 22.4
core-years. The paper prints 36684 experts in all, for 36864.
"""

from configs.gshard.translation import gshard
from moe_jax.analysis.published import Published, Quantity
from moe_jax.models.stack import Remat
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.layouts import PodLayout
from moe_jax.training.experiment import Experiment

PUBLISHED = (Published(Quantity.PARAMETERS, "600B", "GShard, Table 1", relative_tolerance=0.07),)

PODS = (
    PodLayout(
        "v3:32x32",
        # The paper, too, keeps all but the experts whole on every core.
        MeshConfig(expert=2048),
        {"model.encoder.remat": Remat.FULL, "model.decoder.remat": Remat.FULL},
    ),
)


def get_config() -> Experiment:
    return gshard(36, 2048, batch_tokens=2**22)
