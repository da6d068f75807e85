"""Fields of config.json: read with the family's own defaults, known not to matter, or refused."""

import dataclasses
import json
import math

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.interop.huggingface.families import FAMILIES, family_of
from moe_jax.interop.huggingface.fields import IRRELEVANT
from moe_jax.layers.feed_forward import Activation
from moe_jax.layers.positions import RotaryScaling
from tests.interop.folders import MODELS, PARITY, config_of

DECODERS = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]
PLAIN = DECODERS[:4]


def read(name, **fields):
    """Our config of a tiny model with other fields; `...` takes one out."""
    hf = {key: value for key, value in (config_of(name) | fields).items() if value is not ...}
    return FAMILIES[hf["model_type"]].config_from_hf(hf)


@pytest.mark.parametrize("name", MODELS)
def test_an_unknown_field_is_refused_unless_it_asks_for_nothing(name):
    with pytest.raises(UserError, match=r"has logit_cap=30\.0, a field that is not known for"):
        read(name, logit_cap=30.0)
    assert read(name, logit_cap=None, experts_bias=False, extra=[]) == read(name)


@pytest.mark.parametrize("name", MODELS)
def test_fields_that_change_no_model(name):
    further = {
        "_name_or_path": "somewhere", "auto_map": {"AutoModel": "modeling.Model"}, "top_k": 50,
        "eos_token_id": [1, 2], "max_length": 20, "use_cache": False, "attn_implementation": "sdpa",
    }  # fmt: skip
    assert read(name, **further) == read(name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "fields",
    [{"pruned_heads": {"0": [1]}}, {"per_layer_config": {"0": {}}}, {"is_encoder_decoder": 1}],
)
def test_fields_that_change_any_model(name, fields):
    with pytest.raises(UserError, match=f"config.json has {next(iter(fields))}="):
        read(name, **fields)


@pytest.mark.parametrize(
    "name, field, default",
    [
        ("mixtral", "rms_norm_eps", ("norm_epsilon", 1e-5)),
        ("olmoe", "rms_norm_eps", ("norm_epsilon", 1e-5)),
        ("qwen2_moe", "rms_norm_eps", ("norm_epsilon", 1e-6)),
        ("deepseek_v2", "first_k_dense_replace", ("moe_layers", [0, 1])),
        ("deepseek_v3", "first_k_dense_replace", ("moe_layers", [])),
        ("deepseek_v3", "routed_scaling_factor", ("moe.router.gate_scale", 2.5)),
        ("deepseek_v2", "routed_scaling_factor", ("moe.router.gate_scale", 1.0)),
        ("deepseek_v2", "topk_method", ("moe.router.k", 3)),
        ("mixtral", "hidden_act", ("moe.experts.activation", Activation.SILU)),
        ("vit", "hidden_act", ("feed_forward.activation", Activation.GELU_EXACT)),
        ("vit", "layer_norm_eps", ("norm_epsilon", 1e-12)),
        ("qwen2_moe", "qkv_bias", ("attention.qkv_bias", True)),
        ("qwen3_moe", "norm_topk_prob", ("moe.router.renormalize", False)),
        ("deepseek_v3", "norm_topk_prob", ("moe.router.renormalize", True)),
        ("t5", "dropout_rate", ("encoder.dropout", 0.1)),
        ("switch", "dense_act_fn", ("encoder.feed_forward.activation", Activation.RELU)),
    ],
)
def test_a_missing_field_is_the_family_s_default(name, field, default):
    path, value = default
    found = read(name, **{field: ...})
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    "name, alias, field",
    [
        ("mixtral", "num_experts", "num_local_experts"),
        ("olmoe", "num_local_experts", "num_experts"),
        ("deepseek_v2", "num_experts", "n_routed_experts"),
        ("deepseek_v3", "num_local_experts", "n_routed_experts"),
        ("t5", "hidden_size", "d_model"),
        ("t5", "head_dim", "d_kv"),
        ("switch", "num_hidden_layers", "num_layers"),
    ],
)
def test_a_field_with_two_names(name, alias, field):
    value = config_of(name)[field]
    assert read(name, **{field: ..., alias: value}) == read(name)
    assert read(name, **{alias: value}) == read(name)
    with pytest.raises(UserError, match=f"{field}={value} and {alias}=77, which are two names"):
        read(name, **{alias: 77})


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("mixtral", {"hidden_size": "16"}, "hidden_size='16', but a mixtral needs a whole number"),
        ("mixtral", {"hidden_size": True}, "hidden_size=True, but a mixtral needs a whole number"),
        ("mixtral", {"num_key_value_heads": None}, "num_key_value_heads=None, but a mixtral needs"),
        ("mixtral", {"num_key_value_heads": 3}, "num_key_value_heads=3, which does not divide"),
        ("mixtral", {"num_experts_per_tok": None}, "num_experts_per_tok=None, but a mixtral needs"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9, but 4 experts"),
        ("mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan, but a mixtral needs a finite"),
        ("mixtral", {"tie_word_embeddings": None}, "tie_word_embeddings=None, but a mixtral needs true"),
        ("mixtral", {"head_dim": 5}, "gives heads of 5 numbers"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1; only"),
        ("mixtral", {"num_hidden_layers": 10**7}, "whole number from 1 to 10000"),
        ("mixtral", {"dtype": "float8"}, "dtype='float8'; supported are float32"),
        ("mixtral", {"layer_types": ["sliding_attention"] * 2}, "has layer_types="),
        ("olmoe", {"sliding_window": 8}, "sliding_window=8; only"),
        ("olmoe", {"head_dim": 8}, "head_dim=8; only head_dim=4"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0, but a qwen3_moe needs"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers='0', but a qwen3_moe needs a list"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8; only"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2; only num_key_value_heads=4"),
        ("deepseek_v2", {"q_lora_rank": 0}, "q_lora_rank=0, but a deepseek_v2 needs"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": ...}, "no n_group, which"),
        ("deepseek_v3", {"n_group": None}, "n_group=None, but a deepseek_v3 needs"),
        ("deepseek_v3", {"n_group": 3}, "n_group=3, which does not divide n_routed_experts=8"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group=5, but n_group=4"),
        ("deepseek_v3", {"topk_group": 1}, "num_experts_per_tok=3, but topk_group=1 groups have 2"),
        ("deepseek_v3", {"head_dim": 6}, "head_dim=6; only head_dim=8"),
        ("deepseek_v3", {"qk_rope_head_dim": 7, "head_dim": 7}, "qk_rope_head_dim=7; rotary"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True; only"),
        ("t5", {"is_gated_act": 1}, "is_gated_act=1, but a t5 needs true or false"),
        ("t5", {"dense_act_fn": "quick_gelu"}, "dense_act_fn='quick_gelu'; supported are"),
        ("t5", {"tie_encoder_decoder": True}, "tie_encoder_decoder=True; only"),
        ("switch", {"router_dtype": "bfloat16"}, "router_dtype='bfloat16'; only"),
        ("switch", {"is_gated_act": True}, "is_gated_act=True; only"),
        ("vit", {"image_size": [8, 16]}, r"image_size=\[8, 16\], but a vit needs"),
        ("vit", {"head_dim": 6}, "head_dim=6; only"),
        ("vit", {"id2label": {}}, r"id2label=\{\}, but a vit needs the names"),
        ("vit", {"num_labels": 3}, "num_labels=3, but id2label has 5"),
    ],
)  # fmt: skip
def test_values_that_are_refused_by_name(name, fields, message):
    with pytest.raises(UserError, match=message):
        read(name, **fields)


ODD = (None, -1, 0, 1.5, True, 10**400, math.nan, math.inf, "", "x", [], [None], {}, {"x": []})


@pytest.mark.parametrize("name", MODELS)
def test_no_value_of_any_field_is_an_error_of_python(name):
    rope = {"factor": 2.0, "rope_type": "yarn", "original_max_position_embeddings": 16}
    further = {"torch_dtype": "float32", "num_labels": None, "quantization_config": {}}
    if name in DECODERS:
        further |= {"rope_scaling": rope, "rope_theta": 500.0, "layer_types": None}
    hf = further | config_of(name)
    changes = [{field: value} for field in hf for value in ODD]
    if name in DECODERS:
        keys = (*rope, "attention_factor", "mscale", "beta_fast", "truncate", "rope_theta", "type")
        changes += [{"rope_scaling": rope | {key: value}} for key in keys for value in ODD]
    read_without_error = 0
    for change in changes:
        changed = hf | change
        try:
            family_of(changed).config_from_hf(changed).validate()
            read_without_error += 1
        except UserError as error:
            assert len(str(error)) < 400, change
    assert 0 < read_without_error < len(changes)


def test_what_transformers_derives_is_read_where_it_is_given():
    form = read("t5", dense_act_fn="silu", is_gated_act=False).encoder.feed_forward
    assert (form.activation, form.gated) == (Activation.SILU, False)
    form = read("t5", feed_forward_proj="gated-gelu", dense_act_fn=..., is_gated_act=...)
    assert form.decoder.feed_forward.activation == Activation.GELU
    assert read("vit", image_size=[8, 8]) == read("vit")
    assert read("mixtral", sliding_window=64) == read("mixtral", sliding_window=None)
    dense = read("qwen3_moe", num_experts=0, num_local_experts=...)
    assert dense.moe_layers == [] and dense.mlp_width == 40


DEFAULTS = json.loads((PARITY.parents[1] / "huggingface" / "default_configs.json").read_text())


@pytest.mark.parametrize("version", DEFAULTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_fields_of_both_versions_are_known(version, family):
    """Each is read, and then refuses what it cannot be, or is known to change nothing."""
    hf = DEFAULTS[version][family] | {"model_type": family}
    # The one field that has to be given, because its default is null.
    hf |= {"num_experts_per_tok": 6} if family == "deepseek_v2" else {}
    config = FAMILIES[family].config_from_hf(hf)
    config.validate()
    unread = IRRELEVANT | FAMILIES[family].irrelevant
    for field in hf.keys() - unread - NOT_OF_THIS_MODEL:
        # Perhaps it is another name of one.
        name = FAMILIES[family].aliases.get(field, field)
        with pytest.raises(UserError, match=f"config.json has {name}="):
            FAMILIES[family].config_from_hf(hf | {field: [{}]})


# Of models with windows, or with experts in groups, which these configs do not make.
NOT_OF_THIS_MODEL = {"sliding_window", "n_group", "topk_group"}


# --- Rotary positions ---


def spellings(parameters, base):
    """The same rotary positions in every way that transformers 4 and 5 read them."""
    old = {"type" if key == "rope_type" else key: value for key, value in parameters.items()}
    none = {"rope_parameters": ..., "rope_scaling": ..., "rope_theta": ...}
    return [
        none | {"rope_parameters": parameters | {"rope_theta": base}},
        none | {"rope_parameters": old | {"rope_theta": base}},
        none | {"rope_parameters": parameters, "rope_theta": base},
        none | {"rope_scaling": parameters, "rope_theta": base},
        none | {"rope_scaling": old, "rope_theta": base, "rope_parameters": None},
        none
        | {"rope_scaling": old, "rope_parameters": {"rope_type": "default"}, "rope_theta": base},
        none | {"rope_scaling": parameters | {"rope_theta": base}, "rope_parameters": {}},
    ]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_every_spelling_is_the_same(name, kind):
    parameters = {"rope_type": kind}
    if kind == "yarn":
        parameters |= {"factor": 4.0, "original_max_position_embeddings": 16}
    wanted = RotaryScaling(4.0, 16) if kind == "yarn" else RotaryScaling()
    for fields in spellings(parameters, 5000.0):
        attention = read(name, **fields).attention
        assert (attention.rotary_base, attention.rotary_scaling) == (5000.0, wanted), fields


def test_bases_that_are_not_given():
    none = {"rope_parameters": None, "rope_scaling": {}, "rope_theta": ...}
    assert {name: read(name, **none).attention.rotary_base for name in DECODERS} == {
        name: 1e6 if name == "mixtral" else 1e4 for name in DECODERS
    }
    # A scaling takes the place of all of rope_parameters, its base included.
    yarn = {"rope_type": "yarn", "factor": 2.0}
    attention = read("qwen3_moe", rope_parameters={"rope_theta": 5.0}, rope_scaling=yarn).attention
    assert attention.rotary_base == 1e4
    assert attention.rotary_scaling.original_length == 64


YARN = [
    {},
    {"attention_factor": 0.7},
    {"attention_factor": None, "beta_fast": None, "beta_slow": None},
    {"mscale": 0.707},
    {"mscale_all_dim": 0.707},
    {"mscale": 0.5, "mscale_all_dim": 0.8},
    {"mscale": 0.5, "mscale_all_dim": 0.8, "attention_factor": 1.7},
    {"mscale": 0, "mscale_all_dim": 0.8, "beta_fast": 0, "beta_slow": 0},
    {"beta_fast": 4, "beta_slow": 0.5, "truncate": True},
    {"factor": None, "original_max_position_embeddings": 16},
]


def by_transformers(parameters, width, base, length, scales_scores):
    """[width / 2] frequencies, the factor of vectors and that of scores, as transformers 5 has them."""
    original = parameters.get("original_max_position_embeddings", length)
    factor = parameters["factor"] or length / original

    def m(scale):
        return 0.1 * scale * math.log(factor) + 1

    scale, of_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    vectors = parameters.get("attention_factor")
    if vectors is None:
        vectors = m(scale) / m(of_all) if scale and of_all else m(1)
    fast, slow = (parameters.get(f"beta_{n}") or d for n, d in (("fast", 32), ("slow", 1)))
    turns = [
        math.log(original / (2 * math.pi * n)) * width / (2 * math.log(base)) for n in (fast, slow)
    ]
    low, high = max(math.floor(turns[0]), 0), min(math.ceil(turns[1]), width - 1)
    pairs = np.arange(width // 2)
    plain = base ** (-2 * pairs / width)
    slowed = np.clip((pairs - low) / (high - low or 0.001), 0, 1)
    scores = m(of_all) ** 2 if of_all and scales_scores else 1.0
    return plain * (1 - slowed) + plain / factor * slowed, vectors, scores


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("optional", YARN, ids=str)
def test_yarn_with_each_optional_field(name, optional):
    parameters = {"rope_type": "yarn", "factor": 4.0, **optional}
    config = read(name, rope_parameters=parameters | {"rope_theta": 500.0})
    latent = name.startswith("deepseek")
    width = config.attention.rotary_width if latent else config.head_width
    right = by_transformers(parameters, width, 500.0, 64, latent)
    scaling = config.attention.rotary_scaling
    np.testing.assert_allclose(scaling.frequencies(width // 2, 500.0), right[0], rtol=1e-6)
    np.testing.assert_allclose((scaling.of_vectors, scaling.of_scores), right[1:], rtol=1e-12)
    # And what we write of it is read as the same by transformers 4 and 5 and by us.
    written = FAMILIES[config_of(name)["model_type"]].config_to_hf(config)
    scaled = written["rope_scaling"]
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500.0
    for found in (scaled, written["rope_parameters"]):
        assert found["rope_type"] == "yarn" and scaled["type"] == "yarn"
        again = by_transformers(found, width, 500.0, 64, latent)
        for a, b in zip(again, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    again = FAMILIES[written["model_type"]].config_from_hf(written).attention.rotary_scaling
    for field in dataclasses.fields(RotaryScaling):
        assert getattr(again, field.name) == pytest.approx(getattr(scaling, field.name), rel=1e-12)


def test_a_length_beside_the_scaling_takes_its_place():
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    config = read("qwen3_moe", rope_scaling=yarn, original_max_position_embeddings=32)
    assert config.attention.rotary_scaling.original_length == 32


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_type": "linear", "factor": 2.0}, "of type 'linear' in rope_parameters"),
        ({"type": "dynamic", "factor": 2.0}, "of type 'dynamic' in rope_parameters"),
        ({"rope_type": None}, "of type None in rope_parameters"),
        ({"rope_type": "default", "factor": 2.0}, "factor=2.0 in rope_parameters, which rotary"),
        ({"rope_type": "yarn"}, "yarn in rope_parameters without factor"),
        ({"rope_type": "yarn", "factor": "4"}, "rope_parameters.factor='4', but"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor=0.5 in rope_parameters; texts"),
        ({"rope_type": "yarn", "factor": 1.0, "attention_factor": 2.0}, "attention_factor=2.0"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": False}, "truncate=False in"),
        ({"rope_type": "yarn", "factor": 4.0, "finetuned": 3}, "finetuned=3 in rope_parameters"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5}, "beta_fast=0.5 and beta_slow=1.0"),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}, "rope_theta=1.0; with yarn"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}, "=0, but a"),
        (
            {"rope_type": "yarn", "factor": 4.0, "attention_factor": -1.0},
            "attention_factor=-1.0, but",
        ),
        ({"rope_theta": None}, "rope_theta=None, but"),
        ({"rope_theta": 0}, "rope_theta=0, but"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 in rope_parameters; only"),
        ([1], r"rope_parameters=\[1\], but it has to be an object"),
    ],
    ids=str,
)
def test_rotary_positions_that_are_refused(name, rope, message):
    if isinstance(rope, dict):
        rope = {"rope_theta": 500.0, **rope}
    with pytest.raises(UserError, match=message):
        read(name, rope_parameters=rope)


def test_a_length_without_pairs_to_interpolate():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1}
    # With a small base the slowest pair would turn before the fastest.
    with pytest.raises(UserError, match="for which no pair of 8 numbers turns"):
        read("deepseek_v3", rope_parameters=yarn | {"rope_theta": 2.0})
