"""Trains a small Switch-style language model and its dense twin on real text, and compares them.

    python experiments/quickstart.py --workdir=runs/quickstart

Both runs continue where they stopped when the command is given again.
"""

import dataclasses
import logging
import math

import jax
from absl import flags
from etils import epath

from moe_jax import command_line
from moe_jax.analysis import figures
from moe_jax.analysis.accounting.decoder_lm import dense_twin
from moe_jax.analysis.accounting.families import account
from moe_jax.decoding.sampling import Sampling
from moe_jax.decoding.text import continue_texts
from moe_jax.parallel.mesh import MeshConfig, force_host_devices
from moe_jax.training import experiment, loop, metrics, provenance
from moe_jax.training.experiment import Experiment
from moe_jax.training.trained import Trained

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of the two runs.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps of each run; default: the config's.")
_LOG = logging.getLogger("moe_jax.quickstart")
_PROMPT = "def read_file(path):\n"


def main() -> None:
    """Trains both models, then prints a sample and a table and draws the picture."""
    sparse = command_line.experiment(_CONFIG.value)
    if _STEPS.value is not None:
        sparse.steps = _STEPS.value
    sparse.mesh = _mesh_for_this_machine(sparse.mesh)
    twin = dense_twin(sparse.model)
    dense = dataclasses.replace(sparse, model=twin)
    workdir = epath.Path(_WORKDIR.value)

    runs = {"moe": sparse, "dense": dense}
    records = {}
    for name, config in runs.items():
        _LOG.info("== %s: %d steps in %s", name, config.steps, workdir / name)
        records[name] = loop.train(config, workdir / name)
        report = workdir / name / "report.png"
        figures.save_run_report(records[name], config.model.moe_layers, str(workdir / name), report)

    _print_sample(workdir / "moe")
    _print_summary(runs, records)
    dataset = experiment.read_record(workdir / "moe")["dataset"]
    picture = workdir / "quickstart.png"
    figures.save_comparison(
        records["moe"],
        records["dense"],
        sparse.model.moe_layers,
        dataset["trivial_loss"],
        f"{twin.num_experts} experts, top-1, against the dense twin of equal FLOPs "
        f"({provenance.devices()}, mesh {sparse.mesh})",
        picture,
    )
    print(f"text: {dataset['name']}, sha256 {dataset['sha256']}")
    print(f"devices: {provenance.devices()}, mesh {sparse.mesh}")
    print(f"picture: {picture}")
    print(f"runs: {workdir / 'moe'} and {workdir / 'dense'} (metrics.jsonl, report.png, ...)")


def _mesh_for_this_machine(config: MeshConfig) -> MeshConfig:
    """The config's mesh, or on accelerators the part of it that their number allows."""
    force_host_devices(config.devices_of_process)
    if jax.default_backend() == "cpu" or jax.device_count() >= config.size:
        return config
    expert = math.gcd(config.expert, jax.device_count())
    data = math.gcd(config.data, jax.device_count() // expert)
    mesh = dataclasses.replace(config, data=data, expert=expert, model=1)
    _LOG.info("mesh %s instead of %s: %s", mesh, config, provenance.devices())
    return mesh


def _print_sample(workdir: epath.Path) -> None:
    trained = Trained.load(workdir)
    model, config = trained.model, trained.model.config
    sampling = Sampling(temperature=0.7, top_k=40)
    new_tokens = config.max_length - len(_PROMPT)
    (text,) = continue_texts(
        model, trained.run.mesh, trained.tokenizer, [_PROMPT], new_tokens, sampling, seed=0
    )
    print(f"\nA sample after {trained.step} steps (temperature 0.7, top-40):")
    print("\n".join(f"    {line}" for line in (_PROMPT + text).splitlines()) + "\n")


def _print_summary(runs: dict[str, Experiment], records: dict[str, list[metrics.Record]]) -> None:
    rows: dict[str, list[str]] = {}
    for name, config in runs.items():
        last = records[name][-1]
        count = account(config.with_group_sizes().model, config.data)
        loss = last["eval/loss"]
        speeds = [r["time/tokens_per_second"] for r in records[name] if "time/step_ms" in r]
        tokens = config.steps * config.data.batch_size * config.data.tokens_per_row
        loads = [v for k, v in last.items() if k.endswith("max_over_mean_load")]
        rows[name] = [
            f"{loss:.4f}",
            f"{loss / math.log(2):.4f}",
            f"{count.parameters / 1e6:.2f} M",
            f"{count.activated_parameters / 1e6:.2f} M",
            f"{count.algorithmic_flops / 1e6:.3f} M",
            f"{count.executed_flops / 1e6:.3f} M",
            f"{tokens / 1e6:.2f} M",
            f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if speeds else "-",
            f"{100 * metrics.dropped_fraction(last):.1f} %" if loads else "-",
            f"{max(loads):.2f}" if loads else "-",
        ]
    labels = [
        "held-out loss (nats/byte)",
        "held-out loss (bits/byte)",
        "parameters",
        "activated parameters",
        "algorithmic FLOPs/token, forward",
        "executed FLOPs/token, forward",
        "training tokens",
        "tokens/s (median)",
        "dropped at the last step",
        "max/mean expert load",
    ]
    print(f"{'':36}" + "".join(f"{name:>14}" for name in rows))
    for label, *values in zip(labels, *rows.values(), strict=True):
        print(f"{label:36}" + "".join(f"{value:>14}" for value in values))
    print()


if __name__ == "__main__":
    command_line.run(main, "configs/quickstart.py")
