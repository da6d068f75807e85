"""Shows that transformers computes the same whatever the fields say that moe_jax takes for irrelevant.

    python -m tests.huggingface.irrelevant

Each of them is set to values of every kind in a small model of each family. Needs torch and
transformers (the extra `parity`).
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

from moe_jax.interop.huggingface.families import FAMILIES
from moe_jax.interop.huggingface.fields import IRRELEVANT
from tests.huggingface import checkpoints
from tests.huggingface.cases import FAMILIES as NAMES
from tests.huggingface.cases import LENGTH, case
from tests.huggingface.checkpoints import UnansweredError

# None of these is another family or the file's own dtype.
VALUES = (True, False, 3, 0.5, "relu", None)
# Says which model it is, so that it has to be what it is.
NAMING = {"model_type"}
# Another program adds up in another order.
TOLERANCE = 1e-5


def wrong_fields(family: str, folder: pathlib.Path) -> tuple[list[str], int]:
    """Fields and values that change a model's logits, and how many were answered."""
    drawn = case(NAMES.index(family))
    checkpoints.write(
        folder, family, drawn.arguments, drawn.seed, original_format=True, shards=False
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    asked = checkpoints.inputs(config, LENGTH, drawn.seed)
    right = checkpoints.logits(folder, asked)
    found, answered = [], 0
    for field in sorted((IRRELEVANT | FAMILIES[family].irrelevant) - NAMING):
        for value in VALUES:
            path.write_text(json.dumps(config | {field: value}))
            try:
                answer = checkpoints.logits(folder, asked)
            except UnansweredError:
                continue
            answered += 1
            same = answer.shape == right.shape
            if not same or np.abs(answer - right).max() > TOLERANCE * np.abs(right).max():
                found.append(f"{family}: {field}={value!r} changes the logits")
    return found, answered


def main() -> int:
    """Tries all families; returns the exit status."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = False
    for family in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            found, answered = wrong_fields(family, pathlib.Path(folder))
        print(*found, f"{family}: {answered} settings answered", sep="\n", flush=True)
        failed |= bool(found) or not answered
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
