"""What one training step of a config exchanges, multiplies and takes, by layer and part.

    python experiments/profile_step.py --config=configs/quickstart.py [--mesh=data:2,expert:4]
        [--format=table|json] [--output=DIR] [--steps=N]

Compiles the step that the trainer runs and reads the compiled program: the bytes of the results of
collectives by layer, with loops counted as often as they run, and the FLOPs of the matrix products.
Then a few steps run on real data under JAX's profiler, and their time is attributed to the same parts.
--output gets profile.json, profile.png and the trace.
"""

import dataclasses
import functools
import json
import sys
import time
from typing import Any

import jax
from absl import flags
from etils import epath

from moe_jax import command_line
from moe_jax.analysis import figures, profile
from moe_jax.analysis.accounting.families import account
from moe_jax.analysis.hlo import Program
from moe_jax.analysis.profile import ByDirection, Flops
from moe_jax.parallel.mesh import parse_mesh
from moe_jax.training import provenance
from moe_jax.training.run import Run, broadcast_signal

_CONFIG = command_line.define_config()
_MESH = flags.DEFINE_string("mesh", "", "Such as data:2,expert:4; default: the config's.")
_OUTPUT = flags.DEFINE_string("output", "runs/profile", "Folder of the files that are written.")
_STEPS = flags.DEFINE_integer("steps", 3, "Steps under the profiler.", lower_bound=1)
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What stdout gets.")

_INEXACT = (
    "*: not exact, because a loop of unknown length counts as one trip and every branch of a "
    "conditional as taken."
)


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """One training step, on one device.

    Attributes:
      collectives: their results in each layer.
      flops: part -> FLOPs of its matrix products.
      accounting_flops_forward: executed FLOPs of the forward pass by `moe_jax.analysis.accounting`.
      seconds: part -> time in a traced step, mean over devices.
      collective_seconds: part -> how much of it went into collectives, waiting for others included.
      unattributed_seconds: of a traced step, in which no part worked.
      step_seconds: without the profiler.
      traced_step_seconds: with it.
    """

    collectives: list[profile.Traffic]
    flops: dict[str, Flops]
    accounting_flops_forward: float
    seconds: dict[str, ByDirection]
    collective_seconds: dict[str, ByDirection]
    unattributed_seconds: float
    step_seconds: float
    traced_step_seconds: float

    @property
    def parts(self) -> list[str]:
        """Those with time or FLOPs; a part's products may have no time of their own in the trace."""
        return profile.parts_of(self.seconds, self.flops)


def main() -> None:
    """Profiles, writes and prints."""
    config = command_line.experiment(_CONFIG.value)
    config.mesh = parse_mesh(_MESH.value, config.mesh)
    run = Run.build(config)
    output = epath.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    measured = _profile(run, output)
    trace = max(output.glob("plugins/profile/*"))  # Named by time.
    result = {
        **dataclasses.asdict(measured),
        "mesh": dict(run.mesh.shape),
        "steps": _STEPS.value,
        "trace": str(trace),
        "picture": str(output / "profile.png"),
        **provenance.record(),
    }
    title = f"One training step on {provenance.devices()}, mesh {config.mesh}"
    _draw(measured, title, output / "profile.png")
    (output / "profile.json").write_text(json.dumps(result, indent=2) + "\n")
    if _FORMAT.value == "json":
        print(json.dumps(result))
        return
    print(f"{title}\n")
    _print_collectives(measured.collectives)
    _print_parts(measured)
    print(
        f"the same in {output}/profile.json and profile.png; the trace is in {trace}:\n"
        "open perfetto_trace.json.gz at https://ui.perfetto.dev, or the whole by "
        f"`xprof --logdir={output}` (pip install xprof)"
    )


def _profile(run: Run, output: epath.Path) -> StepProfile:
    """Compiles the trainer's step, reads the program, runs and traces it."""
    config = run.config
    # Otherwise a cached program may come with the name scopes of an older version of the code.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    data = config.data.open(config.seed)
    size = config.data.batch_size
    batches = [
        run.put(functools.partial(data.rows, number), size) for number in range(_STEPS.value)
    ]
    with jax.set_mesh(run.mesh):
        state = run.initial_state()
        print("compiling", file=sys.stderr)
        rest = (broadcast_signal(run.mesh, 0), run.hyperparameters)
        compiled = run.train_step.lower(state, batches[0], *rest).compile()

        def steps(state: Any) -> tuple[Any, float]:
            start = time.perf_counter()
            for number, batch in enumerate(batches):
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, metrics = compiled(state, batch, *rest)
                    jax.block_until_ready((state, metrics))
            return state, (time.perf_counter() - start) / len(batches)

        print(
            f"running {3 * len(batches)} steps, the last third under the profiler", file=sys.stderr
        )
        state, _ = steps(state)  # The first calls set up threads and buffers.
        state, step_seconds = steps(state)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Only what devices do is of interest.
        with jax.profiler.trace(output, create_perfetto_trace=True, profiler_options=options):
            state, traced_seconds = steps(state)
    print("reading the program and the trace", file=sys.stderr)
    program = Program(compiled.as_text() or "")
    seconds = {
        name: total / len(batches)
        for name, total in profile.device_seconds(program, output).items()
    }
    counted = account(config.with_group_sizes().model, config.data)
    units = size * config.data.tokens_per_row if counted.unit == "token" else size
    return StepProfile(
        profile.traffic(program, run.mesh.shape),
        profile.flops_by_part(program),
        counted.executed_flops * units / run.mesh.size,
        *profile.time_by_part(program, seconds),
        traced_seconds - sum(seconds.values()),
        step_seconds,
        traced_seconds,
    )


def _draw(measured: StepProfile, title: str, path: epath.Path) -> None:
    results: dict[str, dict[str, float]] = {}
    by_block = [(block, t) for t in measured.collectives for block in t.blocks]
    for block, t in sorted(by_block, key=lambda pair: pair[0]):
        layer = results.setdefault(f"block {block}", {})
        layer[t.collective] = layer.get(t.collective, 0) + t.bytes
    for t in measured.collectives:
        if not t.blocks:
            layer = results.setdefault(t.layer, {})
            layer[t.collective] = layer.get(t.collective, 0) + t.bytes
    nothing = ByDirection(0, 0)
    flops, seconds = {}, {}
    for part in measured.parts:
        time_ = measured.seconds.get(part, nothing)
        products = measured.flops.get(part, nothing)
        waiting = measured.collective_seconds.get(part, nothing)
        flops[part] = products.forward, products.backward
        seconds[part] = (
            time_.forward - waiting.forward,
            time_.backward - waiting.backward,
            waiting.forward + waiting.backward,
        )
    figures.save_step_profile(results, flops, seconds, measured.unattributed_seconds, title, path)


def _print_collectives(traffic: list[profile.Traffic]) -> None:
    """Results of collectives, bytes per step: one line per layer and kind of collective."""
    if not traffic:
        print("no collectives: nothing is sent between devices\n")
        return
    width = max(len(t.layer) for t in traffic)
    print("Results of collectives, bytes per step, on one device:")
    print(f"{'layer':{width}}  {'collective':18}{'over':>12}{'runs':>7}{'bytes':>14}   for")
    for t in traffic:
        mark = " " if t.exact else "*"
        print(
            f"{t.layer:{width}}  {t.collective:18}{' x '.join(t.axes):>12}{t.runs:>7g}"
            f"{t.bytes:>14,.0f}{mark}  {', '.join(t.parts)}"
        )
    print(
        "Of each block alone. What XLA combined into one collective counts as a run in every layer "
        "that it serves."
    )
    if not all(t.exact for t in traffic):
        print(_INEXACT)
    print()


def _print_parts(measured: StepProfile) -> None:
    """FLOPs and time of each part, forward and backward."""
    nothing, no_products = ByDirection(0, 0), Flops(0, 0, exact=True)
    print(f"{'':20}{'MFLOPs':>12}{'':12}{'ms':>12}{'':12}{'of which in':>14}")
    print(
        f"{'part':20}{'forward':>12}{'backward':>12}{'forward':>12}{'backward':>12}"
        f"{'collectives':>14}{'share':>8}"
    )
    for part in measured.parts:
        time_ = measured.seconds.get(part, nothing)
        flops = measured.flops.get(part, no_products)
        waiting = measured.collective_seconds.get(part, nothing)
        share = (time_.forward + time_.backward) / measured.traced_step_seconds
        mark = " " if flops.exact else "*"
        print(
            f"{part:20}{flops.forward / 1e6:12.3f}{flops.backward / 1e6:12.3f}{mark}"
            f"{1e3 * time_.forward:11.3f}{1e3 * time_.backward:12.3f}"
            f"{1e3 * (waiting.forward + waiting.backward):14.3f}{share:8.1%}"
        )
    share = measured.unattributed_seconds / measured.traced_step_seconds
    print(f"{'unattributed':44}{1e3 * measured.unattributed_seconds:12.3f}{'':26}{share:8.1%}")
    forward = sum(both.forward for both in measured.flops.values())
    backward = sum(both.backward for both in measured.flops.values())
    exact = all(both.exact for both in measured.flops.values())
    print(
        f"{'all':20}{forward / 1e6:12.3f}{backward / 1e6:12.3f}{' ' if exact else '*'}"
        f"{1e3 * measured.traced_step_seconds:11.3f}\n"
        f"{'by accounting':20}{measured.accounting_flops_forward / 1e6:12.3f}\n"
        "FLOPs are those of matrix products; waiting for another device counts as time in a "
        "collective."
    )
    if not exact:
        print(_INEXACT)
    print(f"A step takes {1e3 * measured.step_seconds:.3f} ms without the profiler.\n")


if __name__ == "__main__":
    command_line.run(main)
