"""Mixtral (Jiang et al. 2024): grouped-query attention, SwiGLU, 8 experts of which a token visits 2.

    python experiments/train.py --config=configs/mixtral.py:8x7b --topology=v5p:4x4x8 --workdir=runs/8x7b

The training recipe is not published: the optimizer, batch and number of tokens here are
placeholders of the size that is usual for such models, and say nothing of the paper's. Source:
https://arxiv.org/abs/2401.04088 and mistral.ai/news/mixtral-8x22b.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.dispatch.dropless import Dropless
from moe_jax.layers.attention import MultiHead
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import ComputeDtype, Remat
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.published import Published, Quantity
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import AdamW
from moe_jax.training.rows import PodLayout, Row, chosen

LENGTH = 4096


def swiglu() -> FeedForwardForm:
    return FeedForwardForm(Activation.SILU, gated=True)


def decoder(
    layers: int, width: int, heads: int, mlp_width: int, vocab_size: int, max_length: int
) -> Experiment:
    """A model of the family, with 8 heads of keys and values and 8 experts in every block."""
    return Experiment(
        steps=100_000,
        model=DecoderLMConfig(
            vocab_size=vocab_size,
            max_length=max_length,
            num_layers=layers,
            width=width,
            num_heads=heads,
            head_width=128,
            mlp_width=mlp_width,
            attention=MultiHead(kv_heads=8, rotary_base=1e6, norm_epsilon=1e-5),
            feed_forward=swiglu(),
            norm_epsilon=1e-5,
            num_experts=8,
            moe_every=1,
            moe=MoEConfig(
                router=TopK(k=2, renormalize=True, losses=Losses(load_balancing_all_choices=0.02)),
                group_size=LENGTH,
                dispatch=Dropless(),
                experts=swiglu(),
            ),
            tied=False,
            embedding_scaling=EmbeddingScaling.NONE,
            init_deviation=0.02,
            dtype=ComputeDtype.BFLOAT16,
            remat=Remat.FULL,
        ),
        data=TextData(
            dataset="c4",
            domain_feature="",
            tokenizer=Subword(vocab_size=vocab_size),
            sequence_length=LENGTH,
            batch_size=1024,
        ),
        optimizer=AdamW(learning_rate=3e-4, warmup_steps=2000),
    )


ROWS = {
    "8x7b": Row(
        "Mixtral 8x7B (Jiang et al. 2024, Table 1).",
        lambda: decoder(32, 4096, 32, 14336, 32_000, 32_768),
        published=(
            Published(Quantity.PARAMETERS, "46.7B", "mistral.ai/news/mixtral-of-experts"),
            Published(Quantity.ACTIVATED, "12.9B", "mistral.ai/news/mixtral-of-experts"),
            Published(Quantity.PARAMETERS, "47B", "section 1"),
            Published(Quantity.ACTIVATED, "13B", "section 1"),
        ),
        result="MMLU 70.6, above LLaMA2 70B on most benchmarks with 13B active parameters.",
        cost="MaxText reports 52.6% MFU on TPU v5p.",
        pods=(
            PodLayout(
                "v5p:4x4x8",
                MeshConfig(data=16, expert=8),
                {"model.moe.dispatch.buffer_factor": 2.0},
                note="the machine is that of MaxText's figure, batch and optimizer are not "
                "published; buffers have room for twice as many rows as at balance",
            ),
            PodLayout(
                "h100:16x8",
                MeshConfig(data=16, expert=8),
                {"microbatches": 2, "model.moe.dispatch.buffer_factor": 2.0},
                note="nothing is published of the machine, batch and optimizer; buffers have room for "
                "twice as many rows as at balance",
            ),
        ),
    ),
    "8x22b": Row(
        "Mixtral 8x22B (Mistral AI 2024).",
        lambda: decoder(56, 6144, 48, 16384, 32_768, 65_536),
        published=(
            Published(Quantity.PARAMETERS, "141B", "mistral.ai/news/mixtral-8x22b"),
            Published(Quantity.ACTIVATED, "39B", "mistral.ai/news/mixtral-8x22b"),
        ),
        result="MMLU 77.8.",
        note="Shape of the model's config.json: 56 layers, width 6,144, 48 heads, 16,384 wide "
        "experts, vocabulary 32,768, context 65,536.",
        pods=(
            PodLayout(
                "v5p:4x8x8",
                MeshConfig(data=32, expert=8),
                {"model.moe.dispatch.buffer_factor": 2.0},
                note="nothing is published of the machine, batch and optimizer; buffers have room "
                "for twice as many rows as at balance",
            ),
        ),
    ),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
