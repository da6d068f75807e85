"""Compares random checkpoints of every family with transformers 5, and what we write with 5 and 4.57.

    python -m tests.huggingface.compare                         200 cases
    python -m tests.huggingface.compare --first=180 --cases=20  some of them
    python -m tests.huggingface.compare --old=PYTHON            also opens what we write with the
                                                                transformers of that interpreter
    ... --write, --check                                        writes counts.json; compares with it

Needs torch and transformers (the extra `parity`). A checkpoint is `equal` (logits to 1e-4 of the
largest), `refused` by us in a sentence, `wrong` (other logits, no error), `raised` (another error than
a sentence), or `ours_only` (transformers does not open it, or draws a part of it at random).
"""

import argparse
import collections
import json
import pathlib
import subprocess
import sys
import tempfile
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.interop.huggingface.loading import load
from moe_jax.interop.huggingface.saving import save
from moe_jax.layers.mode import Mode
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from tests.huggingface import checkpoints
from tests.huggingface.cases import FAMILIES, LENGTH, Case, case
from tests.huggingface.checkpoints import Arrays, UnansweredError

COUNTS = pathlib.Path(__file__).with_name("counts.json")
TOLERANCE = 1e-4
KINDS = ("equal", "refused", "wrong", "raised", "ours_only")


def ours(model: Any, asked: Arrays) -> np.ndarray:
    """Our logits of what transformers was asked."""

    @nnx.jit
    def run(model: Any, asked: dict[str, jax.Array]) -> jax.Array:
        if "pixel_values" in asked:
            return model(asked["pixel_values"].transpose(0, 2, 3, 1), None, Mode.DECODE)[0]
        mask = asked["attention_mask"].astype(bool)
        tokens = asked["input_ids"]
        if "decoder_input_ids" in asked:
            return model(tokens, mask, asked["decoder_input_ids"], None, Mode.DECODE)[0]
        return model(tokens, mask, Mode.DECODE)[0]

    return np.asarray(run(model, {name: jnp.asarray(a) for name, a in asked.items()}))


def difference(a: np.ndarray, b: np.ndarray, asked: Arrays) -> float:
    """The largest, as a share of the largest logit; of real tokens."""
    if a.shape != b.shape:
        return float("inf")
    decoder = "input_ids" in asked and "decoder_input_ids" not in asked
    real = asked["attention_mask"].astype(bool) if decoder else slice(None)
    found = np.abs(a - b)[real].max() / np.abs(b[real]).max()
    return float("inf") if np.isnan(found) else float(found)


def computed_otherwise(drawn: Case) -> bool:
    """Whether transformers 4.57 has other formulas than 5 for a case.

    DeepSeek-V3: experts of groups that are left out have score 0 there, so that they go before others
    whose bias makes the score negative. DeepSeek-V2: no mscale_all_dim scales scores.
    """
    if drawn.family == "deepseek_v3":
        return drawn.arguments["n_group"] > 1
    return drawn.family == "deepseek_v2" and "mscale_all_dim" in str(drawn.fields)


class Comparison:
    """Runs cases and counts what came of them."""

    def __init__(self, root: pathlib.Path, verbose: bool) -> None:
        self._root, self._verbose = root, verbose
        self._mesh = make_mesh(MeshConfig())
        self.counts = {family: dict.fromkeys(KINDS, 0) for family in FAMILIES}
        self.exports: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self.largest = 0.0
        self._answers: dict[int, np.ndarray] = {}

    def run(self, drawn: Case) -> None:
        """One case; what is equal is written by us and opened again."""
        folder = self._root / f"{drawn.number:05d}"
        theirs = folder / "theirs"
        theirs.mkdir(parents=True)
        checkpoints.write(
            theirs,
            drawn.family,
            drawn.arguments,
            drawn.seed,
            original_format=drawn.original_format,
            shards=drawn.shards,
        )
        asked = checkpoints.inputs(
            json.loads((theirs / "config.json").read_text()), LENGTH, drawn.seed
        )
        checkpoints.change(theirs, drawn.fields, drawn.tensors, drawn.seed)
        kind, detail = self._kind(theirs, asked, drawn)
        self.counts[drawn.family][kind] += 1
        if self._verbose or kind in ("wrong", "raised"):
            print(f"{drawn.number} {drawn.family} {kind}: {detail}")
            print(f"    {drawn.fields} {drawn.tensors}", flush=True)

    def _kind(self, theirs: pathlib.Path, asked: Arrays, drawn: Case) -> tuple[str, str]:
        try:
            model = load(theirs, self._mesh)
            answer = ours(model, asked)
        except UserError as error:
            return "refused", str(error)
        except Exception:  # Any other error is one that we look for.
            return "raised", traceback.format_exc()
        try:
            right = checkpoints.logits(theirs, asked)
        except UnansweredError as error:
            return "ours_only", str(error)
        found = difference(answer, right, asked)
        if found > TOLERANCE:
            return "wrong", f"logits differ by {found:.2g} of the largest"
        self.largest = max(self.largest, found)
        self._export(model, drawn, asked, right)
        return "equal", f"{found:.1e}"

    def _export(self, model: Any, drawn: Case, asked: Arrays, right: np.ndarray) -> None:
        folder = self._root / f"{drawn.number:05d}"
        shard = 20_000 if drawn.number % 2 else 5 * 10**9
        try:
            save(model, drawn.family, folder / "ours", max_shard_bytes=shard)
        except UserError as error:
            self.exports["refused"][drawn.family] += 1
            if self._verbose:
                print(f"    not written: {error}")
            return
        np.savez(folder / "asked.npz", **asked)
        self._answers[drawn.number] = right
        try:
            again = checkpoints.logits(folder / "ours", asked)
        except UnansweredError as error:
            self._exported(drawn.number, transformers.__version__, str(error))
            return
        found = difference(again, right, asked)
        self._exported(drawn.number, transformers.__version__, found)

    def _exported(self, number: int, version: str, found: float | str) -> None:
        drawn = case(number)
        equal = isinstance(found, float) and found <= TOLERANCE
        # A version may compute a model in another way, whoever wrote it.
        other = "computed_otherwise" if version < "5" and computed_otherwise(drawn) else "wrong"
        self.exports[version]["equal" if equal else other] += 1
        if not equal:
            print(f"{number} {drawn.family} written by us, transformers {version}: {found}")
            print(f"    {drawn.fields} {drawn.tensors}", flush=True)

    def open_with(self, python: str) -> None:
        """Opens all that we wrote with the transformers of another interpreter."""
        version = subprocess.run(
            [python, "-c", "import transformers; print(transformers.__version__)"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        script = pathlib.Path(checkpoints.__file__)
        subprocess.run([python, str(script), str(self._root)], check=True)
        for number, right in self._answers.items():
            folder = self._root / f"{number:05d}"
            if not (folder / "answer.npz").exists():
                self._exported(number, version, (folder / "unanswered").read_text())
                continue
            asked = dict(np.load(folder / "asked.npz"))
            answer = np.load(folder / "answer.npz")["logits"]
            self._exported(number, version, difference(answer, right, asked))

    def summary(self) -> dict[str, Any]:
        """What is committed; versions last."""
        total = {kind: sum(c[kind] for c in self.counts.values()) for kind in KINDS}
        return {
            "checkpoints": {**self.counts, "all": total},
            "exports": {name: dict(sorted(c.items())) for name, c in sorted(self.exports.items())},
            "versions": {
                "torch": torch.__version__.partition("+")[0],
                "transformers": transformers.__version__,
            },
        }


def main() -> int:
    """Compares; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=200, help="how many")
    parser.add_argument("--old", help="an interpreter with transformers 4.57")
    parser.add_argument("--check", action="store_true", help="compare with counts.json")
    parser.add_argument("--write", action="store_true", help="write counts.json")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root:
        comparison = Comparison(pathlib.Path(root), arguments.verbose)
        for number in range(arguments.first, arguments.first + arguments.cases):
            comparison.run(case(number))
        if arguments.old:
            comparison.open_with(arguments.old)
    summary = comparison.summary()
    print(json.dumps(summary, indent=2))
    print(f"the largest difference of what is equal is {comparison.largest:.1e}")
    if arguments.write:
        COUNTS.write_text(json.dumps(summary, indent=2) + "\n")
    failed = summary["checkpoints"]["all"]["wrong"] + summary["checkpoints"]["all"]["raised"]
    failed += sum(counts.get("wrong", 0) for counts in summary["exports"].values())
    if arguments.check:
        failed += summary != json.loads(COUNTS.read_text())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
