import json
import pathlib
import subprocess
import sys

import jax
import numpy as np

from moe_jax.interop.huggingface import files
from moe_jax.interop.huggingface.families import FAMILIES
from moe_jax.interop.huggingface.files import Written
from moe_jax.interop.huggingface.matching import paths
from moe_jax.models.abstract_model import AbstractModel
from tests.interop.folders import config_of, weights_of, write

MIXTRAL = FAMILIES["mixtral"]
# 235 MB in float32; the largest tensors are the tables, each 29 MB.
SIZES = {
    "hidden_size": 448, "intermediate_size": 2048, "vocab_size": 16384, "num_attention_heads": 8,
    "num_key_value_heads": 8, "num_local_experts": 8,
}  # fmt: skip


def write_random(folder, hf):
    """A folder of that shape, without ever having more than a tensor in memory."""
    config = MIXTRAL.config_from_hf(hf)
    tree = AbstractModel.of(config).shapes
    shapes = {p: leaf.shape for p, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True)}
    tensors = []
    for tensor in MIXTRAL.tensors(config):
        if tensor.leaf in shapes:
            shape = tensor.layout.their_shape(tensor.shape(shapes[tensor.leaf]))
            value = lambda shape=shape: np.random.default_rng(0).random(shape, np.float32)  # noqa: E731
            tensors.append(Written(tensor.name, shape, np.dtype("float32"), value))
    files.write_folder(folder, hf, tensors, max_shard_bytes=2**26)
    return max(tensor.nbytes for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def test_memory_beyond_the_parameters_is_under_twice_the_largest_tensor(tmp_path):
    small = write(tmp_path / "small", config_of("mixtral"), weights_of("mixtral"))
    largest, total = write_random(tmp_path / "large", config_of("mixtral") | SIZES)
    script = pathlib.Path(__file__).with_name("load_and_measure.py")
    done = subprocess.run(
        [sys.executable, script, small, tmp_path / "large"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    measured = json.loads(done.stdout)
    assert 2e8 < total <= measured["resident"]
    assert measured["beyond"] < 2 * largest, (measured, largest)
