"""The decoders of "Unified scaling laws for routed language models" (Clark et al. 2022).

    python experiments/train.py --config=configs/clark_2022.py:130m_64e --workdir=runs/130m_64e

GPT-2's shape with Transformer-XL's relative attention (a projection of the sinusoids in each layer, as
large as a projection of queries; its two bias vectors are not counted and not here) and without biases
in the feed-forward layers. Parameters are those of the blocks, without embeddings and final norm; the
authors' public table of runs has them to the last digit. Routed models have experts in every other
block, top-1. 250k steps of 256 sequences of 2,048 tokens (as remembered from the text, with 130B
tokens; the public table has the steps), on MassiveText, which is not public: `c4` stands for it.
Source: https://arxiv.org/abs/2202.01169 and the authors' public table of training curves.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.moe import MoEConfig
from moe_jax.layers.normalization import Norm
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import ComputeDtype, Remat
from moe_jax.published import Published, Quantity
from moe_jax.routing.balanced import BASE, Solver
from moe_jax.routing.capacity import Capacity
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import AdamW
from moe_jax.training.rows import Row, chosen

LENGTH, BATCH, STEPS, VOCABULARY = 2048, 256, 250_000, 32_000


def decoder(
    layers: int, width: int, heads: int, head_width: int, num_experts: int = 0
) -> Experiment:
    """A dense model, or one routed by S-BASE: a Sinkhorn plan in training, the best expert after."""
    return Experiment(
        steps=STEPS,
        model=DecoderLMConfig(
            vocab_size=VOCABULARY,
            max_length=LENGTH,
            num_layers=layers,
            width=width,
            num_heads=heads,
            head_width=head_width,
            mlp_width=4 * width,
            attention=MultiHead(positions=Positions.TRANSFORMER_XL),
            feed_forward=FeedForwardForm(Activation.GELU),
            norm=Norm.LAYER,
            num_experts=num_experts or 1,
            moe_every=2 if num_experts else 0,
            moe=MoEConfig(
                router=BASE(solver=Solver.SINKHORN),
                capacity=Capacity(2.0, 2.0),
                group_size=LENGTH,
                experts=FeedForwardForm(Activation.GELU),
            ),
            accept_leak=True,
            embedding_scaling=EmbeddingScaling.NONE,
            dtype=ComputeDtype.BFLOAT16,
            remat=Remat.FULL,
        ),
        data=TextData(
            dataset="c4",
            domain_feature="",
            tokenizer=Subword(vocab_size=VOCABULARY),
            sequence_length=LENGTH,
            batch_size=BATCH,
        ),
        optimizer=AdamW(learning_rate=2e-4, warmup_steps=1500),
    )


def _row(
    name: str, shape: tuple[int, int, int, int], num_experts: int, parameters: str, loss: str
) -> Row:
    """`parameters` and validation `loss` are those of the public table."""
    model = f"{name} with {num_experts} experts, S-BASE" if num_experts else f"dense {name}"
    column = "total_parameter_count" if num_experts else "dense_parameter_count"
    return Row(
        f"Clark et al. 2022, {model}.",
        lambda: decoder(*shape, num_experts),
        published=(
            Published(Quantity.PARAMETERS_OF_BLOCKS, parameters, f"public table, {column}"),
        ),
        result=f"Validation loss {loss} nats after 250k steps.",
    )


# Layers, width, heads, head width.
_15M, _25M, _55M = (6, 512, 8, 32), (8, 512, 8, 64), (10, 640, 12, 64)
_130M, _370M, _1_3B = (12, 896, 16, 64), (12, 1536, 12, 128), (24, 2048, 16, 128)

ROWS = {
    "15m": _row("15M", _15M, 0, "16527360", "3.162"),
    "15m_8e": _row("15M", _15M, 8, "60579840", "2.986"),
    "15m_64e": _row("15M", _15M, 64, "412987392", "2.756"),
    "15m_512e": _row("15M", _15M, 512, "3232247808", "2.620"),
    "25m": _row("25M", _25M, 0, "27279360", "3.028"),
    "25m_8e": _row("25M", _25M, 8, "86016000", "2.858"),
    "25m_64e": _row("25M", _25M, 64, "555892736", "2.641"),
    "25m_512e": _row("25M", _25M, 512, "4314906624", "2.490"),
    "55m": _row("55M", _55M, 0, "57369600", "2.849"),
    "55m_8e": _row("55M", _55M, 8, "172083200", "2.686"),
    "55m_64e": _row("55M", _55M, 64, "1089766400", "2.494"),
    "55m_512e": _row("55M", _55M, 512, "8431232000", "2.373"),
    "130m": _row("130M", _130M, 0, "132163584", "2.656"),
    "130m_8e": _row("130M", _130M, 8, "401952768", "2.508"),
    "130m_64e": _row("130M", _130M, 64, "2560223232", "2.345"),
    "130m_512e": _row("130M", _130M, 512, "19826386944", "2.237"),
    "370m": _row("370M", _370M, 0, "368123904", "2.463"),
    "370m_8e": _row("370M", _370M, 8, "1160921088", "2.340"),
    "370m_64e": _row("370M", _370M, 64, "7503224832", "2.211"),
    "370m_512e": _row("370M", _370M, 512, "58241654784", "2.135"),
    "1_3b": _row("1.3B", _1_3B, 0, "1308819456", "2.242"),
    "1_3b_8e": _row("1.3B", _1_3B, 8, "4127588352", "2.147"),
    "1_3b_64e": _row("1.3B", _1_3B, 64, "26677542912", "2.054"),
    "1_3b_512e": _row("1.3B", _1_3B, 512, "207077179392", "1.999"),
}


def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
