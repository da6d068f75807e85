"""Trains the model of a config, or continues a run.

    python experiments/train.py --config=configs/quickstart.py --workdir=runs/mine \
        [--steps=500] [--config.model.num_experts=16] [--profile_steps=10:5]

--config=configs/glam.py:64b_64e is a row of a file of several models; without one the file's rows are
named. --topology=v4:8x8x16 takes the mesh, and what else saves memory, that the row has for this
machine, which experiments/compile_pod.py compiles; --mesh=data:32,expert:8 goes before.

Running the same command again continues the run from its newest good checkpoint.

Several processes, which must share the folder, are started with the same command and, on each,
--coordinator=HOST:PORT --process_count=N --process_id=0 (to N-1), or with --distributed alone where
JAX can detect these.
"""

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from moe_jax import command_line
from moe_jax.analysis import figures
from moe_jax.parallel import multihost
from moe_jax.parallel.mesh import parse_mesh
from moe_jax.pods.layouts import laid_out
from moe_jax.training import traced_steps
from moe_jax.training.loop import train
from moe_jax.training.rows import pods_of

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
flags.register_validator("workdir", lambda folder: folder != "", "name a folder")
_STEPS = flags.DEFINE_integer("steps", None, "Total number of steps; default: the config's.")
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps",
    "",
    "FIRST:COUNT, such as 10:5: these steps run under the profiler, into WORKDIR/profile.",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "Machine whose layout the config's row has; default: the config's own mesh."
)
_MESH = flags.DEFINE_string(
    "mesh", "", "Such as data:4,expert:8; default: the layout's or config's."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, as the cluster says (TPU, GKE, Slurm, MPI)."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port at which process 0 is found by the others."
)
_PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "Number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, from 0.")


def main() -> None:
    """Trains and says where the results are."""
    profiled = traced_steps.parse(_PROFILE_STEPS.value)
    multihost.join(_DISTRIBUTED.value, _COORDINATOR.value, _PROCESS_COUNT.value, _PROCESS_ID.value)
    config = command_line.experiment(_CONFIG.value)
    if _TOPOLOGY.value:
        layouts = pods_of(config_flags.get_config_filename(flags.FLAGS["config"]))
        config, _ = laid_out(config, layouts, _TOPOLOGY.value, _MESH.value)
    elif _MESH.value:
        config.mesh = parse_mesh(_MESH.value, config.mesh)
    if _STEPS.value is not None:
        config.steps = _STEPS.value
    records = train(config, _WORKDIR.value, profiled=profiled)
    if jax.process_index():
        return
    figures.save_run_report(
        records, config.model.moe_layers, _WORKDIR.value, epath.Path(_WORKDIR.value) / "report.png"
    )
    last = records[-1]
    if last.get("eval/loss") is None:
        print(f"step {last['step']}: the held-out loss is not finite, or nothing was held out")
    else:
        accuracy = last.get("eval/accuracy")
        shown = "" if accuracy is None else f", accuracy {100 * accuracy:.1f}%"
        print(f"step {last['step']}: held-out loss {last['eval/loss']:.4f}{shown}")
    print(f"results are in {_WORKDIR.value}: report.png, metrics.jsonl, config.json, checkpoints/")
