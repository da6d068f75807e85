"""The first 20 losses of the quickstart and of every tiny config, and the parameters after them.

    python -m tests.first_losses.record --batches     writes batches.npz, from the prepared datasets
    python -m tests.first_losses.record               writes the losses of this machine
    python -m tests.first_losses.record --print       prints them as JSON and writes nothing

The batches are committed, so that the losses depend on no dataset: what is recorded is what the model,
the optimizer and the randomness compute. Losses are kept as hexadecimal floats; the parameters as one
digest of all arrays in the order of their contents, so that renaming a parameter changes nothing.
"""

import hashlib
import json
import pathlib
import platform
import sys
from typing import Any

import jax
import numpy as np

from moe_jax.parallel.mesh import force_host_devices

FOLDER = pathlib.Path(__file__).parent
BATCHES = FOLDER / "batches.npz"
RECORDS = FOLDER / "records.json"
STEPS = 20
CONFIGS = {
    "quickstart": "configs.quickstart",
    "tiny/encoder_decoder": "configs.tiny.encoder_decoder",
    "tiny/mixtures": "configs.tiny.mixtures",
    "tiny/recurrent_lm": "configs.tiny.recurrent_lm",
    "tiny/soft_moe": "configs.tiny.soft_moe",
    "tiny/translation": "configs.tiny.translation",
    "tiny/vision": "configs.tiny.vision",
}


def config_of(name: str) -> Any:
    """The config of a name in CONFIGS."""
    module = __import__(CONFIGS[name], fromlist=["get_config"])
    return module.get_config()


def machine() -> str:
    """What decides the last bits of a sum: the processor, the compiler and its flags."""
    model = [
        line.split(":")[1].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "cpu family", "model\t", "stepping"))
    ][:4]
    return f"{' '.join(model) or platform.processor()}; jax {jax.__version__}"


def write_batches() -> None:
    """Takes the first 20 batches of each config's dataset, which must be prepared."""
    arrays = {}
    for name in CONFIGS:
        config = config_of(name)
        data = config.data.open(config.seed)
        steps = [data.rows(step, 0, config.data.batch_size) for step in range(STEPS)]
        for field in steps[0]:
            arrays[f"{name}:{field}"] = _compact(np.stack([batch[field] for batch in steps]))
    np.savez_compressed(BATCHES, **arrays)


def _compact(values: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest dtype that holds them."""
    for dtype in (np.bool_, np.uint8, np.int16, np.int32, np.float32):
        small = values.astype(dtype)
        if (small.astype(values.dtype) == values).all():
            return small
    raise ValueError(f"float32 does not hold values of dtype {values.dtype}")


def batches_of(name: str, config: Any) -> list[dict[str, np.ndarray]]:
    """The committed batches, in the dtypes that the config's data have."""
    shapes = config.data.batch_shapes
    with np.load(BATCHES) as file:
        fields = {field: file[f"{name}:{field}"].astype(shapes[field].dtype) for field in shapes}
    return [{field: values[step] for field, values in fields.items()} for step in range(STEPS)]


def first_losses(name: str) -> dict[str, Any]:
    """Losses of the first steps as hexadecimal floats, and the digest of the parameters after."""
    from moe_jax.training.run import Run, broadcast_signal

    config = config_of(name)
    run = Run.build(config)
    losses = []
    with jax.set_mesh(run.mesh):
        state = run.initial_state()
        drawn = digest(state.parameters)
        for batch in batches_of(name, config):
            state, metrics = run.train_step(
                state, run.put_batch(batch), broadcast_signal(run.mesh, 0), run.hyperparameters
            )
            losses.append(float(metrics["loss"]).hex())
    return {"drawn": drawn, "losses": losses, "parameters": digest(state.parameters)}


def digest(parameters: Any) -> str:
    """sha256 of all arrays, whatever their names."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(parameters)]
    parts = sorted(
        hashlib.sha256(f"{leaf.shape}{leaf.dtype}".encode() + leaf.tobytes()).hexdigest()
        for leaf in leaves
    )
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def main() -> None:
    """Writes what the flags ask for."""
    if "--batches" in sys.argv:
        write_batches()
        return
    # One process for all configs, of which the largest mesh has 8 devices.
    force_host_devices(8)
    found = {name: first_losses(name) for name in CONFIGS}
    if "--print" in sys.argv:
        print(json.dumps(found))
        return
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    records[machine()] = found
    RECORDS.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
