"""The models of GShard (Lepikhin et al. 2020, arXiv:2006.16668, Tables 1 and 3).

    python experiments/train.py --config=configs/gshard.py:2048e_36l --topology=v3:32x32 --workdir=runs/600b

Multilingual translation into English, 100 languages, 13B pairs; encoder and decoder of equal
depth, a MoE in every other layer, top-2 where the second expert is kept with probability min(1, 2
gate), 2 S / E slots, ReLU, width 1024, feed-forward and expert width 8192, 16 heads of 128.
Vocabularies of 64,000 and 32,000 (appendix A.2); Adafactor with a learning rate of 1 and 1 /
sqrt(step) after 10,000 steps; dropout 0.1. Second choices are served after all first choices, so
that the decoder's losses see a little of the future.

Printed sizes are rounded, perhaps in units of 2^30: they are met within 7%. The paper does not
say: the coefficient of the balancing loss (its l_aux times E^2 is the loss here, and 1e-2 is
Switch's), the lengths of sentences (128), positions and norms (those of T5, as in the authors'
code), and whether the output layer is tied. Its data are not public: the eight languages of
`translations` are in their place.
"""

from collections.abc import Callable

from moe_jax.data.pairs import PairData
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.stack import ComputeDtype, Remat, StackConfig
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.published import Published, Quantity
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import GShard
from moe_jax.tasks.text_to_text import TextToText
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import Adafactor
from moe_jax.training.rows import PodLayout, Row, chosen

LANGUAGES = ("de", "es", "fr", "it", "nl", "pl", "pt", "ru")
LENGTH = 128
TOKENS = 10**12


def gshard(
    num_layers: int,
    num_experts: int,
    batch_tokens: int,
    *,
    head_width: int = 128,
    dtype: ComputeDtype = ComputeDtype.FLOAT32,
) -> Experiment:
    """`num_layers` of both stacks together; 0 experts for a dense model."""

    def stack() -> StackConfig:
        return StackConfig(
            num_layers=num_layers // 2,
            width=1024,
            num_heads=16,
            head_width=head_width,
            mlp_width=8192,
            attention=MultiHead(positions=Positions.RELATIVE),
            num_experts=max(num_experts, 1),
            moe_every=2 if num_experts else 0,
            moe=MoEConfig(
                router=GShard(k=2, threshold=0.5, losses=Losses(load_balancing=1e-2)),
                capacity=Capacity(1.0, 1.0, CapacityRule.GSHARD),
                # A group for each device, of which there are as many as experts.
                group_size=batch_tokens // max(num_experts, 1),
            ),
            dropout=0.1,
            dtype=dtype,
        )

    return Experiment(
        steps=TOKENS // batch_tokens,
        model=EncoderDecoderConfig(
            vocab_size=64_000,
            target_vocab_size=32_000,
            tied=False,
            embedding_scaling=EmbeddingScaling.NONE,
            accept_leak=True,
            encoder=stack(),
            decoder=stack(),
        ),
        task=TextToText(),
        data=PairData(
            pairs=tuple(f"{language}-en" for language in LANGUAGES),
            instruction=False,
            tokenizer=Subword(vocab_size=32_000),
            input_length=LENGTH,
            target_length=LENGTH,
            batch_size=batch_tokens // LENGTH,
        ),
        optimizer=Adafactor(b2=0.99),
    )


def _row(
    model: str,
    build: Callable[[], Experiment],
    parameters: str,
    result: str = "",
    cost: str = "",
    note: str = "",
    pods: tuple[PodLayout, ...] = (),
) -> Row:
    number = Published(Quantity.PARAMETERS, parameters, "GShard, Table 1", relative_tolerance=0.07)
    return Row(f"GShard {model}.", build, (number,), result, cost, note=note, pods=pods)


ROWS = {
    "128e_12l": _row(
        "MoE(128E, 12L): 12.5B parameters",
        lambda: gshard(12, 128, batch_tokens=2**20),
        "12.5B",
        "Average BLEU 36.7.",
        "128 TPU v3 cores.",
    ),
    "128e_36l": _row(
        "MoE(128E, 36L): 37B parameters",
        lambda: gshard(36, 128, batch_tokens=2**20),
        "37B",
        "Average BLEU 39.0.",
        "128 TPU v3 cores.",
    ),
    "512e_12l": _row(
        "MoE(512E, 12L): 50B parameters",
        lambda: gshard(12, 512, batch_tokens=2**20),
        "50B",
        "Average BLEU 40.0.",
        "512 TPU v3 cores.",
    ),
    "512e_36l": _row(
        "MoE(512E, 36L): 150B parameters",
        lambda: gshard(36, 512, batch_tokens=2**20),
        "150B",
        "Average BLEU 43.7.",
        "512 TPU v3 cores.",
    ),
    "2048e_12l": _row(
        "MoE(2048E, 12L): 200B parameters",
        lambda: gshard(12, 2048, batch_tokens=2**22),
        "200B",
        "Average BLEU 41.3.",
        "2048 TPU v3 cores.",
        note="The paper prints 12228 experts in all, for 12288.",
    ),
    "2048e_36l": _row(
        "MoE(2048E, 36L): 600B parameters",
        lambda: gshard(36, 2048, batch_tokens=2**22),
        "600B",
        "Average BLEU 44.3.",
        "2048 TPU v3 cores for 4 days, 22.4 core-years.",
        note="The paper prints 36684 experts in all, for 36864.",
        pods=(
            PodLayout(
                "v3:32x32",
                # The paper, too, keeps all but the experts whole on every core.
                MeshConfig(expert=2048),
                {"model.encoder.remat": Remat.FULL, "model.decoder.remat": Remat.FULL},
            ),
        ),
    ),
    "2048e_60l": _row(
        "MoE(2048E, 60L): a trillion parameters, with activations in bfloat16",
        lambda: gshard(60, 2048, batch_tokens=2**22, dtype=ComputeDtype.BFLOAT16),
        "1T",
        cost="2048 TPU v3 cores.",
        note="Trained for a while only (section 4.1); its numerics were not stable enough for "
        "results.",
    ),
    "dense_96l": Row(
        "GShard T(96L): the dense model that the others are compared with, 2.3B parameters.",
        lambda: gshard(96, 0, batch_tokens=2**22, head_width=64),
        published=(Published(Quantity.PARAMETERS, "2.3B", "GShard, Table 3"),),
        result="Average BLEU 36.9.",
        cost="235 core-years with GPipe on 2048 TPU v3 cores.",
        note="Heads of 64 give the printed size; with heads of 128, as the MoE models have, it would "
        "be 2.9B.",
    ),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
