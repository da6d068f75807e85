"""Held-out loss of a run and what else its task measures, in total and per domain.

    python experiments/evaluate.py --workdir=runs/quickstart/moe [--split=test] [--format=json]
        [--routing [--saturation_from=STEP]]

Uses the newest good checkpoint; --mesh=data:1,expert:2 evaluates on another mesh than the run's.
--routing also writes where every token went, summed up, to the run's folder: load, balance, drops by
position, experts by domain, co-activation and more, as routing_<split>_<step>.json and .png.
"""

import json
import sys

import jax
from absl import flags
from etils import epath

from moe_jax.analysis import routing_report
from moe_jax.data.interface import Pipeline
from moe_jax.errors import UserError
from moe_jax.training import metrics
from moe_jax.training.evaluator import Evaluator
from moe_jax.training.observation import routing_statistics
from moe_jax.training.trained import Trained

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_SPLIT = flags.DEFINE_string("split", None, "Held-out split or slice; default: the config's.")
flags.register_validator("split", lambda name: name != "", "name a split, such as validation")
_BATCHES = flags.DEFINE_integer("batches", None, "Batches; default: the config's.", lower_bound=1)
_MESH = flags.DEFINE_string("mesh", "", "Such as data:2,expert:4; default: the run's.")
_ROUTING = flags.DEFINE_bool("routing", False, "Also write statistics of the routing.")
_SATURATION = flags.DEFINE_integer(
    "saturation_from", None, "Step of a kept checkpoint whose routing is compared, with --routing."
)
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What stdout gets.")


def main() -> None:
    """Evaluates and prints."""
    if _SATURATION.value is not None and not _ROUTING.value:
        raise UserError(
            f"saturation_from is {_SATURATION.value}, but it needs --routing; give both."
        )
    trained = Trained.load(_WORKDIR.value, _MESH.value)
    config = trained.run.config
    if _ROUTING.value and not config.model.moe_layers:
        raise UserError("the model has 0 MoE layers and routes nothing; leave --routing out.")
    split = _SPLIT.value or config.data.held_out_split
    batches = _BATCHES.value or config.evaluation.batches
    data = trained.open_data()
    evaluate = Evaluator(trained.run, data, split, batches)
    with jax.set_mesh(trained.run.mesh):
        measured = evaluate(trained.parameters, trained.variables)
    if _ROUTING.value:
        _write_routing(trained, data, split, batches)
    if _FORMAT.value == "json":
        print(
            json.dumps(
                {"step": trained.step, "split": split, "batches": evaluate.num_batches, **measured}
            )
        )
        return
    asked = "" if evaluate.num_batches == batches else f" (all there are; {batches} were asked for)"
    print(f"step {trained.step}, {split} split, {evaluate.num_batches} batches{asked}")
    print(metrics.held_out_table(measured, of_text=data.tokenizer is not None))


def _write_routing(trained: Trained, data: Pipeline, split: str, batches: int) -> None:
    """Observes the same batches and writes the JSON and the picture."""
    earlier = None
    if _SATURATION.value is not None:
        earlier = Trained.load(_WORKDIR.value, _MESH.value, _SATURATION.value)
    summaries = routing_statistics(trained, data, split, batches, earlier)
    stem = epath.Path(_WORKDIR.value) / f"routing_{split}_{trained.step}"
    routing_report.write_json(summaries, data.domains, f"{stem}.json")
    title = f"{_WORKDIR.value}, step {trained.step}, {split} split"
    routing_report.save(summaries, data.domains, title, f"{stem}.png")
    print(f"where the tokens went is in {stem}.json and .png", file=sys.stderr)
