"""Random checkpoints of every family: a config, and what somebody may have done to the folder.

A case is drawn from its number alone, so that a count can be repeated. Nothing here needs torch.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

Config = dict[str, Any]

FAMILIES = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "t5",
    "switch_transformers", "vit",
)  # fmt: skip
ENCODER_DECODERS = ("t5", "switch_transformers")
LENGTH = 12
LONGEST = 64


@dataclasses.dataclass
class Case:
    """One checkpoint.

    Attributes:
      number: what it is drawn from.
      family: its `model_type`.
      arguments: of transformers' config class.
      fields: put into config.json afterwards; None deletes a field, `NULL` makes it null.
      tensors: what is done to the files afterwards: names of functions in checkpoints.py.
      original_format: of the tensors' names; see `save_pretrained`.
      shards: whether there are several files.
    """

    number: int
    family: str
    arguments: Config
    fields: Config = dataclasses.field(default_factory=dict)
    tensors: list[str] = dataclasses.field(default_factory=list)
    original_format: bool = True
    shards: bool = False

    @property
    def seed(self) -> int:
        """Of the weights and inputs."""
        return self.number


NULL = "null"
"""In `Case.fields`: the field is there and null."""


def case(number: int) -> Case:
    """The case of a number; every ninth is of the same family."""
    family = FAMILIES[number % len(FAMILIES)]
    draw = random.Random(number)
    drawn = Case(number, family, _ARGUMENTS[family](draw))
    for change in draw.sample(_CHANGES[family], draw.choice((0, 1, 1, 2, 2, 3))):
        change(drawn, draw)
    drawn.original_format = draw.random() < 0.75
    drawn.shards = draw.random() < 0.3
    return drawn


def _decoder(draw: random.Random) -> Config:
    heads = draw.choice((2, 4))
    return {
        "vocab_size": draw.choice((40, 48)),
        "hidden_size": draw.choice((16, 24, 32)),
        "num_hidden_layers": draw.choice((1, 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice((1, 2, heads)),
        "max_position_embeddings": LONGEST,
        "hidden_act": draw.choice(("silu", "silu", "silu", "gelu", "gelu_new", "relu")),
        "rms_norm_eps": draw.choice((1e-5, 1e-6, 1e-3)),
        "tie_word_embeddings": draw.random() < 0.3,
        "intermediate_size": draw.choice((20, 40)),
    }


def _mixtral(draw: random.Random) -> Config:
    config = _decoder(draw) | {
        "num_local_experts": 4,
        "num_experts_per_tok": draw.choice((1, 2, 4)),
    }
    if draw.random() < 0.4:
        config["head_dim"] = draw.choice((6, 8))
    return config


def _olmoe(draw: random.Random) -> Config:
    return _decoder(draw) | {
        "num_experts": 8,
        "num_experts_per_tok": draw.choice((1, 3)),
        "norm_topk_prob": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.3,
    }


def _qwen(draw: random.Random) -> Config:
    layers = draw.choice((1, 2, 4))
    return _decoder(draw) | {
        "num_hidden_layers": layers,
        "num_experts": draw.choice((4, 4, 4, 0)),
        "num_experts_per_tok": draw.choice((1, 2)),
        "moe_intermediate_size": 12,
        "norm_topk_prob": draw.random() < 0.5,
        "decoder_sparse_step": draw.choice((1, 1, 2)),
        "mlp_only_layers": draw.choice(([], [0], [1, 7])),
    }


def _qwen2_moe(draw: random.Random) -> Config:
    return _qwen(draw) | {
        "shared_expert_intermediate_size": draw.choice((12, 24, 24, 25)),
        "qkv_bias": draw.random() < 0.7,
    }


def _qwen3_moe(draw: random.Random) -> Config:
    return _qwen(draw) | {
        "head_dim": draw.choice((6, 8)),
        "attention_bias": draw.random() < 0.3,
    }


def _deepseek(draw: random.Random) -> Config:
    config = _decoder(draw) | {
        "kv_lora_rank": 12,
        "q_lora_rank": draw.choice((None, 10)),
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": draw.choice((4, 8)),
        "v_head_dim": 5,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": draw.choice((0, 1)),
        "n_routed_experts": 8,
        "num_experts_per_tok": draw.choice((1, 3)),
        "n_shared_experts": draw.choice((1, 2)),
        "routed_scaling_factor": draw.choice((1.0, 2.5)),
    }
    return config | {"num_key_value_heads": config["num_attention_heads"]}


def _deepseek_v2(draw: random.Random) -> Config:
    groups = {"topk_method": "greedy"}
    if draw.random() < 0.5:
        groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    return _deepseek(draw) | groups | {"norm_topk_prob": draw.random() < 0.5}


def _deepseek_v3(draw: random.Random) -> Config:
    groups = draw.choice(((1, 1), (4, 2), (2, 1)))
    return _deepseek(draw) | {
        "n_group": groups[0],
        "topk_group": groups[1],
        "norm_topk_prob": draw.random() < 0.7,
        "num_nextn_predict_layers": 0,
    }


def _encoder_decoder(draw: random.Random) -> Config:
    return {
        "vocab_size": draw.choice((40, 48)),
        "d_model": draw.choice((16, 24)),
        "d_kv": draw.choice((4, 6)),
        "d_ff": 20,
        "num_layers": draw.choice((1, 2, 4)),
        "num_decoder_layers": draw.choice((None, 1, 2, 4)),
        "num_heads": draw.choice((2, 3)),
        "layer_norm_epsilon": draw.choice((1e-6, 1e-3)),
        "tie_word_embeddings": draw.random() < 0.6,
        "decoder_start_token_id": 0,
    }


def _t5(draw: random.Random) -> Config:
    forms = ("relu", "gated-gelu", "gated-silu", "gelu", "silu", "gelu_new", "gated-relu")
    return _encoder_decoder(draw) | {"feed_forward_proj": draw.choice(forms)}


def _switch_transformers(draw: random.Random) -> Config:
    return _encoder_decoder(draw) | {
        "num_sparse_encoder_layers": draw.choice((0, 1, 2)),
        "num_sparse_decoder_layers": draw.choice((0, 1, 2)),
        "num_experts": draw.choice((2, 4)),
        "expert_capacity": LENGTH,
        "dense_act_fn": draw.choice(("relu", "gelu", "gelu_new")),
        "router_jitter_noise": draw.choice((0.0, 0.01)),
    }


def _vit(draw: random.Random) -> Config:
    return {
        "hidden_size": draw.choice((16, 24)),
        "num_hidden_layers": draw.choice((1, 2)),
        "num_attention_heads": draw.choice((2, 4)),
        "intermediate_size": 20,
        "image_size": 8,
        "patch_size": draw.choice((2, 4)),
        "num_channels": draw.choice((1, 3)),
        "num_labels": draw.choice((2, 3, 5)),
        "qkv_bias": draw.random() < 0.7,
        "hidden_act": draw.choice(("gelu", "relu", "gelu_pytorch_tanh", "quick_gelu")),
        "layer_norm_eps": draw.choice((1e-12, 1e-3)),
    }


_ARGUMENTS: dict[str, Callable[[random.Random], Config]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "t5": _t5,
    "switch_transformers": _switch_transformers,
    "vit": _vit,
}


def _yarn(draw: random.Random) -> Config:
    """YaRN with any of its optional fields."""
    optional = {
        "attention_factor": draw.choice((0.7, 1.3, None)),
        "beta_fast": draw.choice((32, 4.0, None)),
        "beta_slow": draw.choice((1, 0.5, None)),
        "mscale": draw.choice((0.707, 1.0, None)),
        "mscale_all_dim": draw.choice((0.707, 0.3, None)),
        "truncate": draw.choice((True, True, False)),
        "original_max_position_embeddings": draw.choice((16, 32, 32, 8)),
    }
    chosen = {key: optional[key] for key in draw.sample(sorted(optional), draw.randrange(6))}
    return {"factor": draw.choice((4.0, 2.0, 1.0, None)), **chosen}


def _rotary(drawn: Case, draw: random.Random) -> None:
    """Some spelling of plain or scaled rotary positions."""
    scaled = draw.random() < 0.75
    key = draw.choice(("type", "rope_type"))
    parameters: Config = {key: "yarn", **_yarn(draw)} if scaled else {key: "default"}
    if draw.random() < 0.1:
        parameters = {key: draw.choice(("linear", "dynamic")), "factor": 2.0}
    base = draw.choice((10_000.0, 1e6, 500.0))
    where = draw.choice(("parameters", "beside", "old", "old", "null"))
    if where == "parameters":
        drawn.fields["rope_parameters"] = parameters | {"rope_theta": base}
        return
    if where == "null":
        drawn.fields |= {"rope_parameters": NULL, "rope_theta": draw.choice((base, None))}
        return
    if where == "old":
        drawn.fields["rope_parameters"] = None
    drawn.fields["rope_scaling"] = parameters if scaled else draw.choice((NULL, parameters))
    if draw.random() < 0.7:
        drawn.fields["rope_theta"] = base
    if draw.random() < 0.2:
        drawn.fields["original_max_position_embeddings"] = 32


def _field(*choices: Config) -> Callable[[Case, random.Random], None]:
    """One of several sets of fields."""

    def change(drawn: Case, draw: random.Random) -> None:
        drawn.fields |= draw.choice(choices)

    return change


def _tensors(*choices: str) -> Callable[[Case, random.Random], None]:
    """One of several changes of the files."""

    def change(drawn: Case, draw: random.Random) -> None:
        drawn.tensors.append(draw.choice(choices))

    return change


_COMMON = [
    _field({"dtype": None, "torch_dtype": "float32"}, {"dtype": NULL}, {"dtype": "float16"}),
    _field({"use_cache": False}, {"unknown_field": 1.5}, {"auto_map": {"AutoModel": "a.B"}}),
    _field({"pruned_heads": {}}, {"task_specific_params": {"a": 1}}, {"tie_encoder_decoder": True}),
    _tensors("stale_index", "duplicate_in_shards"),
]
_OF_DECODERS = [
    *_COMMON,
    _rotary,
    _rotary,
    _field({"hidden_act": None}, {"rms_norm_eps": None}, {"hidden_act": "swish"}),
    _field({"tie_word_embeddings": None}, {"tie_word_embeddings": True}),
    _field({"attention_dropout": 0}, {"partial_rotary_factor": 0.5}, {"rope_theta": NULL}),
    _field({"sliding_window": 4}, {"sliding_window": LONGEST}, {"layer_types": NULL}),
    _tensors("other_head", "equal_head", "no_head", "only_head"),
]
_CHANGES: dict[str, list[Callable[[Case, random.Random], None]]] = {
    "mixtral": [
        *_OF_DECODERS,
        _field({"num_local_experts": None, "num_experts": 4}, {"num_key_value_heads": NULL}),
        _field({"head_dim": NULL}, {"head_dim": None}, {"num_experts_per_tok": None}),
    ],
    "olmoe": [
        *_OF_DECODERS,
        _field({"clip_qkv": 0.5}, {"norm_topk_prob": None}, {"attention_bias": None}),
        _field({"num_key_value_heads": NULL}, {"num_experts": None, "num_local_experts": 8}),
    ],
    "qwen2_moe": [
        *_OF_DECODERS,
        _field({"use_sliding_window": True, "sliding_window": 4}, {"norm_topk_prob": None}),
        _field({"mlp_only_layers": NULL}, {"qkv_bias": None}, {"decoder_sparse_step": None}),
    ],
    "qwen3_moe": [
        *_OF_DECODERS,
        _field({"use_sliding_window": True, "sliding_window": 4}, {"norm_topk_prob": None}),
        _field({"mlp_only_layers": NULL}, {"attention_bias": None}, {"decoder_sparse_step": 0}),
    ],
    "deepseek_v2": [
        *_OF_DECODERS,
        _field({"n_group": NULL}, {"topk_method": None}, {"norm_topk_prob": None}),
        _field({"scoring_func": "softmax"}, {"moe_layer_freq": 1}, {"head_dim": None}),
        _field({"num_key_value_heads": NULL}, {"num_key_value_heads": 1}, {"aux_loss_alpha": 0.1}),
    ],
    "deepseek_v3": [
        *_OF_DECODERS,
        _field({"n_group": NULL}, {"norm_topk_prob": None}, {"routed_scaling_factor": None}),
        _field({"topk_method": "noaux_tc"}, {"scoring_func": "sigmoid"}, {"head_dim": None}),
        _field({"rope_interleave": NULL}, {"num_nextn_predict_layers": 1}, {"norm_topk_prob": NULL}),
        _tensors("further_token_layer"),
    ],
    "t5": [
        *_COMMON,
        _field({"dense_act_fn": "silu"}, {"is_gated_act": False}, {"dense_act_fn": None}),
        _field({"scale_decoder_outputs": False}, {"scale_decoder_outputs": None}),
        _field({"tie_word_embeddings": False, "scale_decoder_outputs": None}),
        _field({"num_decoder_layers": NULL}, {"layer_norm_epsilon": None}, {"n_positions": 512}),
        _tensors("other_head", "equal_head", "no_head", "no_shared", "other_encoder_table"),
    ],
    "switch_transformers": [
        *_COMMON,
        _field({"router_dtype": "bfloat16"}, {"router_ignore_padding_tokens": True}),
        _field({"encoder_sparse_step": None}, {"decoder_sparse_step": 1}, {"dense_act_fn": None}),
        _field({"tie_word_embeddings": None}, {"is_gated_act": False}),
        _tensors("other_head", "equal_head", "no_shared", "other_encoder_table", "other_tables"),
    ],
    "vit": [
        *_COMMON,
        _field({"image_size": [8, 8]}, {"patch_size": [4, 4]}, {"head_dim": 6}),
        _field({"hidden_act": None}, {"layer_norm_eps": None}, {"qkv_bias": None}),
        _field({"pooler_act": "relu"}, {"encoder_stride": 4}, {"id2label": NULL}),
    ],
}  # fmt: skip
