"""The files and folders that the table of bad input names."""

import json
import os
import pathlib
import shutil
from typing import Any

from tests.interop.folders import config_of, weights_of, write, write_words

RUN = pathlib.Path(__file__).parents[1] / "training/run_0_1"


def make(tmp: pathlib.Path) -> pathlib.Path:
    """Fills a folder.

    Returns:
      The good run in it, whose data lie beside it.
    """
    (tmp / "file").write_text("x")
    (tmp / "empty").mkdir()
    (tmp / "loop").symlink_to(tmp / "loop")
    (tmp / "empty.py").write_text("")
    (tmp / "broken.py").write_text("def get_config(:\n")
    (tmp / "raises.py").write_text("raise RuntimeError('on purpose')\n")
    (tmp / "binary.py").write_bytes(b"x = '\xff\xfe'\n")
    (tmp / "imports_nothing.py").write_text("import no_such_module\n")
    (tmp / "returns_none.py").write_text("def get_config():\n    return None\n")
    (tmp / "returns_model.py").write_text(
        "from moe_jax.models.decoder_lm import DecoderLMConfig\n\n\n"
        "def get_config():\n    return DecoderLMConfig()\n"
    )
    (tmp / "config.json").write_text("{}")
    run = _run(tmp, "run")
    config = json.loads((run / "config.json").read_text())
    for name, content in {
        "is_list": [],
        "is_null": None,
        "is_empty": {},
        "of_a_stranger": _with(config, ("model", "type"), "evil.module:Evil"),
        "type_is_list": _with(config, ("model", "type"), ["DecoderLMConfig"]),
        "width_is_text": _with(config, ("model", "width"), "wide"),
        "has_more": _with(config, ("model", "colour"), 3),
    }.items():
        (_run(tmp, f"run_config_{name}") / "config.json").write_text(json.dumps(content))
    text = (run / "config.json").read_text()
    (_run(tmp, "run_config_is_cut") / "config.json").write_text(text[: len(text) // 2])
    (_run(tmp, "run_config_is_binary") / "config.json").write_bytes(b"\xff\xfe{}")
    folder = _run(tmp, "run_config_is_folder") / "config.json"
    folder.unlink()
    folder.mkdir()
    shutil.rmtree(_run(tmp, "run_without_checkpoints") / "checkpoints")
    for file in (_run(tmp, "run_with_cut_array") / "checkpoints/4").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    for name, manifest in {"empty": b"{}", "list": b"[]", "binary": b"\xff"}.items():
        damaged = _run(tmp, f"run_with_{name}_manifest")
        (damaged / "checkpoints/4/manifest.json").write_bytes(manifest)
    _make_checkpoints(tmp)
    vanished = _with(config, ("data", "dataset"), "./vanished")
    (_run(tmp, "run_of_vanished_data") / "config.json").write_text(json.dumps(vanished))
    return run


def _run(tmp: pathlib.Path, name: str) -> pathlib.Path:
    """A copy of the run, which finds its data wherever it is opened."""
    run = tmp / name
    shutil.copytree(RUN / "run", run)
    data = tmp / "data"
    if not data.exists():
        shutil.copytree(RUN / "data", data)
    file = run / "config.json"
    config = _with(json.loads(file.read_text()), ("data", "dataset"), str(data))
    file.write_text(json.dumps(config))
    return run


def _make_checkpoints(tmp: pathlib.Path) -> None:
    """Folders of Hugging Face's with an encoder and decoder that pads with token 0."""
    for name, fields in {
        "hf_t5": {},
        "hf_without_tokenizer": {},
        "hf_without_start": {"decoder_start_token_id": None},
        "hf_pads_with_3": {"pad_token_id": 3},
        "hf_large_tokenizer": {},
    }.items():
        folder = write(tmp / name, config_of("t5") | fields, weights_of("t5"))
        if name != "hf_without_tokenizer":
            size = 50 if name == "hf_large_tokenizer" else 40
            write_words(folder, ["<pad>", "</s>", "<unk>", *map(str, range(size))])


def _with(record: Any, path: tuple[str, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(record))
    node = copy["config"]
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return copy
