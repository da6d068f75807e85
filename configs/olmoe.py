"""OLMoE's decoder (Muennighoff et al. 2024, Table 10): 64 experts of which a token visits 8.

    python experiments/train.py --config=configs/olmoe.py:1b_7b --workdir=runs/1b_7b

5.13T tokens are 1.3 epochs of DCLM-Baseline and Dolma; `c4` stands for them. Initialization: normal
with deviation 0.02 cut at three (here at two). Rate: 4e-4 by a cosine to 10%, then 100B tokens to 0;
weight decay on everything. Vocabulary: 50,280 padded to 50,304. Source:
https://arxiv.org/abs/2409.02060 and the config in allenai/OLMoE.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.dispatch.dropless import Dropless
from moe_jax.layers.attention import MultiHead, QKNorm
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
from moe_jax.training.optimizers import AdamW, Decayed
from moe_jax.training.rows import PodLayout, Row, chosen

LENGTH, BATCH, TOKENS = 4096, 1024, 5.13e12


def swiglu() -> FeedForwardForm:
    return FeedForwardForm(Activation.SILU, gated=True)


def decoder() -> Experiment:
    """1B-7B."""
    tokens_per_batch = LENGTH * BATCH
    return Experiment(
        steps=round(TOKENS / tokens_per_batch),
        model=DecoderLMConfig(
            vocab_size=50_304,
            max_length=LENGTH,
            num_layers=16,
            width=2048,
            num_heads=16,
            head_width=128,
            mlp_width=1024,
            attention=MultiHead(qk_norm=QKNorm.FULL, norm_epsilon=1e-5),
            feed_forward=swiglu(),
            norm_epsilon=1e-5,
            num_experts=64,
            moe_every=1,
            moe=MoEConfig(
                router=TopK(k=8, losses=Losses(expert_level=1e-2, router_z=1e-3)),
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
            tokenizer=Subword(vocab_size=50_280),
            sequence_length=LENGTH,
            batch_size=BATCH,
        ),
        optimizer=AdamW(
            learning_rate=4e-4,
            warmup_steps=round(10.5e9 / tokens_per_batch),
            cooldown_steps=round(100e9 / tokens_per_batch),
            decayed=Decayed.ALL,
        ),
    )


ROWS = {
    "1b_7b": Row(
        "OLMoE-1B-7B (Muennighoff et al. 2024, Table 10).",
        decoder,
        published=(
            Published(Quantity.PARAMETERS, "6.9B", "Table 10"),
            Published(Quantity.ACTIVATED, "1.3B", "Table 10"),
        ),
        result="MMLU 54.1 after 5.13T tokens, above DeepSeekMoE-16B's 46.2.",
        cost="256 H100 for about 10 days.",
        pods=(
            PodLayout(
                "h100:8x8",
                MeshConfig(data=8, expert=8),
                note="the paper trained on 256 H100, each of which gathered all experts",
            ),
        ),
    ),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
