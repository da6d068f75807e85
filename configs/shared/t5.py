"""Shapes and pre-training of T5, which Switch, ST-MoE, sparse upcycling and T5X's ladder build on.

The corpus is C4 as TFDS prepares it; `--config.data.dataset` names another. Its tokens are
learned anew: T5's SentencePiece vocabulary has 32,000 pieces and 100 sentinels, in a table of
32,128 rows.

Activations are bfloat16, parameters and routers float32 (Switch, section 2.4: selective precision).

Attention divides its scores by sqrt(head width) and T5's does not, but starts with queries
smaller by that factor: the same function, and under Adafactor, whose updates are relative, the
same training.
"""

import dataclasses

from moe_jax.data.span_corruption import SpanCorruptionData
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.stack import ComputeDtype, SparseDense, StackConfig
from moe_jax.tasks.text_to_text import TextToText
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import Adafactor

VOCABULARY = 32_128
INPUT_LENGTH, TARGET_LENGTH = 512, 114  # Span corruption makes the second of the first.
BATCH = 2048  # Of 512 inputs: 2^20 tokens.
STEPS = 550_000


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of the encoder, and of the decoder."""

    width: int
    mlp_width: int
    num_heads: int
    num_layers: int
    gated: bool = False
    head_width: int = 64

    def form(self) -> FeedForwardForm:
        """Gated with GELU, or not gated with ReLU."""
        return FeedForwardForm(Activation.GELU if self.gated else Activation.RELU, self.gated)


# T5 v1.0 (Raffel et al. 2020) and v1.1 (Shazeer 2020).
BASE = Shape(768, 3072, 12, 12)
LARGE = Shape(1024, 4096, 16, 24)
BASE_V1_1 = Shape(768, 2048, 12, 12, gated=True)
LARGE_V1_1 = Shape(1024, 2816, 16, 24, gated=True)
XL_V1_1 = Shape(2048, 5120, 32, 24, gated=True)
XXL_V1_1 = Shape(4096, 10240, 64, 24, gated=True)


def dense_stack(shape: Shape) -> StackConfig:
    return StackConfig(
        num_layers=shape.num_layers,
        width=shape.width,
        num_heads=shape.num_heads,
        head_width=shape.head_width,
        mlp_width=shape.mlp_width,
        attention=MultiHead(positions=Positions.RELATIVE),
        feed_forward=shape.form(),
        moe_every=0,
        moe=MoEConfig(group_size=1024),  # Nothing is routed, unless a flag asks for experts.
        dtype=ComputeDtype.BFLOAT16,
    )


def sparse_stack(
    shape: Shape,
    num_experts: int,
    moe_every: int,
    moe: MoEConfig,
    sparse_dense: SparseDense = SparseDense.NONE,
    init_scale: float = 0.1,
) -> StackConfig:
    return dataclasses.replace(
        dense_stack(shape),
        num_experts=num_experts,
        moe_every=moe_every,
        moe=dataclasses.replace(moe, experts=shape.form()),
        sparse_dense=sparse_dense,
        init_scale=init_scale,
    )


def whole_rows(group_size: int) -> int:
    """The largest group of whole targets: groups of 8192 tokens would not divide 2048 * 114."""
    rows = 1
    while 2 * rows * TARGET_LENGTH <= group_size:
        rows *= 2
    return rows * TARGET_LENGTH


def span_corruption(
    encoder: StackConfig, decoder: StackConfig, *, tied: bool, steps: int = STEPS
) -> Experiment:
    """Pre-training on C4, without dropout; 15% of the text in spans of 3 tokens."""
    return Experiment(
        steps=steps,
        model=EncoderDecoderConfig(
            vocab_size=VOCABULARY,
            tied=tied,
            embedding_scaling=EmbeddingScaling.LOGITS if tied else EmbeddingScaling.NONE,
            encoder=encoder,
            decoder=decoder,
        ),
        task=TextToText(),
        data=SpanCorruptionData(
            dataset="c4",
            domain_feature="",
            tokenizer=Subword(vocab_size=VOCABULARY, extra_ids=100),
            input_length=INPUT_LENGTH,
            batch_size=BATCH,
        ),
        optimizer=Adafactor(),
    )
