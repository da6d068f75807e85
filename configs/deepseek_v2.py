"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024, sections 3.1.2 and B.1).

    python experiments/train.py --config=configs/deepseek_v2.py:v2_lite --workdir=runs/v2_lite

Device-limited routing over D = 8 devices with M = 3 per token; expert-level, device-level and
communication losses of 0.003, 0.05 and 0.02. The paper also drops tokens per device at capacity
factor 1 in training and keeps 10% of the sequences whole; that is not done here: dispatch is dropless.
8.1T tokens; batches grow from 2,304 to 9,216 sequences over the first 225B (here 9,216 throughout).
What all DeepSeek models share is in configs/shared/deepseek.py. Source:
https://arxiv.org/abs/2405.04434.
"""

from configs.shared.deepseek import decoder, latent
from moe_jax.published import Published, Quantity
from moe_jax.routing.deepseek import DeepSeekV2
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Experiment
from moe_jax.training.rows import Row, chosen


def full() -> Experiment:
    """236B."""
    losses = Losses(
        expert_level=0.003, device_level=0.05, communication=0.02, devices=8, devices_per_token=3
    )
    return decoder(
        60,
        5120,
        128,
        router=DeepSeekV2(k=6, losses=losses),
        routed=160,
        shared=2,
        expert_width=1536,
        dense_width=12288,
        attention=latent(1536),
        batch_tokens=9216 * 4096,
        tokens=8.1e12,
        learning_rate=2.4e-4,
        decay_at=(0.6, 0.9),
    )


def lite() -> Experiment:
    """15.7B, without device limit and communication loss: each layer's experts are on one device."""
    return decoder(
        27,
        2048,
        16,
        router=TopK(k=6, losses=Losses(expert_level=0.001)),
        routed=64,
        shared=2,
        expert_width=1408,
        dense_width=10944,
        attention=latent(0),
        batch_tokens=4608 * 4096,
        tokens=5.7e12,
        learning_rate=4.2e-4,
    )


ROWS = {
    "v2": Row(
        "DeepSeek-V2, 236B (DeepSeek-AI 2024, section 3.1.2).",
        full,
        published=(
            Published(Quantity.PARAMETERS, "236B", "section 3.1.2"),
            Published(Quantity.ACTIVATED, "21B", "section 3.1.2"),
        ),
        result="MMLU 78.5; 93.3% less KV cache than DeepSeek 67B, 5.76 times its generation "
        "throughput.",
        cost="172.8K H800 hours for a trillion tokens, 42.5% less than DeepSeek 67B.",
    ),
    "v2_lite": Row(
        "DeepSeek-V2-Lite, 15.7B (DeepSeek-AI 2024, appendix B.1).",
        lite,
        published=(
            Published(Quantity.PARAMETERS, "15.7B", "appendix B.1"),
            Published(
                Quantity.ACTIVATED_WITHOUT_INPUT,
                "2.4B",
                "appendix B.1",
                note="not reproduced: 2.451B, which rounds to 2.5B; with the input embedding 2.66B",
            ),
        ),
        result="MMLU 58.3 after 5.7T tokens.",
        note="Activated parameters are counted without the input embedding here and with it for V2.",
    ),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
