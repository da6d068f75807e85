"""Reports as a person reads them: one of a step, and many in a ranking."""

import dataclasses

from moe_jax.pods.compile import stand_in_sentence
from moe_jax.pods.report import GIB, PodReport


def layout_of(report: PodReport) -> str:
    """Mesh and changed fields."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    changes = ", ".join(f"{path}={value}" for path, value in report.changes.items())
    return f"{mesh}{f' ({changes})' if changes else ''}"


def seconds_of(report: PodReport) -> str:
    """Of a step; empty where there is no program."""
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
            + layout_of(one)
        )
    if reports[0].fits:
        lines.append(f"best: {layout_of(reports[0])}")
    return "\n".join(lines)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.3g}" if flops < 1e15 else f"{flops / 1e12:,.0f}"


def _of_gpu_memory(report: PodReport) -> list[str]:
    """How much of the device the capacity is, where that is not all of it."""
    if report.memory_fraction == 1:
        return []
    whole = report.hbm.capacity / report.memory_fraction / GIB
    return [
        f"  (what JAX takes, {report.memory_fraction:.0%} of the GPU's {whole:.2f}; --memory_fraction or "
        "XLA_CLIENT_MEM_FRACTION says otherwise)"
    ]


def table(report: PodReport) -> str:
    """The report as a person reads it."""
    memory, line = report.hbm, report.roofline
    verdict = "fits" if report.fits else f"{memory.missing / GIB:.2f} GiB too few"
    lines = [
        f"{report.config} on {report.hardware} ({report.topology}): {report.chips} chips, "
        f"{report.devices} devices",
        f"mesh {layout_of(report)}; compiled by {report.compiler} in {report.compile_seconds:.0f} s",
        f"{report.params / 1e9:,.3g}B parameters in {report.parameter_dtype}, {report.optimizer}; "
        f"{report.rows_per_step:,} rows, {report.tokens_per_step:,} {report.unit}s a step",
        "",
        f"Memory of a device, GiB: {memory.total / GIB:.2f} of {memory.capacity / GIB:.2f}, {verdict}",
        *_of_gpu_memory(report),
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
            f"{f'  {one.synchronous} synchronous' if one.synchronous else ''}"
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
