"""Compiles the training step of a config for a machine that need not be here, and says what it costs.

    python experiments/compile_pod.py --config=configs/glam/64b_64e.py --topology=v4:8x8x16
        [--mesh=data:32,expert:8,model:4] [--format=table|json] [--search [--search_limit=12]]

The step is the trainer's own, at the config's global batch; its state is abstract. TPU topologies are
compiled by libtpu (make install EXTRA=tpu) on any Linux x86-64 host, which takes a minute or several.
Machines have the compiler's names (v4:8x8x16 chips), Google Cloud's (tpu-v4-2048, by cores), and
gpu-h100-64; 2*tpu-v5e-256 are two slices. Without --topology and --mesh the config's own are used.

--search tries meshes, remat policies and microbatches, ranks them, and keeps results in
~/.cache/moe_jax/pods, so that it goes on where it was stopped.

libtpu compiles with its defaults; export LIBTPU_INIT_ARGS="$(python -m moe_jax.pods.xla_flags NAME)" first
to compile with the flags of the launchers.

Exit status: 0 the step fits; 2 it does not, and the report is on stdout, or a flag is wrong, and stdout is
empty.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import config_flags
from tqdm import tqdm

from moe_jax import command_line
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import parse_mesh
from moe_jax.pods.compile import compile_step, refusal_sentence, stand_in_sentence
from moe_jax.pods.hardware import Topology, topology
from moe_jax.pods.layouts import PodLayout, changes_between, laid_out, pods_of
from moe_jax.pods.report import GIB, PodReport
from moe_jax.pods.search import search
from moe_jax.training.experiment import Experiment

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "Such as v4:8x8x16, tpu-v4-2048, 2*v5e:16x16; default: the config's first."
)
_MESH = flags.DEFINE_string("mesh", "", "Such as data:32,expert:8; default: the config's.")
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What stdout gets.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, remat policies and microbatches.")
_SEARCH_LIMIT = flags.DEFINE_integer("search_limit", 12, "Compilations at most.", lower_bound=1)

_CACHE = epath.Path("~/.cache/moe_jax/pods").expanduser()


def main() -> None:
    """Compiles and reports.

    Raises:
      UserError: the machine, the mesh or the config is wrong, or the step does not fit.
    """
    config = command_line.experiment(_CONFIG.value)
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    layouts = pods_of(name)
    if not _TOPOLOGY.value and not layouts:
        raise UserError(f"--topology is not given and {name} names none; give one.")
    machine = topology(_TOPOLOGY.value or layouts[0].topology)
    if _SEARCH.value:
        reports = _search(config, layouts, machine, name)
        print(json.dumps([one.as_json() for one in reports]) if _json() else ranking(reports))
        best = reports[0]
    else:
        laid, note = laid_out(config, layouts, machine.code, _MESH.value)
        changes = changes_between(config, laid)
        if not _json():
            print(f"compiling for {machine.name}, mesh {laid.mesh}", file=sys.stderr)
        best = compile_step(laid, machine, name=name, note=note, changes=changes)
        print(json.dumps(best.as_json()) if _json() else table(best))
    if not best.fits:
        raise UserError(refusal_sentence(best))


def _json() -> bool:
    return _FORMAT.value == "json"


def _search(
    config: Experiment, layouts: Sequence[PodLayout], machine: Topology, name: str
) -> list[PodReport]:
    if any(topology(layout.topology) == machine for layout in layouts):
        config, _ = laid_out(config, layouts, machine.code)
    only = parse_mesh(_MESH.value, config.mesh) if _MESH.value else None
    with tqdm(total=_SEARCH_LIMIT.value, unit="layout") as bar:

        def tried(report: PodReport, compiled: bool) -> None:
            bar.update(compiled)
            fate = _seconds(report) if report.fits else "does not fit"
            bar.write(f"{_layout(report)}: {fate}", file=sys.stderr)

        return search(config, machine, name, _CACHE, _SEARCH_LIMIT.value, tried, only)


def _layout(report: PodReport) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    changes = ", ".join(f"{path}={value}" for path, value in report.changes.items())
    return f"{mesh}{f' ({changes})' if changes else ''}"


def _seconds(report: PodReport) -> str:
    return f"{report.roofline.step_seconds:.4g} s" if report.roofline else ""


def ranking(reports: list[PodReport]) -> str:
    """Layouts that were tried, the best first."""
    lines = [f"{'HBM GiB':>8}{'fits':>6}{'step':>10}{'MFU':>7}  {'bound by':14}layout"]
    for one in reports:
        line = one.roofline
        lines.append(
            f"{one.hbm.total / GIB:8.1f}{'yes' if one.fits else 'no':>6}"
            + (
                f"{line.step_seconds:9.4g}s{line.mfu:7.1%}  {line.binding:14}"
                if line
                else f"{'':10}{'':7}  {'':14}"
            )
            + _layout(one)
        )
    if reports[0].fits:
        lines.append(f"best: {_layout(reports[0])}")
    return "\n".join(lines)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.3g}" if flops < 1e15 else f"{flops / 1e12:,.0f}"


def table(report: PodReport) -> str:
    """The report as a person reads it."""
    memory, line = report.hbm, report.roofline
    verdict = "fits" if report.fits else f"{memory.missing / GIB:.2f} GiB too few"
    lines = [
        f"{report.config} on {report.hardware} ({report.topology}): {report.chips} chips, "
        f"{report.devices} devices",
        f"mesh {_layout(report)}; compiled by {report.compiler} in {report.compile_seconds:.0f} s",
        f"{report.params / 1e9:,.3g}B parameters in {report.parameter_dtype}, {report.optimizer}; "
        f"{report.rows_per_step:,} rows, {report.tokens_per_step:,} {report.unit}s a step",
        "",
        f"Memory of a device, GiB: {memory.total / GIB:.2f} of {memory.capacity / GIB:.2f}, {verdict}",
        *(
            f"  {name:28}{value / GIB:10.3f}"
            for name, value in (
                ("arguments", memory.arguments),
                ("  of them parameters", memory.parameters),
                ("  of them optimizer state", memory.optimizer_state),
                ("outputs not aliased", memory.outputs - memory.aliased),
                ("temporaries", memory.temporaries or 0),
                ("program", memory.program),
            )
        ),
    ]
    if report.note:
        lines += ["", f"Note: {report.note}."]
    if report.compiled_for == "cpu":
        lines += ["", stand_in_sentence(report.hardware)]
    if line is None:
        return "\n".join(lines)
    seconds = dataclasses.asdict(line)
    lines += [
        "",
        f"TFLOPs of a device a step: {_tera(report.flops_per_device)} executed "
        f"({_tera(report.accounted_flops_per_device)} by accounting), "
        f"{_tera(report.algorithmic_flops_per_device)} algorithmic",
        "",
        f"{'collective':20}{'over':>22}{'runs':>8}{'GiB':>10}{'ms':>10}",
        *(
            f"{one.kind:20}{' x '.join(one.axes):>22}{one.count:8}{one.bytes / GIB:10.3f}"
            f"{1e3 * one.seconds:10.3f}{'' if one.exact else '*'}"
            for one in report.collectives
        ),
        "",
        "Roofline, seconds a step if each were all: "
        + ", ".join(
            f"{name} {seconds[name]:.4g}"
            for name in ("compute", "memory", "interconnect", "network")
        ),
        f"If all overlap, a step takes {line.step_seconds:.4g} s ({line.binding}): MFU {line.mfu:.1%}, "
        f"{line.mfu_without_overlap:.1%} if nothing overlaps; "
        f"{line.tokens_per_second_per_chip:,.0f} {report.unit}s/s for each chip",
    ]
    if not report.exact:
        lines.append(
            "Not exact: a loop of unknown length counts as one trip, a branch as taken (*)."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
