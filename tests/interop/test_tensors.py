"""Tensors of a folder: none is skipped by its name, tables are compared, the index is followed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import files
from moe_jax.interop.huggingface.loading import load, load_with_tokenizer
from moe_jax.interop.huggingface.saving import save
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.models.abstract_model import arrays_of
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from tests.interop.folders import config_of, weights_of, write

DECODERS = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]
EMBEDDED, HEAD, SHARED = "model.embed_tokens.weight", "lm_head.weight", "shared.weight"
ENCODER, DECODER = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


def loaded(folder, name, change=lambda weights: weights, **fields):
    write(folder, config_of(name) | fields, change(weights_of(name)))
    return load(folder, make_mesh(MeshConfig()))


def other(table):
    return np.random.default_rng(1).normal(size=table.shape).astype(np.float32)


# --- Tied tables ---


@pytest.mark.parametrize("name", DECODERS)
def test_a_tied_decoder(name, tmp_path):
    """The output layer is the table if it is equal or missing, and its own if it differs."""
    table = weights_of(name)[EMBEDDED]
    without = {key: a for key, a in weights_of(name).items() if key != HEAD}
    cases = {
        "missing": ({}, None),
        "equal": ({HEAD: table.copy()}, None),
        "differing": ({HEAD: other(table)}, other(table)),
    }
    for case, (further, output) in cases.items():
        change = lambda _, further=further: without | further  # noqa: E731
        model = loaded(tmp_path / case, name, change, tie_word_embeddings=True)
        assert model.config.tied == (output is None)
        np.testing.assert_array_equal(model.tokens.table[...], table)
        if output is not None:
            np.testing.assert_array_equal(model.tokens.output[...], output)
            save(model, config_of(name)["model_type"], tmp_path / "back")
            back = load_file(tmp_path / "back" / "model.safetensors")
            np.testing.assert_array_equal(back[HEAD], output)
    # Tied, but by the other name.
    only = {key: a for key, a in without.items() if key != EMBEDDED} | {HEAD: other(table)}
    model = loaded(tmp_path / "only", name, lambda _: only, tie_word_embeddings=True)
    assert model.config.tied
    np.testing.assert_array_equal(model.tokens.table[...], other(table))


def test_an_untied_decoder_needs_its_output_layer(tmp_path):
    with pytest.raises(UserError, match=r"has no tensor lm_head.weight, which a mixtral with its"):
        loaded(tmp_path / "other", "mixtral", lambda w: {k: a for k, a in w.items() if k != HEAD})


def tables_of(model):
    """Of the encoder, of the decoder and of the output layer."""
    targets = model.inputs if model.targets is None else model.targets
    output = targets.table if targets.output is None else targets.output
    return [np.asarray(a[...]) for a in (model.inputs.table, targets.table, output)]


@pytest.mark.parametrize("name", ["switch", "t5"])
@pytest.mark.parametrize(
    "present", [(SHARED,), (ENCODER,), (DECODER, HEAD), (HEAD,), (SHARED, ENCODER, DECODER, HEAD)]
)
def test_equal_tables_of_an_encoder_decoder_are_one(name, present, tmp_path):
    """Whichever of them the folder has; T5 v1.1 has one of its own for the output, see below."""
    table = other(weights_of(name)[SHARED])
    fields = {"tie_word_embeddings": True, "scale_decoder_outputs": True}
    fields = fields if name == "t5" else {"tie_word_embeddings": True}
    change = lambda w: without_tables(w) | {key: table.copy() for key in present}  # noqa: E731
    model = loaded(tmp_path / name, name, change, **fields)
    assert model.config.tied and model.targets is None and model.inputs.output is None
    np.testing.assert_array_equal(model.inputs.table[...], table)


def without_tables(weights):
    return {k: a for k, a in weights.items() if k not in (SHARED, ENCODER, DECODER, HEAD)}


def test_three_tables(tmp_path):
    """What transformers 5 trains of an untied Switch, and of a T5 whose tables differ."""
    for name, fields in (
        ("switch", {"tie_word_embeddings": False}),
        ("t5", {"scale_decoder_outputs": False}),
    ):
        shape = weights_of(name)[SHARED].shape
        three = [np.full(shape, i, np.float32) for i in (1, 2, 3)]
        names = (ENCODER, DECODER, HEAD)
        further = dict(zip(names, three, strict=True)) | {SHARED: np.zeros(shape, np.float32)}
        change = lambda w, further=further: without_tables(w) | further  # noqa: E731
        model = loaded(tmp_path / name, name, change, **fields)
        for found, right in zip(tables_of(model), three, strict=True):
            np.testing.assert_array_equal(found, right)
        with pytest.raises(UserError, match="target_vocab_size is 48, which gives the targets a"):
            save(model, config_of(name)["model_type"], tmp_path / "back")


def test_an_untied_switch(tmp_path):
    """transformers 4 writes one table and the output layer; what we write both versions read."""
    head = other(weights_of("switch")[SHARED])
    model = loaded(
        tmp_path / "theirs", "switch", lambda w: w | {HEAD: head}, tie_word_embeddings=False
    )
    assert not model.config.tied and model.config.embedding_scaling == EmbeddingScaling.NONE
    save(model, "switch_transformers", tmp_path / "ours")
    back = load_file(tmp_path / "ours" / "model.safetensors")
    for key in (SHARED, ENCODER, DECODER):
        np.testing.assert_array_equal(back[key], weights_of("switch")[SHARED])
    again = load(tmp_path / "ours", make_mesh(MeshConfig()))
    assert again.config == model.config
    with pytest.raises(UserError, match=r"has no tensor lm_head.weight"):
        loaded(tmp_path / "none", "switch", tie_word_embeddings=False)


@pytest.mark.parametrize("name", ["switch", "t5"])
def test_an_output_layer_of_its_own_with_a_tied_one_s_scale(name, tmp_path):
    fields = {"tie_word_embeddings": True} | (
        {"scale_decoder_outputs": True} if name == "t5" else {}
    )
    head = other(weights_of(name)[SHARED])
    with pytest.raises(
        UserError, match=r"tensor lm_head.weight differs from .*, but config.json has"
    ):
        loaded(tmp_path / name, name, lambda w: w | {HEAD: head}, **fields)


def test_t5_without_scale(tmp_path):
    """The output layer is tied only if it is not there."""
    change = lambda w: {k: a for k, a in w.items() if k != HEAD}  # noqa: E731
    model = loaded(tmp_path / "tied", "t5", change)
    assert model.config.tied and model.config.embedding_scaling == EmbeddingScaling.NONE
    save(model, "t5", tmp_path / "ours")
    # transformers 4 ties only what scales.
    back = load_file(tmp_path / "ours" / "model.safetensors")
    np.testing.assert_array_equal(back[HEAD], back[SHARED])
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (written["tie_word_embeddings"], written["scale_decoder_outputs"]) == (False, False)


# --- Names ---


def test_layers_that_predict_further_tokens(tmp_path):
    """After the last layer, at any depth, and only if they join two vectors."""
    layers = config_of("deepseek_v3")["num_hidden_layers"]
    copied = {
        key.replace(f"layers.{layers - 1}.", f"layers.{after}."): a
        for key, a in weights_of("deepseek_v3").items()
        if f"layers.{layers - 1}." in key
        for after in (layers, layers + 1)
    }
    joined = {
        f"model.layers.{layers + i}.eh_proj.weight": np.ones((16, 32), np.float32) for i in (0, 1)
    }
    plain = loaded(tmp_path / "plain", "deepseek_v3")
    further = loaded(tmp_path / "further", "deepseek_v3", lambda w: w | copied | joined)
    for a, b in zip(*(jax.tree.leaves(arrays_of(m)) for m in (plain, further)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(
        UserError, match=rf"has a tensor model.layers.{layers}\..*, which a deepseek_v3"
    ):
        loaded(tmp_path / "layer", "deepseek_v3", lambda w: w | copied)
    # Not before the end either, whatever the number is.
    early = {"model.layers.0.eh_proj.weight": np.ones((16, 32), np.float32)}
    with pytest.raises(UserError, match=r"has a tensor model.layers.0.eh_proj.weight"):
        loaded(tmp_path / "early", "deepseek_v3", lambda w: w | early)


def test_frequencies_are_read_and_compared(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    right = 1e6 ** (-np.arange(2) / 2)
    model = loaded(tmp_path / "right", "mixtral", lambda w: w | {name: right.astype(np.float32)})
    assert model.config.attention.rotary_base == 1e6
    wrong = 1e4 ** (-np.arange(2) / 2)
    with pytest.raises(UserError, match=f"has a tensor {name}, which"):
        loaded(tmp_path / "wrong", "mixtral", lambda w: w | {name: wrong.astype(np.float32)})


def test_a_tensor_that_nothing_reads(tmp_path):
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    loaded(tmp_path / "t5", "t5", lambda w: w | {name: np.ones((32, 3), np.float32)})
    name = name.replace("block.0", "block.1")
    with pytest.raises(UserError, match=f"has a tensor {name}, which"):
        loaded(tmp_path / "other", "t5", lambda w: w | {name: np.ones((32, 3), np.float32)})


def fused(weights, name):
    """The names and shapes that transformers 5 has in memory."""
    prefixes = {
        key.partition(".experts.")[0]
        for key in weights
        if ".experts." in key and "shared" not in key
    }
    found = dict(weights)
    mixtral = name == "mixtral"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for prefix in prefixes:
        matrices = []
        for matrix in names:
            experts = []
            while (key := f"{prefix}.experts.{len(experts)}.{matrix}.weight") in found:
                experts.append(found.pop(key))
            matrices.append(np.stack(experts))
        gate, into, out = matrices
        found[f"{prefix}.experts.gate_up_proj"] = np.concatenate([gate, into], axis=1)
        found[f"{prefix}.experts.down_proj"] = out
    return {key.replace("block_sparse_moe", "mlp"): a for key, a in found.items()}


@pytest.mark.parametrize("name", DECODERS)
def test_fused_experts(name, tmp_path):
    plain = loaded(tmp_path / "plain", name)
    write(tmp_path / "fused", config_of(name), fused(weights_of(name), name))
    mesh = MeshConfig(data=2, expert=2, model=2)
    for model in (load(tmp_path / "fused", make_mesh(m)) for m in (MeshConfig(), mesh)):
        for a, b in zip(*(jax.tree.leaves(arrays_of(m)) for m in (plain, model)), strict=True):
            np.testing.assert_array_equal(a, b)
    both = weights_of(name) | fused(weights_of(name), name)
    with pytest.raises(UserError, match="which is the same in another format"):
        loaded(tmp_path / "both", name, lambda _: both)


def test_images_in_the_new_format(tmp_path):
    def new(weights):
        changes = {
            "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
            "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
            "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "encoder.layer.": "layers.",
        }  # fmt: skip
        found = {}
        for key, a in weights.items():
            for old, name in changes.items():
                key = key.replace(old, name)
            found[key] = a
        assert "vit.layers.0.mlp.fc2.bias" in found
        return found

    plain, model = (loaded(tmp_path / n, "vit", f) for n, f in (("a", lambda w: w), ("b", new)))
    for a, b in zip(*(jax.tree.leaves(arrays_of(m)) for m in (plain, model)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(4, 24), (4, 23, 16), (4, 24, 16, 1)])
def test_fused_experts_that_are_none(shape, tmp_path):
    further = {"model.layers.0.mlp.experts.gate_up_proj": np.ones(shape, np.float32)}
    with pytest.raises(UserError, match="which are no experts' matrices"):
        loaded(tmp_path / "olmoe", "olmoe", lambda w: w | further)


# --- Files ---


def sharded(folder, name, files_of):
    """Writes {file: tensors}, and the index as given by {tensor: file}."""
    config, weights = config_of(name), weights_of(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    index = {key: file for file, keys in halves.items() for key in keys}
    contents = {file: {key: weights[key] for key in keys} for file, keys in halves.items()}
    files_of(contents, index)
    for file, tensors in contents.items():
        save_file(tensors, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return weights


def test_the_index_says_which_file_has_a_tensor(tmp_path):
    def stale(contents, index):
        """Every tensor is in both files; the index says which one counts."""
        for file, other_file in (("one", "two"), ("two", "one")):
            for key in [k for k, f in index.items() if f == f"{file}.safetensors"]:
                contents[f"{other_file}.safetensors"][key] = np.zeros_like(
                    contents[f"{file}.safetensors"][key]
                )
        contents["two.safetensors"]["left.over"] = np.ones(3, np.float32)

    weights = sharded(tmp_path / "stale", "olmoe", stale)
    stored = files.tensors_of(tmp_path / "stale")
    assert stored.keys() == weights.keys()
    for key, value in weights.items():
        found = files.read(stored[key], tuple(slice(0, n) for n in value.shape))
        np.testing.assert_array_equal(found, value)


def test_a_single_file_goes_before_an_index(tmp_path):
    """As in transformers; the index may be of files that are gone."""
    weights = sharded(tmp_path / "both", "olmoe", lambda *_: None)
    save_file({key: 2 * a for key, a in weights.items()}, tmp_path / "both" / "model.safetensors")
    (tmp_path / "both" / "one.safetensors").unlink()
    model = load(tmp_path / "both", make_mesh(MeshConfig()))
    np.testing.assert_array_equal(model.norm.scale[...], 2 * weights["model.norm.weight"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", r"index\.json is damaged"),
        (b"\xff\xfe", r"index\.json is damaged"),
        ("[]", r"index\.json holds a list, not an object"),
        ("{}", r"index\.json has no weight_map"),
        ('{"weight_map": []}', r"index\.json has no weight_map"),
        ('{"weight_map": {}}', r"index\.json has no weight_map"),
        ('{"weight_map": {"a": 5}}', "has tensor a in 5, which is no file of its folder"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"tensor a in '\.\./x\.safetensors', which is no"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "tensor a in '/etc/passwd', which is no file"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors cannot be read"),
        ('{"weight_map": {"a": "config.json"}}', r"config\.json cannot be read"),
        ('{"weight_map": {"a": "x.safetensors"}}', r"tensor a in x\.safetensors, which does not hold it"),
    ],
)  # fmt: skip
def test_a_damaged_index(text, message, tmp_path):
    write(tmp_path, config_of("olmoe"), weights_of("olmoe"))
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        load(tmp_path, make_mesh(MeshConfig()))


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"', b"\xff", "[" * 100_000])
def test_a_config_that_is_none(text, tmp_path):
    write(tmp_path, config_of("olmoe"), weights_of("olmoe"))
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"config\.json (holds a|is damaged)"):
        load(tmp_path, make_mesh(MeshConfig()))


def test_an_adapter_beside_the_model(tmp_path):
    write(tmp_path, config_of("olmoe"), weights_of("olmoe"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge the adapter into the model"):
        load(tmp_path, make_mesh(MeshConfig()))


# --- Dtypes ---


def test_a_dtype_rounds_no_expert_s_bias(tmp_path):
    """20.001 to 20.008 are all 20 in bfloat16; transformers keeps these in float32."""
    bias = (20 + np.arange(1, 9) / 1000).astype(np.float32)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    write(tmp_path, config_of("deepseek_v3"), weights_of("deepseek_v3") | {name: bias})
    for dtype in (jnp.bfloat16, jnp.float16, None):
        model = load(tmp_path, make_mesh(MeshConfig()), dtype=dtype)
        parameters, variables = arrays_of(model)
        assert {a.dtype for a in jax.tree.leaves(parameters)} == {np.dtype(dtype or jnp.float32)}
        (found,) = jax.tree.leaves(variables)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found.reshape(-1), bias)
    # Those of a file in 16 bits are as precise again as training needs them.
    rounded = weights_of("deepseek_v3") | {name: bias.astype(jnp.bfloat16)}
    write(tmp_path, config_of("deepseek_v3"), rounded)
    (found,) = jax.tree.leaves(arrays_of(load(tmp_path, make_mesh(MeshConfig())))[1])
    assert found.dtype == jnp.float32


@pytest.mark.parametrize(
    "fields, dtype",
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({"dtype": "float16"}, "float32"),
    ],
)
def test_the_dtype_that_a_model_computes_in(fields, dtype, tmp_path):
    assert loaded(tmp_path / "model", "olmoe", **fields).config.dtype == dtype


def test_t5_keeps_what_float16_has_no_room_for(tmp_path):
    write(tmp_path, config_of("t5"), weights_of("t5"))
    half, brain = (
        arrays_of(load(tmp_path, make_mesh(MeshConfig()), dtype=dtype))[0]
        for dtype in (jnp.float16, jnp.bfloat16)
    )
    block = half["encoder"]["stages"][0]["blocks"][0]["mlp"]
    assert block["w_out"].dtype == jnp.float32 and block["w_in"].dtype == jnp.float16
    assert {a.dtype for a in jax.tree.leaves(brain)} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "value, dtype, message",
    [
        (np.nan, None, r"tensor model.norm.weight of .* has numbers that are not finite"),
        (np.inf, jnp.bfloat16, "has numbers that are not finite"),
        (1e6, jnp.float16, "has numbers that float16 does not have; choose another dtype"),
    ],
)
def test_numbers_that_are_none(value, dtype, message, tmp_path):
    name = "model.norm.weight"
    damaged = weights_of("olmoe")[name].copy()
    damaged[3] = value
    write(tmp_path, config_of("olmoe"), weights_of("olmoe") | {name: damaged})
    with pytest.raises(UserError, match=message):
        load(tmp_path, make_mesh(MeshConfig()), dtype=dtype)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("olmoe", {"num_hidden_layers": 10_000}),
        ("olmoe", {"num_experts": 100_000}),
        ("switch", {"num_layers": 9000, "encoder_sparse_step": 1}),
        ("vit", {"num_hidden_layers": 10_000}),
    ],
)
def test_sizes_that_no_folder_has(name, fields, tmp_path):
    """Before anything is built of them, which would take hours."""
    with pytest.raises(
        UserError, match=r"but the folder has \d+ tensors; they do not belong together"
    ):
        loaded(tmp_path / name, name, **fields)


def test_further_fields_make_no_other_model(tmp_path):
    model = loaded(tmp_path / "theirs", "mixtral")
    save(model, "mixtral", tmp_path / "ours", {"eos_token_id": [2, 3], "pad_token_id": 0})
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["eos_token_id"] == [2, 3]
    yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    for further, message in (
        (yarn, "it would lose model.attention.rotary_scaling.factor"),
        ({"num_experts_per_tok": 1}, "it would lose model.moe.router.k=2"),
        ({"logit_cap": 1.0}, "has logit_cap=1.0, a field that is not known"),
    ):
        with pytest.raises(UserError, match=message):
            save(model, "mixtral", tmp_path / "other", further)


@pytest.mark.parametrize("kind", ["folder", "loop", "empty"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", INDEX])
def test_files_that_are_none(name, kind, tmp_path):
    write(tmp_path, config_of("olmoe") | {"eos_token_id": 2}, weights_of("olmoe"))
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    library.save(str(tmp_path / "tokenizer.json"))
    if name == INDEX:
        (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    path = tmp_path / name
    path.unlink(missing_ok=True)
    {"folder": path.mkdir, "loop": lambda: path.symlink_to(name), "empty": path.touch}[kind]()
    with pytest.raises(UserError, match=r"has no|has neither|cannot be read|is damaged"):
        load_with_tokenizer(tmp_path, make_mesh(MeshConfig()))


@pytest.mark.parametrize("folder", ["a" * 300, "a\0b", "/dev/null", "/nowhere"])
def test_folders_that_cannot_be(folder):
    for opened in (load, load_with_tokenizer):
        with pytest.raises(UserError, match=r"has no|is damaged|is no folder"):
            opened(folder, make_mesh(MeshConfig()))
