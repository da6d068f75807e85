"""DeepSeek-V3 (DeepSeek-AI 2024, sections 2.1 and 4.2).

    python experiments/train.py --config=configs/deepseek_v3.py:v3 --workdir=runs/v3

Sigmoid scores, an expert bias that moves by 0.001 a step in place of a balancing loss (a sequence-wise
loss of 1e-4 stays), 4 of 8 groups of experts for each token, gates renormalized and times 2.5.
Dropless. The multi-token-prediction module is not here; the published 671B are without it. The run is
bf16 where the paper's products are FP8. Batches grow from 3,072 to 15,360 sequences (here 15,360);
the rate stays for 10T tokens, falls by a cosine and two steps; STEPS is the nearest schedule here. The
bias rate is 0 for the last 500B tokens in the paper. What all DeepSeek models share is in
configs/shared/deepseek.py. Source: https://arxiv.org/abs/2412.19437.
"""

from configs.shared.deepseek import decoder, latent
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.published import Published, Quantity
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.training.experiment import Experiment
from moe_jax.training.rows import PodLayout, Row, chosen


def full() -> Experiment:
    """671B."""
    return decoder(
        61,
        7168,
        128,
        router=DeepSeekV3(),
        routed=256,
        shared=1,
        expert_width=2048,
        dense_first=3,
        dense_width=18432,
        attention=latent(1536),
        vocab_size=129_280,
        batch_tokens=15360 * 4096,
        tokens=14.8e12,
        learning_rate=2.2e-4,
        decay_at=(0.68, 0.97),
    )


ROWS = {
    "v3": Row(
        "DeepSeek-V3, 671B (DeepSeek-AI 2024, section 4.2).",
        full,
        published=(
            Published(Quantity.PARAMETERS, "671B", "section 4.2"),
            Published(
                Quantity.ACTIVATED_WITHOUT_INPUT,
                "37B",
                "section 4.2",
                note="37.55B with the input embedding",
            ),
        ),
        result="MMLU 87.1, 14.8T tokens.",
        cost="2,048 H800, 2.788M GPU hours in all (2.664M for pre-training), about 5.6M dollars.",
        pods=(
            PodLayout(
                "v5p:8x8x16",
                MeshConfig(data=16, expert=64),
                {"microbatches": 15, "model.moe.dispatch.buffer_factor": 1.25},
                note="the paper trained on 2,048 H800 GPUs, in FP8 and with pipeline parallelism; "
                "buffers have room for a quarter more rows than at balance, where the paper drops "
                "nothing",
            ),
            PodLayout(
                "h800:256x8",
                MeshConfig(data=16, expert=64, model=2),
                {"microbatches": 15, "model.moe.dispatch.buffer_factor": 1.25},
                note="the paper's machine, but in bfloat16 and without pipeline parallelism; buffers have "
                "room for a quarter more rows than at balance, where the paper drops nothing",
            ),
        ),
    ),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
