import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import files, loading, saving
from moe_jax.interop.huggingface.loading import load
from moe_jax.interop.huggingface.saving import save
from moe_jax.models.abstract_model import AbstractModel, arrays_of
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.parallel.sharding import parameter_shardings
from tests.interop.folders import config_of, weights_of, write

ONE = MeshConfig()
EIGHT = MeshConfig(data=2, expert=2, model=2)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "mixtral", config_of("mixtral"), weights_of("mixtral"))


def test_devices_get_their_parts_in_blocks(folder, monkeypatch, tmp_path):
    whole = load(folder, make_mesh(ONE))
    # Smaller than a device's part of the experts and of the tables: these are written on the device.
    for module in (loading, saving):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1024)
    mesh = make_mesh(EIGHT)
    parts = load(folder, mesh, fsdp_min_size=256)
    abstract_model = AbstractModel.of(parts.config)
    shardings = parameter_shardings(abstract_model.shapes, abstract_model.axes, mesh, 256)
    (expected, _), (found, _) = arrays_of(whole), arrays_of(parts)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for a, b, sharding in zip(*map(jax.tree.leaves, (expected, found, shardings)), strict=True):
        assert b.sharding == sharding and b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)
    save(parts, "mixtral", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, value in weights_of("mixtral").items():
        np.testing.assert_array_equal(back[name], value)


def test_bfloat16_stays_and_shards_are_the_same_bytes(tmp_path):
    weights = {name: a.astype(jnp.bfloat16) for name, a in weights_of("deepseek_v3").items()}
    # transformers keeps this one in float32.
    kept = [name for name in weights if "e_score_correction_bias" in name]
    weights |= {name: weights_of("deepseek_v3")[name] for name in kept}
    config = config_of("deepseek_v3") | {"dtype": "bfloat16"}
    folder = write(tmp_path / "theirs", config, weights)
    for source, target in (("theirs", "ours"), ("ours", "again")):
        model = load(tmp_path / source, make_mesh(ONE))
        assert model.tokens.table[...].dtype == jnp.bfloat16 and model.config.dtype == "bfloat16"
        save(model, "deepseek_v3", tmp_path / target, max_shard_bytes=6000)
    stored = files.tensors_of(tmp_path / "ours")
    assert stored.keys() == weights.keys()
    for name, value in weights.items():
        whole = tuple(slice(0, n) for n in value.shape)
        assert files.read(stored[name], whole).tobytes() == value.tobytes()
    sizes = [path.stat().st_size for path in sorted((tmp_path / "ours").glob("*.safetensors"))]
    assert len(sizes) > 2 and max(sizes) < 6000 + 4096  # With the header.
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in weights.values())
    for path in sorted((tmp_path / "ours").iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(UserError, match="exists; choose another folder"):
        save(model, "deepseek_v3", folder)


def test_another_dtype_is_asked_for(folder):
    model = load(folder, make_mesh(ONE), dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(arrays_of(model))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(jnp.bfloat16)}
    mixed = weights_of("mixtral")
    mixed["model.layers.1.input_layernorm.weight"] = np.ones(16, np.float16)
    write(folder, config_of("mixtral"), mixed)
    with pytest.raises(UserError, match="have dtypes float16, float32; choose one with dtype"):
        load(folder, make_mesh(ONE))


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: without(w, NORM), f"has no tensor {NORM}"),
        (lambda w: w | {NORM: np.ones(8, np.float32)}, r"is \(8,\), but its config.json makes it \(16,\)"),
        (lambda w: w | {"model.extra": np.ones(8, np.float32)}, "has a tensor model.extra, which"),
        (lambda w: w | {NORM: np.ones(16, np.int64)}, "is of dtype I64; convert it"),
    ],
)  # fmt: skip
def test_damaged_tensors(folder, change, message):
    write(folder, config_of("mixtral"), change(weights_of("mixtral")))
    with pytest.raises(UserError, match=message):
        load(folder, make_mesh(ONE))


def test_damaged_folders(folder, tmp_path):
    with pytest.raises(UserError, match="has no readable config"):
        load(tmp_path / "elsewhere", make_mesh(ONE))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load(folder, make_mesh(ONE))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        load(folder, make_mesh(ONE))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        load(folder, make_mesh(ONE))


def test_a_failure_leaves_no_folder(folder, tmp_path, monkeypatch):
    model = load(folder, make_mesh(ONE))
    monkeypatch.setattr(saving, "_part_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(model, "mixtral", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mixtral"]
