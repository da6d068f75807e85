"""Writes what transformers generates with the tiny models in tests/parity/models, token by token.

    python -m tests.huggingface.generated            write generated.json beside this script
    python -m tests.huggingface.generated --check    write nothing; fail if it is outdated

Greedy, a batch of unequal prompts, and several tokens that end a text; tests/interop/test_generation.py
compares. Needs torch and transformers (the extra `parity`).
"""

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
ANSWERS = HERE / "generated.json"
MODELS = HERE.parent / "parity" / "models"
NEW_TOKENS = 12
# Few enough that texts end at one or the other of them, or not at all.
ENDS = list(range(8))


def generated(path: pathlib.Path) -> dict[str, Any]:
    """Prompts of one model and what follows each, up to and with the end."""
    file = np.load(path)
    prefix = "weights/"
    weights = {n.removeprefix(prefix): file[n] for n in file.files if n.startswith(prefix)}
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, pathlib.Path(folder) / "model.safetensors")
        (pathlib.Path(folder) / "config.json").write_text(str(file["config"]))
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    names = ("tokens", "mask") if "tokens" in file.files else ("inputs", "mask")
    tokens, mask = (file[name].astype(np.int64) for name in names)
    # More rows than the file has, of other lengths.
    decoder = names[0] == "tokens"
    tokens = np.concatenate([tokens, np.flip(tokens, 1)])
    mask = np.concatenate([mask, mask])
    gone = slice(0, 7) if decoder else slice(-5, None)
    mask[2, gone] = 0
    with torch.no_grad():
        answer = model.generate(
            input_ids=torch.as_tensor(tokens),
            attention_mask=torch.as_tensor(mask),
            do_sample=False,
            num_beams=1,
            max_new_tokens=NEW_TOKENS,
            # Its cache has a layer for each of the encoder's, of which T5's decoder has more.
            use_cache=decoder,
            eos_token_id=ENDS,
            pad_token_id=0,
        ).numpy()
    answer = answer[:, tokens.shape[1] :] if decoder else answer[:, 1:]
    return {
        "tokens": tokens.tolist(),
        "mask": mask.tolist(),
        "answers": [_until_end(row).tolist() for row in answer],
    }


def _until_end(row: np.ndarray) -> np.ndarray:
    places = np.flatnonzero(np.isin(row, ENDS))
    return row[: places[0] + 1] if len(places) else row


def main() -> int:
    """Writes or compares; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = {p.stem: generated(p) for p in sorted(MODELS.glob("*.npz")) if p.stem != "vit"}
    found = {"ends": ENDS, "new_tokens": NEW_TOKENS, "models": found}
    if not arguments.check:
        ANSWERS.write_text(json.dumps(found) + "\n")
        return 0
    same = found == json.loads(ANSWERS.read_text())
    print("generated.json is", "as transformers generates" if same else "outdated")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
