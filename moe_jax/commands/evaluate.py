"""Held-out loss of a run and what else its task measures, in total and per domain.

    python experiments/evaluate.py --workdir=runs/quickstart/moe [--split=test] [--format=json]
        [--routing [--saturation_from=STEP]]
    python experiments/evaluate.py --checkpoint=hf:PATH --config=configs/quickstart.py [--mesh=expert:8]

A Hugging Face folder is evaluated on the data and the task of a config, on text in the folder's own
tokens; the rest of the config is not read. An encoder and decoder needs a config whose task is
TextToText, such as configs/tiny/encoder_decoder.py or configs/tiny/translation.py. Of a run the
newest good checkpoint is used; --mesh=data:1,expert:2 evaluates on another mesh than the run's.
--routing also writes where every token went, summed up, to the run's folder: load, balance, drops by
position, experts by domain, co-activation and more, as routing_<split>_<step>.json and .png.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
from absl import flags
from etils import epath

from moe_jax import command_line
from moe_jax.analysis import routing_report
from moe_jax.data.corpus import CorpusData
from moe_jax.data.interface import Pipeline
from moe_jax.data.span_corruption import SpanCorruptionData
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError
from moe_jax.interop.huggingface.loading import folder_named, load
from moe_jax.interop.huggingface.tokenizer import FolderTokenizer, FolderTokens
from moe_jax.models.abstract_model import arrays_of
from moe_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from moe_jax.models.vision import Vision
from moe_jax.parallel.mesh import MeshConfig, force_host_devices, make_mesh, parse_mesh
from moe_jax.tasks.task import Task
from moe_jax.tasks.text_to_text import TextToText
from moe_jax.training import metrics
from moe_jax.training.evaluator import Evaluator
from moe_jax.training.observation import routing_statistics
from moe_jax.training.run import Run
from moe_jax.training.trained import Trained

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "In place of workdir: hf:PATH, a folder of Hugging Face's, with --config."
)
_CONFIG = command_line.define_config()
_SPLIT = flags.DEFINE_string("split", None, "Held-out split or slice; default: the config's.")
flags.register_validator("split", lambda name: name != "", "name a split, such as validation")
_BATCHES = flags.DEFINE_integer("batches", None, "Batches; default: the config's.", lower_bound=1)
_MESH = flags.DEFINE_string(
    "mesh", "", "Such as data:2,expert:4; default: the run's, or one device."
)
_ROUTING = flags.DEFINE_bool("routing", False, "Also write statistics of the routing.")
_SATURATION = flags.DEFINE_integer(
    "saturation_from", None, "Step of a kept checkpoint whose routing is compared, with --routing."
)
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What stdout gets.")


def main() -> None:
    """Evaluates and prints."""
    _check_flags()
    if _CHECKPOINT.value is not None:
        _evaluate_checkpoint(folder_named(_CHECKPOINT.value))
        return
    trained = Trained.load(_WORKDIR.value, _MESH.value)
    config = trained.run.config
    if _ROUTING.value and not config.model.moe_layers:
        raise UserError("the model has 0 MoE layers and routes nothing; leave --routing out.")
    data = trained.open_data()
    split, batches = _evaluate(
        trained.run, data, trained.parameters, trained.variables, {"step": trained.step}
    )
    if _ROUTING.value:
        _write_routing(trained, data, split, batches)


def _check_flags() -> None:
    if (_WORKDIR.value is None) == (_CHECKPOINT.value is None):
        raise UserError(
            f"--workdir is {_WORKDIR.value} and --checkpoint is {_CHECKPOINT.value}; give one of the two."
        )
    if _SATURATION.value is not None and not _ROUTING.value:
        raise UserError(
            f"saturation_from is {_SATURATION.value}, but it needs --routing; give both."
        )
    if _ROUTING.value and _CHECKPOINT.value is not None:
        raise UserError(
            f"checkpoint is {_CHECKPOINT.value}, but --routing writes to a run's folder; leave it out."
        )
    if _WORKDIR.value is not None and flags.FLAGS["config"].value is not None:
        raise UserError(
            f"workdir is {_WORKDIR.value}, whose run has a config of its own; leave --config out."
        )


def _evaluate_checkpoint(folder: str) -> None:
    """Evaluates a folder of Hugging Face's on the data of --config."""
    config = command_line.experiment(_CONFIG.value)
    mesh_config = parse_mesh(_MESH.value, MeshConfig())
    mesh_config.validate()
    force_host_devices(mesh_config.devices_of_process)
    mesh = make_mesh(mesh_config)
    model = load(folder, mesh)
    _check_task(folder, model, config.task)
    data = config.data
    if isinstance(data, CorpusData):
        data = _in_folder_tokens(folder, model, data)
    config = dataclasses.replace(
        config, model=model.config, data=data, mesh=mesh_config, microbatches=1
    )
    config.validate()
    parameters, variables = arrays_of(model)
    run = Run.on(config, mesh)
    _evaluate(run, config.data.open(config.seed), parameters, variables, {"checkpoint": folder})


def _check_task(folder: str, model: Any, task: Task) -> None:
    """Whether folder and config are both of texts to texts, or neither.

    Raises:
      UserError: one of them is.
    """
    if isinstance(model.config, EncoderDecoderConfig) != isinstance(task, TextToText):
        such: dict[type, str] = {EncoderDecoder: "tiny/encoder_decoder", Vision: "tiny/vision"}
        raise UserError(
            f"{folder} has a model {type(model).__name__}, but the task of --config is "
            f"{type(task).__name__}; name a config with a task of such models, as "
            f"--config=configs/{such.get(type(model), 'quickstart')}.py has."
        )


def _in_folder_tokens(folder: str, model: Any, data: CorpusData) -> CorpusData:
    """The data in the tokens of the folder.

    Raises:
      UserError: the tokens do not fit the model, or rows cannot be made of them.
    """
    tokenizer = FolderTokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder} has a tokenizer.json of {tokenizer.vocab_size} tokens, but a model of "
            f"vocab_size={model.config.vocab_size}; copy the tokenizer of this model there."
        )
    if isinstance(model.config, EncoderDecoderConfig) and tokenizer.PAD != Tokenizer.PAD:
        raise UserError(
            f"{folder} pads with token {tokenizer.PAD} (pad_token_id), but inputs and targets are "
            f"padded with {Tokenizer.PAD}, as T5's and Switch's are; evaluate a folder that pads so."
        )
    tokens = FolderTokens(folder=folder, extra_ids=tokenizer.extra_ids)
    data.check_ranges("data")
    if isinstance(data, SpanCorruptionData) and tokens.extra_ids < data.lengths.spans:
        raise UserError(
            f"{folder} has a tokenizer.json with {tokens.extra_ids} of T5's sentinels (<extra_id_0> "
            f"and on), but the {data.lengths.spans} spans of data.input_length={data.input_length} "
            "need one each; lower data.input_length, or name a config of translations, such as "
            "--config=configs/tiny/translation.py."
        )
    return dataclasses.replace(data, tokenizer=tokens)


def _evaluate(
    run: Run, data: Pipeline, parameters: Any, variables: Any, what: dict[str, Any]
) -> tuple[str, int]:
    """Evaluates, prints, and returns the split and how many batches were asked for."""
    split = _SPLIT.value or run.config.data.held_out_split
    batches = _BATCHES.value or run.config.evaluation.batches
    evaluate = Evaluator(run, data, split, batches)
    with jax.set_mesh(run.mesh):
        measured = evaluate(parameters, variables)
    if _FORMAT.value == "json":
        found = {**what, "split": split, "batches": evaluate.num_batches, **measured}
        print(json.dumps(found))
        return split, batches
    named = ", ".join(f"{name} {value}" for name, value in what.items())
    asked = "" if evaluate.num_batches == batches else f" (all there are; {batches} were asked for)"
    print(f"{named}, {split} split, {evaluate.num_batches} batches{asked}")
    print(metrics.held_out_table(measured, of_text=data.tokenizer is not None))
    return split, batches


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
