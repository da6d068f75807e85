"""Writes every field that the config classes of a version of transformers have, with its default.

    python tests/huggingface/default_configs.py     adds the version that is installed to
                                                    default_configs.json beside this script

Needs transformers alone; run with 5 and with 4.57. tests/interop/test_fields.py reads the file.
"""

import json
import pathlib

import transformers

_CLASSES = {
    "mixtral": "MixtralConfig",
    "olmoe": "OlmoeConfig",
    "qwen2_moe": "Qwen2MoeConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "deepseek_v2": "DeepseekV2Config",
    "deepseek_v3": "DeepseekV3Config",
    "t5": "T5Config",
    "switch_transformers": "SwitchTransformersConfig",
    "vit": "ViTConfig",
}


def main() -> None:
    """Writes the file."""
    path = pathlib.Path(__file__).with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {}
    found[transformers.__version__] = {
        family: json.loads(getattr(transformers, name)().to_json_string(use_diff=False))
        for family, name in _CLASSES.items()
    }
    path.write_text(json.dumps(found, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
