"""Compiles the training step of a config for a machine that need not be here, and says what it costs.

    python experiments/compile_pod.py --config=configs/glam.py:64b_64e --topology=v4:8x8x16
        [--mesh=data:32,expert:8,model:4] [--format=table|json] [--search [--search_limit=12]]

The step is the trainer's own, at the config's global batch; its state is abstract. TPU topologies are
compiled by libtpu (make install EXTRA=tpu) on any Linux x86-64 host, GPUs' by XLA's plugin for CUDA (make
install-gpu-compiler, then .venv-gpu/bin/python in place of python), which take a minute or several.
Machines have the compiler's names (v4:8x8x16 chips, h100:8x8 hosts and GPUs of each), Google Cloud's
(tpu-v4-2048, by cores), and gpu-h100-64; 2*tpu-v5e-256 are two slices. Without --topology and --mesh the
config's own are used.

--search tries meshes, remat policies and microbatches, ranks them, and keeps results in
~/.cache/moe_jax/pods, so that it goes on where it was stopped.

A step fits GPUs if it takes no more than JAX does: 75% of the device's memory, or --memory_fraction, which
stands for the variable XLA_CLIENT_MEM_FRACTION that JAX reads. They are compiled with the launchers' flags.
libtpu compiles with its defaults; export LIBTPU_INIT_ARGS="$(python -m moe_jax.pods.xla_flags NAME)" first
to compile with the flags of the launchers.

Exit status: 0 the step fits; 2 it does not, and the report is on stdout, or a flag is wrong, and stdout is
empty.
"""

import json
import os
import sys
from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import config_flags
from tqdm import tqdm

from moe_jax import command_line
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import parse_mesh
from moe_jax.pods.compile import compile_step, refusal_sentence, set_memory_fraction
from moe_jax.pods.hardware import Topology, topology
from moe_jax.pods.layouts import changes_between, laid_out
from moe_jax.pods.report import PodReport
from moe_jax.pods.search import search
from moe_jax.pods.tables import layout_of, ranking, seconds_of, table
from moe_jax.training.experiment import Experiment
from moe_jax.training.rows import PodLayout, pods_of

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "Such as v4:8x8x16, tpu-v4-2048, 2*v5e:16x16; default: the config's first."
)
_MESH = flags.DEFINE_string("mesh", "", "Such as data:32,expert:8; default: the config's.")
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What stdout gets.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, remat policies and microbatches.")
_SEARCH_LIMIT = flags.DEFINE_integer("search_limit", 12, "Compilations at most.", lower_bound=1)
_MEMORY_FRACTION = flags.DEFINE_float(
    "memory_fraction",
    None,
    "Share of a GPU's memory that JAX takes; default: XLA_CLIENT_MEM_FRACTION, or 0.75.",
)

_CACHE = epath.Path("~/.cache/moe_jax/pods").expanduser()


def main() -> None:
    """Compiles and reports.

    Raises:
      UserError: the machine, the mesh or the config is wrong, or the step does not fit.
    """
    # Nothing runs here, so JAX need not complain of missing CUDA when a config first uses it.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if _MEMORY_FRACTION.value is not None:
        set_memory_fraction(_MEMORY_FRACTION.value)
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
            fate = seconds_of(report) if report.fits else "does not fit"
            bar.write(f"{layout_of(report)}: {fate}", file=sys.stderr)

        return search(config, machine, name, _CACHE, _SEARCH_LIMIT.value, tried, only)


if __name__ == "__main__":
    command_line.run(main)
