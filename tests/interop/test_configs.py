import types

import pytest

from moe_jax.errors import UserError
from moe_jax.interop.huggingface.families import FAMILIES, family_of
from moe_jax.interop.huggingface.saving import save
from moe_jax.layers.positions import RotaryScaling
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import SparseDense
from moe_jax.routing.deepseek import DeepSeekV2
from moe_jax.routing.expert_choice import ExpertChoice
from tests.configs.test_rows import shared_objects
from tests.interop.folders import MODELS, config_of


def test_every_family_has_a_reference():
    assert {config_of(name)["model_type"] for name in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_survives_writing_and_reading(name):
    hf = config_of(name)
    family = family_of(hf)
    config = family.config_from_hf(hf)
    config.validate()
    assert shared_objects(config) == []
    written = family.config_to_hf(config)
    assert family_of(written).config_from_hf(written) == config
    # What transformers wrote too is the same, but for its own words for the same.
    same_meaning = {
        "rope_parameters", "num_local_experts", "head_dim", "sliding_window", "expert_capacity",
        "tie_word_embeddings", "layer_types", "topk_group", "num_nextn_predict_layers",
        "rope_scaling",
    }  # fmt: skip
    differing = {key for key in written.keys() & hf.keys() if written[key] != hf[key]}
    assert differing <= same_meaning


def test_fields_of_transformers_4():
    new = config_of("deepseek_v2")
    scaling = dict(new.pop("rope_parameters"))
    old = new | {"rope_theta": scaling.pop("rope_theta"), "torch_dtype": new.pop("dtype")}
    old["rope_scaling"] = scaling | {"type": scaling.pop("rope_type")}
    family = FAMILIES["deepseek_v2"]
    config = family.config_from_hf(old)
    assert config == family.config_from_hf(config_of("deepseek_v2"))
    assert config.attention.rotary_scaling == RotaryScaling(40.0, 64, 32, 1, 0.707, 0.707)

    mixtral = config_of("mixtral")
    del mixtral["rope_parameters"]  # Mixtral's own default.
    assert FAMILIES["mixtral"].config_from_hf(mixtral).attention.rotary_base == 1e6


def test_blocks_with_a_moe():
    switch = config_of("switch") | {"num_layers": 12, "num_sparse_encoder_layers": 3}
    # What transformers wrote of the other number takes its place.
    assert switch.pop("encoder_sparse_step") == 2
    encoder = FAMILIES["switch_transformers"].config_from_hf(switch).encoder
    assert encoder.moe_layers == [1, 5, 9]
    encoder = FAMILIES["switch_transformers"].config_from_hf(switch | {"encoder_sparse_step": 2})
    assert encoder.encoder.moe_layers == [1, 3, 5, 7, 9, 11]
    qwen = config_of("qwen2_moe") | {"num_hidden_layers": 6, "decoder_sparse_step": 2}
    qwen["mlp_only_layers"] = [3]
    assert FAMILIES["qwen2_moe"].config_from_hf(qwen).moe_layers == [1, 5]


def test_group_limited_choice():
    hf = config_of("deepseek_v2") | {"topk_method": "group_limited_greedy", "n_group": 4}
    router = FAMILIES["deepseek_v2"].config_from_hf(hf | {"topk_group": 2}).moe.router
    assert isinstance(router, DeepSeekV2) and not router.losses.coefficients
    assert (router.losses.devices, router.losses.devices_per_token) == (4, 2)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("mixtral", {"model_type": "gpt2"}, "model_type is 'gpt2'; supported are deepseek_v2, "),
        ("mixtral", {"quantization_config": {"bits": 8}}, "quantization_config"),
        ("mixtral", {"sliding_window": 16}, "sliding_window=16; only sliding_window=None"),
        ("mixtral", {"hidden_act": "tanh"}, "hidden_act='tanh'; supported are relu"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0; only clip_qkv=None"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 25}, "=25, which must be a multiple of"),
        ("deepseek_v2", {"topk_method": "best"}, "topk_method='best'; supported are greedy"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False; only"),
        ("t5", {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets=16; only"),
        (
            "t5",
            {"feed_forward_proj": "gated-tanh"},
            "feed_forward_proj='gated-tanh'; supported are",
        ),
        ("switch", {"router_bias": True}, "router_bias=True; only router_bias=False"),
    ],
)
def test_models_that_are_refused(name, change, message):
    hf = config_of(name) | change
    with pytest.raises(UserError, match=message):
        family_of(hf).config_from_hf(hf)


def test_a_missing_field():
    hf = config_of("olmoe")
    del hf["hidden_size"]
    with pytest.raises(UserError, match="no hidden_size, which a olmoe needs"):
        family_of(hf).config_from_hf(hf)


def mixtral(**fields):
    config = FAMILIES["mixtral"].config_from_hf(config_of("mixtral"))
    for name, value in fields.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    "config, message",
    [
        (mixtral(learned_positions=True), "it would lose model.learned_positions=True"),
        (mixtral(norm_epsilon=0.1, sparse_dense=SparseDense.AFTER), "model.sparse_dense=after"),
        (mixtral(moe_every=2), "it would lose the shapes of its parameters"),
        (mixtral(attention=DecoderLMConfig().attention), None),
    ],
)
def test_models_that_a_family_lacks(config, message, tmp_path):
    model = types.SimpleNamespace(config=config)
    if message is None:
        config.moe.router = ExpertChoice()
        message = "model.moe.router is ExpertChoice, but mixtral needs TopK"
    with pytest.raises(UserError, match=message):
        save(model, "mixtral", tmp_path / "out")
    assert not (tmp_path / "out").exists()
