"""Whole training steps: the trainer's, a bare program's, and what Hugging Face's transformers take.

Axis letters: B batch, L length, T = B * L tokens, E experts, d width.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from moe_jax.analysis.benchmark.rows import Row
from moe_jax.analysis.benchmark.timing import Rounds, interleaved, ratio_quartiles
from moe_jax.analysis.floors import decoder
from moe_jax.analysis.floors.decoder import DecoderShape
from moe_jax.data.pipelines import TextData
from moe_jax.dispatch.dropless import Dropless
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import AdamW
from moe_jax.training.run import Run, broadcast_signal

SHAPES = [DecoderShape(width, experts) for width in (128, 256) for experts in (0, 8)]
OURS, BARE = "moe_jax", "bare jax.numpy"
EAGER, GROUPED = "transformers", "transformers, grouped products"
ROUNDS = Rounds(rounds=15, least_rounds=5, seconds=20.0)

Call = Callable[[], Any]


def measure_steps(shape: DecoderShape, schedule: Rounds) -> Iterator[Row]:
    """Times the programs of one shape in interleaved rounds; float32, AdamW with clipping.

    Args:
      shape: of the decoder.
      schedule: how often programs run.

    Yields:
      One row for each program, or one that says why it was left out.
    """
    case: Row = {
        "width": shape.width,
        "experts": shape.experts,
        "tokens": shape.tokens,
        "length": shape.length,
    }
    calls: dict[str, Call] = {OURS: _ours(shape), BARE: _bare(shape)}
    names = (EAGER, GROUPED) if shape.experts else (EAGER,)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        calls |= {name: _transformers(shape, name == GROUPED) for name in names}
    else:
        reason = "torch and transformers are missing; pip install 'moe_jax[parity]'"
        for name in names:
            yield {"program": name, **case, "left_out": reason}
    for call in calls.values():
        for _ in range(2):  # Compiles; then touches its memory for the first time.
            jax.block_until_ready(call())
    times = interleaved(calls, schedule)
    for name, seconds in times.items():
        lower, median, upper = ratio_quartiles(seconds, times[BARE])
        yield {
            "program": name,
            **case,
            "milliseconds": 1e3 * float(np.nanmedian(seconds)),
            "tokens_per_second": shape.tokens / float(np.nanmedian(seconds)),
            "gigaflops_per_second": shape.flops / float(np.nanmedian(seconds)) / 1e9,
            "ratio_to_bare": median,
            "ratio_to_bare_quartiles": [lower, upper],
            "rounds": int(np.isfinite(seconds).sum()),
        }


def _tokens(shape: DecoderShape) -> np.ndarray:
    """[B, L + 1] int32, random bytes."""
    size = (shape.rows, shape.length + 1)
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.int32)


def _ours(shape: DecoderShape) -> Call:
    """The trainer's own step of a decoder on one device, statistics and router losses included."""
    form = FeedForwardForm(activation=Activation.SILU, gated=True)
    model = DecoderLMConfig(
        num_layers=shape.layers,
        width=shape.width,
        num_heads=shape.heads,
        head_width=shape.head_width,
        mlp_width=shape.mlp_width,
        feed_forward=form,
        vocab_size=shape.vocabulary,
        max_length=shape.length,
        num_experts=shape.experts,
        moe_every=1 if shape.experts else 0,
        moe=MoEConfig(
            router=TopK(k=shape.k, losses=Losses(load_balancing=1e-2)),
            dispatch=Dropless(),
            experts=form,
            group_size=shape.tokens,
        ),
        unroll=True,
    )
    data = TextData(dataset="python_library", sequence_length=shape.length, batch_size=shape.rows)
    run = Run.build(Experiment(steps=1000, model=model, data=data, optimizer=AdamW()))
    batch = {
        name: np.zeros(array.shape, array.dtype) for name, array in data.batch_shapes.items()
    } | {"tokens": _tokens(shape)}
    with jax.set_mesh(run.mesh):
        placed, signals = run.put_batch(batch), broadcast_signal(run.mesh, 0)
        state = [run.initial_state()]

    def call() -> Any:
        with jax.set_mesh(run.mesh):
            state[0], metrics = run.train_step(state[0], placed, signals, run.hyperparameters)
        return metrics["loss"]

    return call


def _bare(shape: DecoderShape) -> Call:
    """`decoder.train_step`."""
    first, step = decoder.train_step(shape)
    state, tokens = [first], jax.numpy.asarray(_tokens(shape))

    def call() -> Any:
        state[0], loss = step(state[0], tokens)
        return loss

    return call


def _transformers(shape: DecoderShape, grouped: bool) -> Call:
    """Llama, or Mixtral with its router loss; by its default kernels or by grouped products."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": shape.length,
        "use_cache": False,
    }
    model: Any
    if shape.experts:
        config = transformers.MixtralConfig(
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.k,
            output_router_logits=True,
            experts_implementation="grouped_mm" if grouped else "eager",
            **sizes,
        )
        model = transformers.MixtralForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    tokens = torch.from_numpy(_tokens(shape)[:, :-1].astype(np.int64))

    def call() -> Any:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return call
