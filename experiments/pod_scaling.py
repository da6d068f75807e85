"""GShard and DeepSeek-V3 on 8 to 4,096 devices: memory, exchanged bytes and roofline, on paper.

    python experiments/pod_scaling.py [--model=gshard] [--devices=8,16,32] [--workdir=DIR]

GShard scales weakly, as in its paper: as many experts as devices, and as many tokens for each
device. DeepSeek-V3 scales strongly: the published model and its global batch. Every point is the
real training step, compiled for that many devices, which takes minutes of a core; no TPU is needed.

DIR gets a report of each point, a picture of each model and scaling.md. A point whose report is
there, or in docs/results/pods by the same compiler, is not compiled again, so the same command goes
on where it was interrupted.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath
from tqdm import tqdm

from moe_jax import command_line
from moe_jax.analysis import pod_figures
from moe_jax.configuration import encode
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods import budgets
from moe_jax.pods.compile import compile_step, compiler_version
from moe_jax.pods.hardware import topology
from moe_jax.pods.report import GIB, CollectiveSum, PodReport
from moe_jax.reproduction.claim import read_config
from moe_jax.training.experiment import Experiment
from moe_jax.training.rows import PodLayout

SIZES = tuple(2**n for n in range(3, 13))
"""Numbers of devices that --devices may ask for."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A model that is laid out for many sizes.

    Attributes:
      name: of its flag and files.
      title: for people.
      config: as --config names it.
      layout: number of devices -> what is compiled for them.
      sizes: numbers of devices unless --devices says others; each takes minutes of a core.
    """

    name: str
    title: str
    config: str
    layout: Callable[[int], PodLayout]
    sizes: tuple[int, ...]


def slice_of(generation: str, chips: int, dimensions: int) -> str:
    """The box of a power of two of chips that is nearest to a cube: 128 are v5p:4x4x8."""
    exponent = chips.bit_length() - 1
    sides = [2 ** ((exponent + i) // dimensions) for i in range(dimensions)]
    return f"{generation}:{'x'.join(map(str, sides))}"


def gshard(devices: int) -> PodLayout:
    """GShard on TPU v3: an expert of each MoE layer, and a group of 2,048 tokens, for each device.

    A group has 16 sentences, and encoder and decoder have groups of their own. Layers outside the
    experts are whole on every device, as in the paper, and blocks are computed again in the
    backward pass, which its compiler did to a part of them. A pod has 2,048 devices: 4,096 are two
    pods, with data parallelism between them.
    """
    pods = max(devices // 2048, 1)
    chips = devices // 2  # Each of their two cores is a device.
    # A width of 1,024 is not split over the 2,048 devices of one pod anyway.
    whole = {} if devices == 2048 else {"mesh.fsdp_min_size": 2**40}
    return PodLayout(
        f"{pods}*{slice_of('v3', chips // pods, dimensions=2)}",
        MeshConfig(data=pods, expert=devices // pods),
        {
            **whole,
            "model.encoder.num_experts": devices,
            "model.decoder.num_experts": devices,
            "model.encoder.remat": "full",
            "model.decoder.remat": "full",
            "data.batch_size": 16 * devices,
        },
    )


def deepseek_v3(devices: int) -> PodLayout:
    """DeepSeek-V3 on TPU v5p, with the batch of 15,360 sequences of 4,096 tokens on any number.

    Up to 64 devices share the experts, as in the paper, then up to 16 times as many the rows. More do
    not divide the batch (15,360 = 15 * 1,024), so they split heads and widths. A microbatch has one
    sequence for each device, because buffers for three do not fit.
    """
    expert = min(devices, 64)
    data = min(devices // expert, 16)
    return PodLayout(
        slice_of("v5p", devices, dimensions=3),
        MeshConfig(data=data, expert=expert, model=devices // (data * expert)),
        {
            "microbatches": 15_360 // (data * expert),
            # Times the rows of a balanced load; for all that can come, 8 times on 8 devices and 32
            # times on 32 and more, there is no room.
            "model.moe.dispatch.buffer_factor": 1.25,
        },
    )


STUDIES = {
    "gshard": Study(
        "gshard",
        "GShard MoE(E, 36L), E = devices, 2,048 tokens for each (weak scaling)",
        "configs/gshard.py:2048e_36l",
        gshard,
        (8, 64, 512, 2048, 4096),
    ),
    "deepseek_v3": Study(
        "deepseek_v3",
        "DeepSeek-V3, batches of 63M tokens (strong scaling)",
        "configs/deepseek_v3.py:v3",
        deepseek_v3,
        (8, 64, 128, 256, 512, 1024, 2048, 4096),
    ),
}

_MODELS = flags.DEFINE_multi_enum("model", list(STUDIES), list(STUDIES), "May be repeated.")
_DEVICES = flags.DEFINE_list("devices", [], "How many, separated by commas; default: some sizes.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/pod_scaling", "Folder of reports and pictures.")


def main() -> None:
    """Compiles what is missing, then draws and prints what is there."""
    workdir = epath.Path(_WORKDIR.value)
    studies = [STUDIES[name] for name in dict.fromkeys(_MODELS.value)]
    asked = sizes(_DEVICES.value)
    points = [(study, devices) for study in studies for devices in asked or study.sizes]
    with tqdm(points, unit="point") as bar:
        for study, devices in bar:
            bar.set_description(f"{study.name} on {devices}")
            compile_point(study, devices, workdir)
    found = {study: reports_of(study, workdir) for study in studies}
    for study, reports in found.items():
        trees = [report.as_json() for report in reports]
        pod_figures.save_scaling(trees, study.title, workdir / f"{study.name}.png")
    text = page(found)
    (workdir / "scaling.md").write_text(text)
    print(f"{text}\nreports, pictures and this text (scaling.md) are in {workdir}")


def sizes(texts: Sequence[str]) -> list[int]:
    """Reads --devices, in ascending order.

    Raises:
      UserError: one of them is not of SIZES.
    """
    for text in texts:
        if text not in map(str, SIZES):
            raise UserError(
                f"--devices has {text!r}; it takes numbers among {', '.join(map(str, SIZES))}, "
                "separated by commas."
            )
    return sorted({int(text) for text in texts})


def compile_point(study: Study, devices: int, workdir: epath.Path) -> None:
    """Writes the report of a point, unless it is there."""
    path = workdir / f"{study.name}_{devices}.json"
    if path.exists():
        return
    layout = study.layout(devices)
    report = of_giant(study, layout) or compile_step(
        layout.apply(_config(study.config)),
        topology(layout.topology),
        name=study.config,
        changes=layout.changes,
    )
    report.write(path)
    jax.clear_caches()  # Traced steps of giants would pile up.


def of_giant(study: Study, layout: PodLayout) -> PodReport | None:
    """The report in docs/results/pods if it is of the same step on the same machine."""
    found = budgets.budget_of(study.config, compiler_version("tpu"))
    if found is None or topology(found.topology) != topology(layout.topology):
        return None
    config = _config(study.config)
    theirs = PodLayout(found.topology, MeshConfig(**found.mesh), found.changes).apply(config)
    return found if encode(theirs) == encode(layout.apply(config)) else None


@functools.cache
def _config(config: str) -> Experiment:
    return read_config(config)


def reports_of(study: Study, workdir: epath.Path) -> list[PodReport]:
    """Those that are there, by devices."""
    paths = [workdir / f"{study.name}_{devices}.json" for devices in SIZES]
    return [PodReport.read(json.loads(path.read_text())) for path in paths if path.exists()]


def page(found: dict[Study, list[PodReport]]) -> str:
    """Tables and what they show, in Markdown."""
    lines = ["<!-- Written by `python experiments/pod_scaling.py`. -->"]
    for study, reports in found.items():
        lines += ["", f"## {study.title}", "", f"![curves]({study.name}.png)", ""]
        lines += [*table(reports), ""]
        lines += [f"- {sentence}" for sentence in bends(reports)]
    return "\n".join(lines) + "\n"


def table(reports: Sequence[PodReport]) -> list[str]:
    """A line for each size; bytes and seconds are of a device and a step."""
    lines = [
        "| devices | machine | mesh | microbatches | HBM, GiB | collectives, GiB | roofline, s "
        "| bound by | MFU | without overlap | tokens/s/chip |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
        cells: list[Any] = [
            f"{report.devices:,}",
            report.hardware,
            mesh,
            report.changes.get("microbatches", 1),
            f"{report.hbm.total / GIB:.1f}",
        ]
        if report.roofline:
            terms = report.roofline
            cells += [
                f"{sum(one.bytes for one in report.collectives) / GIB:.1f}",
                f"{terms.step_seconds:.3g}",
                terms.binding,
                f"{terms.mfu:.1%}",
                f"{terms.mfu_without_overlap:.1%}",
                f"{terms.tokens_per_second_per_chip:,.0f}",
            ]
        else:
            cells += [f"does not fit in {report.hbm.capacity / GIB:.1f} GiB", *[""] * 5]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def bends(reports: Sequence[PodReport]) -> list[str]:
    """Where the curves change their course and why, in sentences."""
    sentences = [_refusal(report) for report in reports if not report.fits]
    fitting = [report for report in reports if report.roofline]
    for before, after in itertools.pairwise(fitting):
        old, new = before.roofline, after.roofline
        assert old and new
        if old.binding != new.binding:
            sentences.append(
                f"From {before.devices:,} to {after.devices:,} devices the bound changes from "
                f"{old.binding} to {new.binding}; MFU goes from {old.mfu:.1%} to {new.mfu:.1%}. "
                f"{_slowest(after)}"
            )
    if len(fitting) > 1:
        before, after = min(itertools.pairwise(fitting), key=_fall)
        if _fall((before, after)) < 1:
            sentences.append(
                f"Without overlap MFU falls most from {before.devices:,} to {after.devices:,} "
                f"devices, to {_fall((before, after)):.0%} of what it was. {_slowest(after)}"
            )
    return sentences


def _refusal(report: PodReport) -> str:
    memory = report.hbm
    state = memory.parameters + memory.optimizer_state
    need = f"{memory.total / GIB:,.1f} GiB of the {memory.capacity / GIB:.1f} that a device has"
    # Gradients and activations are said to be at fault only if the state leaves room for them.
    if memory.temporaries is None:
        reason = f"at least {need}, before gradients and activations"
    elif state > memory.capacity:
        reason = f"{need}, and {state / GIB:,.1f} of it is the state"
    else:
        reason = f"{need}, and most of it is {memory.largest}"
    return f"On {report.devices:,} devices it does not fit: it needs {reason}."


def _fall(pair: tuple[PodReport, PodReport]) -> float:
    """MFU without overlap of the second, relative to the first."""
    before, after = (report.roofline for report in pair)
    assert before and after
    return after.mfu_without_overlap / before.mfu_without_overlap


def _slowest(report: PodReport) -> str:
    if not report.collectives:
        return "There are no collectives."
    most: CollectiveSum = max(report.collectives, key=lambda one: one.seconds)
    assert report.roofline
    return (
        f"There {most.kind} over {' x '.join(most.axes)} takes most of all collectives, "
        f"{most.bytes / GIB:.1f} GiB and {most.seconds:.3g} s of a step, beside "
        f"{report.roofline.compute:.3g} s of matrix products."
    )


if __name__ == "__main__":
    command_line.run(main)
