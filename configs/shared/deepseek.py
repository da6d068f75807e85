"""The decoder that DeepSeekMoE, DeepSeek-V2 and DeepSeek-V3 share: configs/deepseek_*.py have its rows.

SwiGLU, RMSNorm, untied embeddings, fine-grained and shared experts. All weights start normal with
deviation 0.006. Optimizer: AdamW (0.9, 0.95), decay 0.1, clipping at 1, warm-up of 2,000 steps, and
the rate times 0.316 at two points of the run. The corpora are not public; `c4` stands for them.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.dispatch.dropless import Dropless
from moe_jax.layers.attention import AttentionConfig, MultiHead
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.latent_attention import MultiHeadLatent
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import ComputeDtype, Remat
from moe_jax.routing.router import Router
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import AdamW
from moe_jax.training.schedules import Schedule


def swiglu() -> FeedForwardForm:
    return FeedForwardForm(Activation.SILU, gated=True)


def decoder(
    layers: int,
    width: int,
    heads: int,
    *,
    router: Router,
    routed: int,
    shared: int,
    expert_width: int,
    dense_first: int = 1,
    dense_width: int,
    attention: AttentionConfig | None = None,
    vocab_size: int = 102_400,
    length: int = 4096,
    batch_tokens: float,
    tokens: float,
    learning_rate: float,
    decay_at: tuple[float, ...] = (0.8, 0.9),
) -> Experiment:
    """A model of the family.

    Args:
      layers, width, heads: of the paper's table.
      router: with its losses.
      routed, shared, expert_width: the experts of a MoE layer, all of one width.
      dense_first, dense_width: so many blocks at the start have a dense layer of this width.
      attention: multi-head with rotary positions by default.
      vocab_size, length: V and the training context.
      batch_tokens, tokens: of a batch, and of the run.
      learning_rate: at the peak.
      decay_at: fractions of the run at which the rate goes down.
    """
    batch_size = round(batch_tokens / length)
    return Experiment(
        steps=round(tokens / (batch_size * length)),
        model=DecoderLMConfig(
            vocab_size=vocab_size,
            max_length=length,
            num_layers=layers,
            width=width,
            num_heads=heads,
            head_width=128,
            mlp_width=dense_width,
            expert_width=expert_width,
            attention=attention or MultiHead(),
            feed_forward=swiglu(),
            num_experts=routed,
            moe_every=0,
            moe_at=tuple(range(dense_first, layers)),
            moe=MoEConfig(
                router=router,
                group_size=length,
                dispatch=Dropless(),
                experts=swiglu(),
                shared_experts=shared,
            ),
            tied=False,
            embedding_scaling=EmbeddingScaling.NONE,
            init_deviation=0.006,
            dtype=ComputeDtype.BFLOAT16,
            remat=Remat.FULL,
        ),
        data=TextData(
            dataset="c4",
            domain_feature="",
            tokenizer=Subword(vocab_size=vocab_size),
            sequence_length=length,
            batch_size=batch_size,
        ),
        optimizer=AdamW(
            learning_rate=learning_rate,
            schedule=Schedule.STEPS,
            warmup_steps=2000,
            decay_at=decay_at,
        ),
    )


def latent(query_rank: int) -> MultiHeadLatent:
    """DeepSeek-V2's and V3's attention; `query_rank` 0 for uncompressed queries (V2-Lite)."""
    return MultiHeadLatent(query_rank=query_rank, kv_rank=512)
