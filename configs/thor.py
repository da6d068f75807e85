"""THOR on IWSLT'14: experts drawn at random, taught to agree (Zuo et al. 2021, arXiv:2110.04260).

    python experiments/prepare_data.py --dataset=translations
    python experiments/train.py --config=configs/thor.py:iwslt --workdir=runs/iwslt

The authors' fairseq script: a Transformer of 6 + 6 layers (width 512, feed-forward width 1024, 4
heads), 2 experts in layers 0, 2 and 4 of each stack, one drawn in each step; two passes with
other draws, alpha 5.0 for their divergence. Adam with betas of 0.9 and 0.98, learning rate 1e-3
falling as 1 / sqrt(step) after 4000 steps, dropout 0.3, label smoothing 0.1, weight decay 1e-4, 8
batches of 4096 tokens a step. Parameters are not
printed.

Unlike there: norms come before the layers, positions are T5's relative ones, a draw in evaluation
is fixed, and the pairs are those of `translations`, because IWSLT's are no package. The
vocabulary (10,000) and the number of steps are fairseq's usual ones.
"""

from moe_jax.data.pairs import PairData
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import FeedForwardForm
from moe_jax.layers.moe import MoEConfig
from moe_jax.layers.normalization import Norm
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.stack import StackConfig
from moe_jax.routing.fixed import DrawnPer, UniformRandom
from moe_jax.tasks.text_to_text import TextToText
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import AdamW
from moe_jax.training.rows import Row, chosen
from moe_jax.training.schedules import Schedule

VOCABULARY = 10_000
LENGTH = 64


def stack() -> StackConfig:
    return StackConfig(
        num_layers=6,
        width=512,
        num_heads=4,
        head_width=128,
        mlp_width=1024,
        attention=MultiHead(positions=Positions.RELATIVE, qkv_bias=True, out_bias=True),
        feed_forward=FeedForwardForm(bias=True),
        norm=Norm.LAYER,
        num_experts=2,
        moe_at=(0, 2, 4),
        moe=MoEConfig(
            UniformRandom(per=DrawnPer.BATCH),
            group_size=8 * LENGTH,
            experts=FeedForwardForm(bias=True),
        ),
        dropout=0.3,
    )


def iwslt() -> Experiment:
    return Experiment(
        steps=50_000,
        model=EncoderDecoderConfig(
            vocab_size=VOCABULARY,
            embedding_scaling=EmbeddingScaling.INPUTS,
            encoder=stack(),
            decoder=stack(),
        ),
        task=TextToText(label_smoothing=0.1, consistency_weight=5.0),
        data=PairData(
            pairs=("de-en",),
            instruction=False,
            tokenizer=Subword(vocab_size=VOCABULARY),
            input_length=LENGTH,
            target_length=LENGTH,
            batch_size=1024,  # 32 tokens each, about.
        ),
        optimizer=AdamW(
            learning_rate=1e-3,
            schedule=Schedule.INVERSE_SQRT,
            warmup_steps=4000,
            b2=0.98,
            weight_decay=1e-4,
            clip_norm=0.0,
        ),
    )


ROWS = {
    "iwslt": Row(
        "THOR on IWSLT'14: experts drawn at random, taught to agree (Zuo et al. 2021, "
        "arXiv:2110.04260).",
        iwslt,
        result="2 BLEU more than Switch Transformers in multilingual translation.",
    ),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
