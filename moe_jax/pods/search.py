"""Looks for the mesh, the remat policy and the number of microbatches that train fastest and fit.

Every mesh that the config allows is tried at the policy that recomputes least and fits. All are real
compilations, so the first ones should be the likely ones, and results are kept on disk.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from moe_jax.configuration import encode
from moe_jax.errors import UserError
from moe_jax.models.stack import Remat, StackConfig
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.compile import compile_step, compiler_version
from moe_jax.pods.hardware import Topology
from moe_jax.pods.layouts import PodLayout
from moe_jax.pods.report import PodReport
from moe_jax.training.experiment import Experiment

# From the fastest to the one that needs least memory: what is recomputed, and microbatches.
LADDER: tuple[tuple[Remat, int], ...] = (
    (Remat.NONE, 1),
    (Remat.DOTS, 1),
    (Remat.FULL, 1),
    (Remat.FULL, 2),
    (Remat.FULL, 4),
    (Remat.FULL, 8),
    (Remat.FULL, 16),
)


def meshes(config: Experiment, devices: int) -> list[MeshConfig]:
    """Every mesh of so many devices that the config allows, likely ones first.

    Those come first that split least over `model`, whose collectives are on the way of every layer,
    and then most over `expert`, which needs no gathering of weights.
    """
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    found = []
    for expert, model in itertools.product(divisors, divisors):
        if devices % (expert * model):
            continue
        mesh = dataclasses.replace(
            config.mesh, data=devices // (expert * model), expert=expert, model=model
        )
        try:
            dataclasses.replace(config, mesh=mesh, microbatches=1).validate()
        except UserError:
            continue
        found.append(mesh)
    return sorted(found, key=lambda mesh: (mesh.model, -mesh.expert))


def layouts(config: Experiment, topology: Topology) -> Iterator[list[PodLayout]]:
    """For each mesh its layouts, from the fastest to the one that needs least memory."""
    stacks = [name for name in _stacks(config.model)]
    for mesh in meshes(config, topology.devices):
        ladder = []
        for remat, microbatches in (
            LADDER if stacks else ((Remat.NONE, n) for n in (1, 2, 4, 8, 16))
        ):
            changes: dict[str, Any] = {f"{name}.remat": remat.value for name in stacks}
            layout = PodLayout(
                topology.compiler_name, mesh, {**changes, "microbatches": microbatches}
            )
            try:
                layout.apply(config).validate()
            except UserError:
                continue
            ladder.append(layout)
        yield ladder


def search(
    config: Experiment,
    topology: Topology,
    name: str,
    cache: epath.Path,
    limit: int,
    tried: Callable[[PodReport], None],
) -> list[PodReport]:
    """Compiles layouts, at most `limit` of them, and ranks them.

    Args:
      config: of any mesh.
      topology: the machine.
      name: what the reports call the config.
      cache: folder of results, which are not computed again.
      limit: of compilations; results in the cache do not count.
      tried: told of each result.

    Returns:
      Reports, those that fit first, and the fastest first.

    Raises:
      UserError: no mesh of the machine's devices is possible.
    """
    ladders = list(layouts(config, topology))
    if not ladders:
        raise UserError(
            f"no mesh of the {topology.devices} devices of {topology.name} divides the batch, experts "
            "and heads of the config; choose another machine or data.batch_size."
        )
    reports = []
    for ladder in ladders:
        for layout in ladder:
            laid = layout.apply(config)
            path = cache / f"{result_key(laid, topology)}.json"
            if path.exists():
                report = PodReport.read(json.loads(path.read_text()))
            elif limit == 0:
                break
            else:
                limit -= 1
                report = compile_step(laid, topology, name=name, changes=dict(layout.changes))
                write(report, path)
            reports.append(report)
            tried(report)
            if report.fits:
                break  # What recomputes more is slower.
    return sorted(reports, key=lambda one: (not one.fits, _seconds(one), one.hbm_bytes))


def result_key(config: Experiment, topology: Topology) -> str:
    """Of all that a result depends on: config, machine, compiler and JAX."""
    parts = (
        encode(config),
        topology.name,
        compiler_version(topology.chip.platform),
        importlib.metadata.version("jax"),
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def write(report: PodReport, path: epath.Path) -> None:
    """Writes a report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    temporary.replace(path)


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
