"""GLaM 64B/64E, 1.2 trillion parameters (Du et al. 2022, Table 4).

Published: average over 29 zero-shot and one-shot tasks above GPT-3 175B's at 8% of the parameters
active per token and about half of its FLOPs (180 against 350 GFLOPs a token); training took 456 MWh
against GPT-3's 1,287 MWh.
Hardware: 1,024 TPU v4 chips; the first 280B of its 600B tokens took 574 hours and 213 MWh.
Source: https://arxiv.org/abs/2112.06905, Table 4 and section 6. Ambiguous: the vocabulary (see
decoders.py), the position biases, loss coefficient and capacity factor.
"""

from configs.glam.decoders import VOCABULARY, decoder
from moe_jax.analysis.published import Published, Quantity
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.layouts import PodLayout
from moe_jax.training.experiment import Experiment

PUBLISHED = (
    Published(Quantity.PARAMETERS, "1.2T", "Table 4"),
    Published(Quantity.ACTIVATED, "96.6B", "Table 4"),
    Published(
        Quantity.FLOPS_PER_TOKEN,
        "180G",
        "Table 5",
        note=(
            "not reproduced: 2 x 96.6B activated parameters are 193G, and the router and "
            "attention add to it; the paper does not say what 180G leaves out"
        ),
    ),
)

PODS = (PodLayout("v4:8x8x16", MeshConfig(data=32, expert=8, model=4)),)


def get_config() -> Experiment:
    return decoder(64, 8192, 32768, 128, 64, vocab_size=VOCABULARY)
