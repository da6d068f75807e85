"""BASE layers (Lewis et al. 2021, sections 3 and 4): balanced assignment in place of a balancing loss.

    python experiments/train.py --config=configs/base_layers.py:base_x1 --workdir=runs/base_x1

24 blocks of width 2,048 with ReLU; one extra layer after block 12 whose experts, one for each of 128
GPUs, are stacks of 10 residual feed-forward networks. The dense layers are 8,096 wide in the text (a
slip for 8,192 that the counts do not resolve). Output: x + sigmoid(n w) f(n), where n is x normalized
as in all our blocks and f the residual stack; the paper's reads x itself. In evaluation experts have
room for twice the mean load, where the paper's greedy choice drops nothing.

Optimizer: Adam, warm-up of 2,000 steps, linear decay, rate 7.5e-5 (tuned over 5e-5, 7.5e-5, 1e-4),
clipping at 0.1 by the norm of the shared parameters; 2 sequences of 1,024 tokens per GPU, 8
accumulated. Data: RoBERTa's and CC100's English, 100B tokens (`c4` stands for it). The paper's GPT
vocabulary is 51,200. Source: https://arxiv.org/abs/2103.16716.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.moe import MoEConfig
from moe_jax.layers.normalization import Norm
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import ComputeDtype, SparseDense
from moe_jax.published import Published, Quantity
from moe_jax.routing.balanced import BASE
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.losses import Losses
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import AdamW
from moe_jax.training.rows import Row, chosen
from moe_jax.training.schedules import Schedule

LENGTH, GPUS, ACCUMULATED, VOCABULARY = 1024, 128, 8, 51_200
SEQUENCES = 2 * GPUS
WIDTH, MLP_WIDTH = 2048, 8096


def relu() -> FeedForwardForm:
    return FeedForwardForm(Activation.RELU, bias=True)


def _decoder(
    router: Router,
    *,
    moe_at: tuple[int, ...],
    expert_layers: int,
    expert_width: int,
    sparse_dense: SparseDense,
) -> Experiment:
    batch_size = SEQUENCES * ACCUMULATED
    return Experiment(
        steps=round(100e9 / (batch_size * LENGTH)),
        microbatches=ACCUMULATED,
        model=DecoderLMConfig(
            vocab_size=VOCABULARY,
            max_length=LENGTH,
            num_layers=24,
            width=WIDTH,
            num_heads=16,
            head_width=WIDTH // 16,
            mlp_width=MLP_WIDTH,
            expert_width=expert_width,
            attention=MultiHead(positions=Positions.NONE, qkv_bias=True, out_bias=True),
            feed_forward=relu(),
            norm=Norm.LAYER,
            norm_epsilon=1e-5,
            num_experts=GPUS,
            moe_every=0,
            moe_at=moe_at,
            moe=MoEConfig(
                router=router,
                capacity=Capacity(1.0, 2.0),
                group_size=SEQUENCES * LENGTH // GPUS,
                experts=relu(),
                expert_layers=expert_layers,
            ),
            sparse_dense=sparse_dense,
            accept_leak=True,
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
            batch_size=batch_size,
        ),
        optimizer=AdamW(
            learning_rate=7.5e-5,
            schedule=Schedule.LINEAR,
            final_fraction=0.0,
            warmup_steps=2000,
            clip_norm=0.1,
            clip_excludes_experts=True,
        ),
    )


def base() -> Experiment:
    """BASE x 1: after block 12 (its dense layer stays: a sparse-dense block) a layer of experts."""
    return _decoder(
        BASE(),
        moe_at=(11,),
        expert_layers=10,
        expert_width=4 * WIDTH,
        sparse_dense=SparseDense.BEFORE,
    )


def switch() -> Experiment:
    """The paper's Switch baseline: 128 experts in every other block from the second on."""
    return _decoder(
        TopK(losses=Losses(load_balancing=0.01)),
        moe_at=tuple(range(1, 24, 2)),
        expert_layers=1,
        expert_width=MLP_WIDTH,
        sparse_dense=SparseDense.NONE,
    )


ROWS = {
    "base_x1": Row(
        "BASE x 1, 44B (Lewis et al. 2021, section 4.1).",
        base,
        published=(
            Published(Quantity.PARAMETERS, "44B", "section 4.1"),
            Published(
                Quantity.PARAMETERS,
                "44.4B",
                "section 4.5",
                note="erratum: 44.25B of the printed sizes, which also say 44B; the text has both",
            ),
        ),
        result="Better validation perplexity after 2.5 days than dense models and than sparsely "
        "gated MoE and Switch on the same GPUs.",
        cost="128 V100 of 32 GB, about 2.5 days.",
    ),
    "switch": Row(
        "Switch as BASE's baseline, 52.5B (Lewis et al. 2021, section 4.3).",
        switch,
        published=(
            Published(
                Quantity.PARAMETERS,
                "52.5B",
                "section 4.3",
                note="not reproduced: 51.9B with experts of 8,096 in 12 blocks; 52.4B with 8,192",
            ),
        ),
        cost="128 V100 of 32 GB, about 2.5 days.",
        note="128 experts in every other block.",
    ),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
