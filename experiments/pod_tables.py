"""Writes the page of the published giants on their machines, docs/pods.md, and makes its numbers.

    python experiments/pod_tables.py                              the page and its picture, from the reports
    python experiments/pod_tables.py --compile [--only=configs/glam.py:64b_64e ...]
    .venv-gpu/bin/python experiments/pod_tables.py --compile --gpus [--only=configs/mixtral.py:8x7b ...]

The reports are in docs/results/pods, in a folder for each version of a compiler, and are the budgets
of `make test-pods` and `make test-gpu`. --compile makes those that are not there yet with the compiler
that is installed, in two processes at a time; each takes 1 to 15 minutes of a core. `rm` one to have it
made anew.
"""

import concurrent.futures
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable

from absl import flags
from etils import epath
from tqdm import tqdm

from moe_jax import command_line
from moe_jax.analysis import pod_figures
from moe_jax.errors import UserError
from moe_jax.pods import budgets, published_speeds
from moe_jax.pods.compile import compiler_version
from moe_jax.pods.hardware import GPU_COMPILER
from moe_jax.pods.report import GIB, PodReport

_COMPILE = flags.DEFINE_bool("compile", False, "Make the reports that are missing.")
_GPUS = flags.DEFINE_bool("gpus", False, "Make those for GPUs; default: for TPUs.")
_ONLY = flags.DEFINE_multi_string("only", [], "Configs to compile; default: all giants.")

_ROOT = pathlib.Path(__file__).parents[1]
PAGE = _ROOT / "docs/pods.md"
PICTURE = budgets.RESULTS / "giants.png"

HEAD = """\
# Published giants on their machines

Each row is the training step that `train.py` runs, compiled for the whole machine on a host without
TPUs or GPUs, by libtpu or by XLA's plugin for CUDA: the global batch, length and optimizer that are
published (Mixtral publishes none of them), parameters and optimizer state in the dtypes that are named.
`experiments/compile_pod.py --config=FILE [--topology=MACHINE]` makes a row anew in some minutes and says
more of it; `make test-pods` holds four rows to these numbers, `make test-gpu` one. libtpu has its defaults
here; the launchers' flags may change memory a little. Rows of GPUs are compiled with these flags.

- HBM: of a device, all that the step needs, and what the compiler lets it have, or what JAX takes of a GPU:
  three quarters of its memory. (`--memory_fraction=0.9` of compile_pod.py says how 90% would do, which JAX
  takes with XLA_CLIENT_MEM_FRACTION=0.9.)
- TFLOPs: what a device executes in a step, and how much of it is algorithmic (three forward passes in
  which a token visits its experts; the rest is recomputation, slots that stay empty, attention to
  masked positions, routers). Executed FLOPs are those of the program, and equal those that
  `moe_jax.analysis.accounting` has from the config.
- Collectives: their results on a device in a step, by kind.
- Roofline: an estimate of the step's time from the peaks of the data sheets if compute, memory,
  interconnect and network overlap, and the slowest of them. MFU: algorithmic FLOPs at that speed over the
  matrix peak, and the same if nothing overlaps. Of a GPU, a collective within a host goes over its
  NVLinks, every other one over its network adapter.

"""

SPEEDS = """\
## Published speeds beside rooflines

How long a step took where somebody ran it, and our estimate for the same batch if all overlaps. No run of
our layout reaches that, so a ratio says how far one was; below 1 it says that another layout is faster.
"""


def main() -> None:
    """Compiles what is missing if asked to, and writes the page."""
    giants = budgets.ON_GPUS if _GPUS.value else budgets.GIANTS
    unknown = sorted(set(_ONLY.value) - set(giants))
    if unknown:
        raise UserError(
            f"--only has {', '.join(map(repr, unknown))}; name some of {', '.join(giants)}."
        )
    if _COMPILE.value:
        _compile(_ONLY.value or list(giants), "gpu" if _GPUS.value else "tpu")
    on_tpus, on_gpus = newest_reports()
    pod_figures.save_budgets([one.as_json() for one in on_tpus], "One training step", PICTURE)
    PAGE.write_text(page(on_tpus, on_gpus))
    print(f"{len(on_tpus) + len(on_gpus)} steps are in {PAGE}, {len(on_tpus)} in {PICTURE}")


def newest_reports() -> tuple[list[PodReport], list[PodReport]]:
    """One for each giant that has any, by the newest compiler, (on TPUs, on GPUs).

    Raises:
      UserError: there is none at all.
    """
    return _newest("libtpu", budgets.GIANTS), _newest("jax-cuda12-pjrt", budgets.ON_GPUS)


def _newest(compiler: str, giants: Iterable[str]) -> list[PodReport]:
    folders = sorted(budgets.RESULTS.glob(f"{compiler}-*"), key=_version)
    reports = []
    for config in giants:
        name = budgets.budget_file(config, "").name
        found = [folder / name for folder in folders if (folder / name).exists()]
        if found:
            reports.append(PodReport.read(json.loads(found[-1].read_text())))
    if not reports:
        raise UserError(f"{budgets.RESULTS} has no reports; make them with --compile.")
    return reports


def _version(folder: pathlib.Path) -> list[int]:
    return [int(part) for part in folder.name.rpartition("-")[2].split(".")]


def _compile(configs: list[str], platform: str) -> None:
    compiler = compiler_version(platform)
    if compiler.startswith("jaxlib"):
        raise UserError(f"nothing compiles for GPUs; {GPU_COMPILER}.")
    missing = [one for one in configs if not budgets.budget_file(one, compiler).exists()]
    with (
        concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool,
        tqdm(total=len(missing), unit="model") as bar,
    ):
        for future in concurrent.futures.as_completed(
            [pool.submit(_compile_one, config, compiler, platform) for config in missing]
        ):
            bar.write(future.result(), file=sys.stderr)
            bar.update()


def _compile_one(config: str, compiler: str, platform: str) -> str:
    """Compiles in a process of its own, which gives its memory back; returns what came of it."""
    command = [sys.executable, "experiments/compile_pod.py", f"--config={config}", "--format=json"]
    if platform == "gpu":
        command.append(f"--topology={budgets.ON_GPUS[config]}")
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if not done.stdout:
        said = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        return f"{config}: {said[-1]}"
    report = PodReport.read(json.loads(done.stdout))
    path = budgets.budget_file(config, compiler)
    report.write(epath.Path(path))
    return f"{config}: {'fits' if report.fits else 'does not fit'}, in {path}"


def page(on_tpus: list[PodReport], on_gpus: list[PodReport]) -> str:
    """The page, in Markdown."""
    reports = [*on_tpus, *on_gpus]
    lines = [HEAD.rstrip("\n"), ""]
    lines.append(
        "| model | machine | mesh and layout | batch | parameters | optimizer | HBM, GiB | TFLOPs | "
        "collectives, GiB | roofline | MFU |"
    )
    lines.append("|" + "---|" * 11)
    lines += [_row(one) for one in reports]
    lines += ["", "Notes:", ""]
    lines += [f"- {_name(one)}: {one.note}" for one in on_tpus if one.note]
    lines += [f"- {_name(one)} on {one.hardware}: {one.note}" for one in on_gpus if one.note]
    versions = ", ".join(sorted({one.compiler for one in reports}))
    lines += ["", f"Compiled by {versions}.", "", "![The giants](results/pods/giants.png)", ""]
    lines += [SPEEDS, published_speeds.table(reports)]
    return "\n".join(lines) + "\n"


def _name(report: PodReport) -> str:
    """configs/glam.py:64b_64e -> glam/64b_64e."""
    return report.config.removeprefix("configs/").removesuffix(".py").replace(".py:", "/")


def _row(report: PodReport) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    layout = ", ".join(
        f"{path.removeprefix('model.')} {value}" for path, value in report.changes.items()
    )
    length = report.tokens_per_step // report.rows_per_step
    batch = f"{report.rows_per_step:,}" + (f" x {length}" if report.unit == "token" else " images")
    line = report.roofline
    share = report.algorithmic_flops_per_device / (report.flops_per_device or 1)
    results: dict[str, int] = {}
    for one in report.collectives:
        results[one.kind] = results.get(one.kind, 0) + one.bytes
    largest = sorted(results.items(), key=lambda pair: -pair[1])
    return (
        "| "
        + " | ".join(
            (
                f"[{_name(report)}](../{report.config.partition(':')[0]})",
                f"{report.topology}, {report.chips:,} chips, {report.devices:,} devices",
                mesh + (f"; {layout}" if layout else ""),
                batch,
                f"{report.params / 1e9:,.1f}B {report.parameter_dtype}",
                report.optimizer,
                f"{report.hbm.total / GIB:.1f} of {report.hbm.capacity / GIB:.1f}"
                + ("" if report.fits else ", **does not fit**"),
                f"{report.flops_per_device / 1e12:,.0f}, {share:.0%} algorithmic" if line else "",
                ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in largest if size > GIB / 20),
                f"{line.step_seconds:.2f} s, {line.binding}" if line else "",
                f"{line.mfu:.0%}, {line.mfu_without_overlap:.0%}" if line else "",
            )
        )
        + " |"
    )


if __name__ == "__main__":
    command_line.run(main)
