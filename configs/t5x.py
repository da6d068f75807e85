"""Google's ladder of generic Mixtures-of-Experts for T5 (flaxformer, "tokens choose" configs).

    python experiments/train.py --config=configs/t5x.py:tiny --workdir=runs/tiny

Top-2 of 8 to 64 experts in every fourth layer, GEGLU, capacity factor 1.25, with batch priority
in the encoder, which would look ahead in the decoder. No paper has these models: they are handy
sizes. Shapes and pre-training are T5's: configs/shared/t5.py.
"""

from configs.shared import t5
from moe_jax.layers.moe import MoEConfig
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.losses import Losses
from moe_jax.routing.priority import Priority
from moe_jax.routing.token_choice import TopK
from moe_jax.tasks.text_to_text import TextToText
from moe_jax.training.experiment import Experiment
from moe_jax.training.rows import Row, chosen


def _moe(order: Priority, group_size: int) -> MoEConfig:
    return MoEConfig(
        TopK(k=2, order=order, losses=Losses(load_balancing_all_choices=1e-2)),
        Capacity(1.25, 2.0, CapacityRule.FLAXFORMER),
        group_size=group_size,
    )


def tokens_choose(shape: t5.Shape, num_experts: int, moe_every: int = 4) -> Experiment:
    encoder, decoder = (
        t5.sparse_stack(shape, num_experts, moe_every, moe)
        for moe in (
            _moe(Priority.BATCH_PRIORITY, 4096),
            _moe(Priority.TOKEN, t5.whole_rows(4096)),
        )
    )
    config = t5.span_corruption(encoder, decoder, tied=False)
    config.task = TextToText(z_loss=1e-4)
    return config


ROWS = {
    "tiny": Row(
        "Width 32, 2 + 2 layers, 8 experts in the last of each stack.",
        lambda: tokens_choose(t5.Shape(32, 64, 6, 2, gated=True), 8, moe_every=2),
    ),
    "small": Row(
        "Width 512, 8 + 8 layers, 32 experts in every fourth.",
        lambda: tokens_choose(t5.Shape(512, 1024, 6, 8, gated=True), 32),
    ),
    "base": Row(
        "Width 768, 12 + 12 layers, 64 experts in every fourth.",
        lambda: tokens_choose(t5.BASE_V1_1, 64),
    ),
    "large": Row(
        "Width 1024, 24 + 24 layers, 64 experts in every fourth.",
        lambda: tokens_choose(t5.LARGE_V1_1, 64),
    ),
    "xl": Row(
        "Width 2048, 24 + 24 layers, 64 experts in every fourth.",
        lambda: tokens_choose(t5.XL_V1_1, 64),
    ),
    "xxl": Row(
        "Width 4096, 24 + 24 layers, 64 experts in every fourth.",
        lambda: tokens_choose(t5.XXL_V1_1, 64),
    ),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
