"""Looks for the mesh, the remat policy and the number of microbatches that train fastest and fit.

Every result is a real compilation, so results are kept on disk, and a search goes on where it was
stopped. Each mesh is tried at the policy that fitted the mesh before it, and then at faster ones for as
long as they fit, or at ones that need less memory until one fits.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from moe_jax.configuration import encode
from moe_jax.errors import UserError
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.stack import Remat, StackConfig
from moe_jax.parallel.mesh import AXES, MeshConfig
from moe_jax.parallel.sharding import parameter_shardings
from moe_jax.pods.compile import compile_step, compiler_version, memory_fraction
from moe_jax.pods.hardware import Topology
from moe_jax.pods.report import PodReport
from moe_jax.training.experiment import Experiment
from moe_jax.training.rows import PodLayout

_PACKAGE = pathlib.Path(__file__).parents[1]


def meshes(config: Experiment, topology: Topology) -> list[MeshConfig]:
    """Every mesh of the machine that the config allows; its own first, then the likely ones.

    Those are likely that split least over `model`, whose collectives are on the way of every layer,
    and then most over `expert`, which needs no gathering of weights.
    """
    devices, slices = topology.devices, topology.slices
    abstract_model = AbstractModel.of(config.model)
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    found = []
    for expert, model in itertools.product(divisors, divisors):
        data, rest = divmod(devices, expert * model)
        if rest or not data or data % slices:
            continue
        mesh = dataclasses.replace(config.mesh, data=data, expert=expert, model=model)
        abstract = jax.sharding.AbstractMesh((data, expert, model), AXES)
        try:
            dataclasses.replace(config, mesh=mesh, microbatches=1).validate()
            parameter_shardings(
                abstract_model.shapes, abstract_model.axes, abstract, mesh.fsdp_min_size
            )
        except UserError:
            continue
        found.append(mesh)
    return sorted(found, key=lambda mesh: (mesh != config.mesh, mesh.model, -mesh.expert))


def ladder(config: Experiment, mesh: MeshConfig) -> list[PodLayout]:
    """Layouts with this mesh, from the fastest to the one that needs least memory.

    First less and less is kept for the backward pass, then the batch is computed in more and more
    parts: every divisor of a device's rows that is at least 1.5 times the one before.
    """
    stacks = list(_stacks(config.model))
    rows = config.data.batch_size // mesh.token_shards
    parts = [1]
    for n in range(2, rows + 1):
        if rows % n == 0 and n >= 1.5 * parts[-1]:
            parts.append(n)
    steps = [(remat, 1) for remat in (Remat.NONE, Remat.DOTS)] if stacks else []
    steps += [(Remat.FULL, n) for n in parts]
    layouts = []
    for remat, microbatches in steps:
        changes: dict[str, Any] = {f"{name}.remat": remat.value for name in stacks}
        layout = PodLayout("", mesh, {**changes, "microbatches": microbatches})
        try:
            layout.apply(config).validate()
        except UserError:
            continue
        layouts.append(layout)
    return layouts


def search(
    config: Experiment,
    topology: Topology,
    name: str,
    cache: epath.Path,
    limit: int,
    tried: Callable[[PodReport, bool], None],
    only: MeshConfig | None = None,
) -> list[PodReport]:
    """Compiles layouts, at most `limit` of them, and ranks them.

    Args:
      config: laid out for the machine if its file says how; that mesh is tried first.
      topology: the machine.
      name: what the reports call the config.
      cache: folder of results, which are not computed again.
      limit: of compilations; results in the cache do not count.
      tried: told of each result, and whether it was compiled just now.
      only: the mesh, if no other is to be tried.

    Returns:
      Reports, those that fit first, and the fastest first.

    Raises:
      UserError: no mesh of the machine's devices is possible.
    """
    candidates = [only] if only else meshes(config, topology)
    if not candidates:
        raise UserError(
            f"no mesh of the {topology.devices} devices of {topology.name} divides the batch, experts "
            "and heads of the config; choose another machine or data.batch_size."
        )
    reports: list[PodReport] = []

    def report_of(layout: PodLayout) -> PodReport | None:
        nonlocal limit
        laid = layout.apply(config)
        path = cache / f"{result_key(laid, topology)}.json"
        compiled = not path.exists()
        if compiled:
            if limit == 0:
                return None
            limit -= 1
            compile_step(laid, topology).write(path)
            jax.clear_caches()  # Traced steps of giants would pile up.
        report = PodReport.read(json.loads(path.read_text()))
        report = dataclasses.replace(report, config=name, changes=dict(layout.changes))
        reports.append(report)
        tried(report, compiled)
        return report

    start = 0
    for mesh in candidates:
        layouts = ladder(config, mesh)
        if layouts:
            start = _climb(layouts, min(start, len(layouts) - 1), report_of)
    return sorted(reports, key=lambda one: (not one.fits, _seconds(one), one.hbm.total))


def _climb(
    layouts: Sequence[PodLayout], start: int, report_of: Callable[[PodLayout], PodReport | None]
) -> int:
    """Tries layouts from `start` on until it is known which is the first that fits; its index."""
    report = report_of(layouts[start])
    if report is not None and report.fits:
        while start > 0 and (report := report_of(layouts[start - 1])) and report.fits:
            start -= 1
        return start
    while report is not None and not report.fits and start < len(layouts) - 1:
        start += 1
        report = report_of(layouts[start])
    return start


def result_key(config: Experiment, topology: Topology) -> str:
    """Of all that a result depends on: config, machine, this package, compiler and JAX."""
    sources = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        sources.update(path.read_bytes())
    parts = (
        encode(config),
        topology.code,
        sources.hexdigest(),
        compiler_version(topology.chip.platform),
        memory_fraction(topology.chip),
        importlib.metadata.version("jax"),
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _seconds(report: PodReport) -> float:
    return report.roofline.step_seconds if report.roofline else float("inf")


def _stacks(model: Any) -> Iterator[str]:
    """Paths of the transformer stacks of a model's config."""
    if isinstance(model, StackConfig):
        yield "model"
        return
    for field in dataclasses.fields(model):
        if isinstance(getattr(model, field.name), StackConfig):
            yield f"model.{field.name}"
