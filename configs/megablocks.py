"""The models of MegaBlocks (Gale et al. 2023, Tables 1 and 2, and the scripts in databricks/megablocks).

    python experiments/train.py --config=configs/megablocks.py:dmoe_xs --workdir=runs/dmoe_xs

GPT-2's block; dMoE has 64 experts, top-1 and dropless, in every block, sequences of 1,024, batches of
512, 10B tokens of the Pile (`c4` stands for it), the load-balancing loss 0.1 in the scripts. Learning
rates are those of GPT-3's sizes. Published of the dMoEs: up to 40% faster than Tutel's MoE at its best
capacity factor, and up to 2.4 times as fast to the loss of the dense model by Megatron-LM. Hardware:
8 A100 of 80 GB. Source: https://arxiv.org/abs/2211.15841.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.dispatch.dropless import Dropless
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.moe import MoEConfig
from moe_jax.layers.normalization import Norm
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import ComputeDtype
from moe_jax.published import Published, Quantity
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import AdamW, Decayed
from moe_jax.training.rows import Row, chosen

LENGTH, BATCH, VOCABULARY, TOKENS = 1024, 512, 51_200, 10e9


def decoder(layers: int, width: int, learning_rate: float, num_experts: int = 0) -> Experiment:
    """A dense model, or the dMoE of its size; experts have no biases (megablocks' MLP)."""
    return Experiment(
        steps=round(TOKENS / (LENGTH * BATCH)),
        model=DecoderLMConfig(
            vocab_size=VOCABULARY,
            max_length=LENGTH,
            num_layers=layers,
            width=width,
            num_heads=width // 64,
            head_width=64,
            mlp_width=4 * width,
            attention=MultiHead(positions=Positions.NONE, qkv_bias=True, out_bias=True),
            feed_forward=FeedForwardForm(Activation.GELU, bias=True),
            norm=Norm.LAYER,
            norm_epsilon=1e-5,
            num_experts=num_experts or 1,
            moe_every=1 if num_experts else 0,
            moe=MoEConfig(
                router=TopK(losses=Losses(expert_level=0.1)),
                group_size=LENGTH,
                dispatch=Dropless(),
                experts=FeedForwardForm(Activation.GELU),
            ),
            embedding_scaling=EmbeddingScaling.NONE,
            learned_positions=True,
            init_deviation=0.02,
            dtype=ComputeDtype.BFLOAT16,
        ),
        data=TextData(
            dataset="c4",
            domain_feature="",
            tokenizer=Subword(vocab_size=VOCABULARY),
            sequence_length=LENGTH,
            batch_size=BATCH,
        ),
        optimizer=AdamW(
            learning_rate=learning_rate,
            warmup_steps=200,
            decayed=Decayed.MATRICES_AND_TABLES,
        ),
    )


def _dense(size: str, shape: tuple[int, int], learning_rate: float, parameters: str) -> Row:
    return Row(
        f"MegaBlocks' Transformer-{size} (Gale et al. 2023, Table 1).",
        lambda: decoder(*shape, learning_rate),
        published=(Published(Quantity.PARAMETERS, parameters, "Table 1"),),
        note="The dense baseline.",
    )


def _dmoe(size: str, shape: tuple[int, int], learning_rate: float, parameters: str) -> Row:
    return Row(
        f"MegaBlocks' dMoE-{size} (Gale et al. 2023, Table 2).",
        lambda: decoder(*shape, learning_rate, num_experts=64),
        published=(Published(Quantity.PARAMETERS, parameters, "Table 2"),),
    )


# Layers and width.
ROWS = {
    "dense_xs": _dense("XS", (6, 512), 1e-3, "46M"),
    "dense_small": _dense("Small", (12, 768), 6e-4, "125M"),
    "dense_medium": _dense("Medium", (24, 1024), 3e-4, "356M"),
    "dense_large": _dense("Large", (24, 1536), 2.5e-4, "760M"),
    "dense_xl": _dense("XL", (24, 2048), 2e-4, "1316M"),
    "dmoe_xs": _dmoe("XS", (6, 512), 1e-3, "839M"),
    "dmoe_small": _dmoe("Small", (12, 768), 6e-4, "3693M"),
    "dmoe_medium": _dmoe("Medium", (24, 1024), 3e-4, "13041M"),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
