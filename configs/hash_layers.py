"""Hash Layers (Roller et al. 2021): one feed-forward layer of a dialogue model hashed by token id.

    python experiments/train.py --config=configs/hash_layers.py:reddit_64 --workdir=runs/reddit_64

Published sizes on Reddit are 222M (dense), 751M with 64 modules in one layer and 1.28B with 128. Their
differences fix a module: 63 networks of width 1,024 and 4,096 have 528.5M parameters, 127 have 1.065B.
The depth and the vocabulary of the 222M are not printed in the sources at hand, so there is no
published number to compare with: 16 blocks and 8,008 BPE tokens (BlenderBot's dictionary) are our
guess. Hashes are random and fixed; nothing balances them and no router is trained.

Optimizer: AdamW with a linear decay from 2e-4, our choice. `c4` stands for Reddit. Source:
https://arxiv.org/abs/2106.04426.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.moe import MoEConfig
from moe_jax.layers.normalization import Norm
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import ComputeDtype
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.fixed import HashRouter
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import AdamW
from moe_jax.training.rows import Row, chosen
from moe_jax.training.schedules import Schedule

LENGTH, VOCABULARY = 1024, 8008


def gelu() -> FeedForwardForm:
    return FeedForwardForm(Activation.GELU, bias=True)


def decoder(modules: int) -> Experiment:
    """A model with so many hashed modules in the block in the middle."""
    return Experiment(
        steps=100_000,
        model=DecoderLMConfig(
            vocab_size=VOCABULARY,
            max_length=LENGTH,
            num_layers=16,
            width=1024,
            num_heads=16,
            head_width=64,
            mlp_width=4096,
            attention=MultiHead(positions=Positions.NONE, qkv_bias=True, out_bias=True),
            feed_forward=gelu(),
            norm=Norm.LAYER,
            num_experts=modules,
            moe_every=0,
            moe_at=(7,),
            moe=MoEConfig(
                router=HashRouter(vocab_size=VOCABULARY),
                capacity=Capacity(rule=CapacityRule.NO_DROPS),
                group_size=LENGTH,
                experts=gelu(),
            ),
            embedding_scaling=EmbeddingScaling.NONE,
            learned_positions=True,
            dtype=ComputeDtype.BFLOAT16,
        ),
        data=TextData(
            dataset="c4",
            domain_feature="",
            tokenizer=Subword(vocab_size=VOCABULARY),
            sequence_length=LENGTH,
            batch_size=128,
        ),
        optimizer=AdamW(learning_rate=2e-4, schedule=Schedule.LINEAR, final_fraction=0.0),
    )


ROWS = {
    "reddit_64": Row(
        "Hash Layers on Reddit with 64 modules in one layer (Roller et al. 2021, Table 1).",
        lambda: decoder(64),
        result="Valid perplexity 23.16 against 23.65 of the Switch Transformer of its size (as "
        "remembered).",
    ),
    "reddit_128": Row(
        "Hash Layers on Reddit with 128 modules in one layer (Roller et al. 2021, Table 1).",
        lambda: decoder(128),
        result="Valid perplexity better than the Switch Transformer of its size.",
    ),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
