"""The language models of sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055).

    python experiments/train.py --config=configs/upcycling.py:sparse_base --workdir=runs/sparse_base

T5 v1.1 and the Mixture-of-Experts that is made of it: 32 experts, copies of the dense layer, in
every other layer; expert choice with 2 experts a token on average in the encoder, top-2 with a
load-balancing loss of 1e-2 in the decoder, groups of at most 4096 tokens. The learning rate goes
on as 1 / sqrt(step).

These configs are the two models, each from scratch, which the paper compares as well. Batch and
steps are T5 v1.1's; what the upcycled models were trained with besides is not known here.
Shapes and pre-training are in configs/shared/t5.py.
"""

from configs.shared import t5
from moe_jax.layers.moe import MoEConfig
from moe_jax.published import Published, Quantity
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.expert_choice import ExpertChoice
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Experiment
from moe_jax.training.rows import Row, chosen

STEPS = 1_000_000


def dense(shape: t5.Shape) -> Experiment:
    encoder, decoder = t5.dense_stack(shape), t5.dense_stack(shape)
    return t5.span_corruption(encoder, decoder, tied=False, steps=STEPS)


def sparse(shape: t5.Shape) -> Experiment:
    encoder_moe = MoEConfig(
        ExpertChoice(), Capacity(2.0, 2.0, CapacityRule.EXPERT_CHOICE), group_size=4096
    )
    decoder_moe = MoEConfig(
        TopK(k=2, losses=Losses(load_balancing_all_choices=1e-2)),
        Capacity(2.0, 2.0, CapacityRule.FLAXFORMER),
        group_size=t5.whole_rows(4096),
    )
    encoder, decoder = (
        t5.sparse_stack(shape, 32, 2, moe, init_scale=1.0) for moe in (encoder_moe, decoder_moe)
    )
    return t5.span_corruption(encoder, decoder, tied=False, steps=STEPS)


def _dense(size: str, shape: t5.Shape, parameters: str) -> Row:
    return Row(
        f"T5 v1.1 {size}, which is upcycled: {parameters} parameters.",
        lambda: dense(shape),
        published=(Published(Quantity.PARAMETERS, parameters, "Sparse upcycling, appendix"),),
    )


def _sparse(size: str, shape: t5.Shape, parameters: str) -> Row:
    return Row(
        f"T5 v1.1 {size} with 32 experts in every other layer, as upcycling makes it: {parameters} "
        "parameters.",
        lambda: sparse(shape),
        published=(Published(Quantity.PARAMETERS, parameters, "Sparse upcycling, appendix"),),
    )


ROWS = {
    "dense_base": _dense("Base", t5.BASE_V1_1, "248M"),
    "dense_large": _dense("Large", t5.LARGE_V1_1, "783M"),
    "dense_xl": _dense("XL", t5.XL_V1_1, "2.85B"),
    "sparse_base": _sparse("Base", t5.BASE_V1_1, "2.00B"),
    "sparse_large": _sparse("Large", t5.LARGE_V1_1, "7.22B"),
    "sparse_xl": _sparse("XL", t5.XL_V1_1, "26.26B"),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
