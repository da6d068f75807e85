"""A run from its config: create or resume, train, evaluate, log, checkpoint, report.

With several processes, which must share the run's folder, every process calls every function here.
Process 0 alone reads what decides how to go on, and writes everything but the checkpoints' arrays.
"""

import contextlib
import functools
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from moe_jax import component, configuration
from moe_jax.data.interface import Pipeline
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError
from moe_jax.parallel import multihost
from moe_jax.training import experiment, metrics, provenance
from moe_jax.training.checkpoints import Checkpoints, CheckpointStage
from moe_jax.training.evaluator import Evaluator
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import updates_done
from moe_jax.training.run import Run, broadcast_signal
from moe_jax.training.run_lock import RunLock
from moe_jax.training.state import TrainState
from moe_jax.training.traced_steps import StepTracer

_LOG = logging.getLogger(__name__)

# In place of a signal's number: process 0 could not write.
_FAILED = 1000
# So many records in a row without any gradient are no accident of the data.
_ZERO_GRADIENTS = 3


class Interrupted(Exception):  # noqa: N818 - it is no error.
    """The run was asked to stop and has saved its state."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class DivergedError(UserError):
    """The loss, a gradient or what the update left was not finite at `step`."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def train(
    config: Experiment,
    workdir: epath.PathLike,
    on_stage: Callable[[CheckpointStage, int], None] | None = None,
    profiled: range = range(0),
) -> list[metrics.Record]:
    """Trains until `config.steps`, continuing the run in `workdir` if there is one.

    Args:
      config: the run.
      workdir: gets config.json, metrics.jsonl, TensorBoard events and checkpoints/; a path that epath
        knows, also on Google Cloud Storage or S3.
      on_stage: told of the stages of each checkpoint.
      profiled: steps under JAX's profiler; see `moe_jax.training.traced_steps`.

    Returns:
      All records of the run.

    Raises:
      UserError: the config cannot work, `workdir` holds another run or only damaged checkpoints, another
        process trains the run, or the folder cannot be written or vanishes.
      DivergedError: the loss, a gradient or a parameter is not finite.
      Interrupted: SIGTERM or SIGINT came; the state was saved.
    """
    run = Run.build(config)
    multihost.check_same("config", json.dumps(configuration.encode(config)))
    multihost.check_same("JAX setting", json.dumps(provenance.numerics()))
    workdir = epath.Path(workdir)
    with _alone(workdir) as lock:
        _train(run, workdir, lock, on_stage, profiled)
        records = metrics.read(workdir)
        if not records:
            multihost.by_first_process(lambda: lock.check() if lock else None)
            raise UserError(
                f"the run in {workdir} has done its last step, but its {metrics.METRICS_FILE} is gone; "
                "bring it back, or ask for more steps."
            )
    return records


@contextmanager
def _alone(workdir: epath.Path) -> Iterator[RunLock | None]:
    """Keeps other trainers out of the run's folder; the lock is process 0's."""
    with contextlib.ExitStack() as held:
        locks: list[RunLock] = []
        multihost.by_first_process(lambda: locks.append(RunLock.take(workdir)))
        yield held.enter_context(locks[0]) if locks else None


def _train(
    run: Run,
    workdir: epath.Path,
    lock: RunLock | None,
    on_stage: Callable[[CheckpointStage, int], None] | None,
    profiled: range,
) -> None:
    """`train`, alone in the run's folder."""
    config = run.config
    begun = multihost.by_first_process(lambda: _is_begun(config, workdir))
    data = config.data.reopen(config.seed, workdir) if begun else config.data.open(config.seed)
    dataset = data.record()
    multihost.check_same(f"data in dataset {dataset['name']}", data.sha256)
    evaluate = Evaluator(run, data, config.data.held_out_split, config.evaluation.batches)
    record = _run_record(run, dataset)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep, on_stage, record)
    with jax.set_mesh(run.mesh):
        step = multihost.by_first_process(
            lambda: _step_to_start_from(config, workdir, dataset, checkpoints)
        )
        state = _restored(run, checkpoints, step) if step else run.initial_state()
        multihost.by_first_process(lambda: _write_config(record, workdir, data.tokenizer))
        _LOG.info(
            "%s %s on %s; mesh %s; %s",
            "Continuing from step" if step else "Starting at step",
            step,
            provenance.devices(),
            config.mesh,
            workdir,
        )
        if step < config.steps:
            _Loop(run, data, evaluate, checkpoints, workdir, lock).go(state, step, profiled)
        else:
            _evaluate_finished(state, step, evaluate, workdir)
    multihost.wait_for_all()


def _is_begun(config: Experiment, workdir: epath.Path) -> bool:
    """Whether there is a run in `workdir`, which `config` may continue."""
    if not (workdir / experiment.CONFIG_FILE).exists():
        _bring_config_back(workdir)
    begun = (workdir / experiment.CONFIG_FILE).exists()
    if begun:
        experiment.check_continues(workdir, config)
    return begun


def _bring_config_back(workdir: epath.Path) -> None:
    """Writes config.json anew from what a checkpoint's manifest says of its run, if there is any."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    for step in reversed(checkpoints.steps()):
        if record := checkpoints.about(step):
            _write_record(record, workdir)
            _LOG.warning(
                "workdir %s has lost its %s, which is written anew from the manifest of checkpoint step %d.",
                *(workdir, experiment.CONFIG_FILE, step),
            )
            return


def _step_to_start_from(
    config: Experiment, workdir: epath.Path, dataset: dict[str, Any], checkpoints: Checkpoints
) -> int:
    """The step of the newest good checkpoint, 0 in a new folder."""
    begun = (workdir / experiment.CONFIG_FILE).exists()
    if begun:
        experiment.check_same_data(workdir, dataset["name"], dataset["sha256"])
        experiment.check_same_numerics(workdir)
    elif checkpoints.steps():
        raise UserError(
            f"workdir {workdir} has checkpoints but no {experiment.CONFIG_FILE}, so it cannot be "
            "continued; bring the file back or use a new --workdir."
        )
    step = checkpoints.newest_good() or 0
    if begun and not step:
        _check_that_none_was_lost(workdir)
    if step > config.steps:
        raise UserError(
            f"steps is {config.steps}, but the run in {workdir} has done {step} already; ask "
            "for more, or use a new --workdir."
        )
    if begun and step:
        experiment.say_change_of_rate(workdir, config, step)
    return step


def _check_that_none_was_lost(workdir: epath.Path) -> None:
    """Raises UserError where there is no checkpoint, but records that only a run with one could have."""
    config = experiment.load(workdir)
    every = config.checkpoint.every
    # Where updates are skipped a checkpoint waits.
    latest = every + (config.skip_limit if config.skip_nonfinite else 0)
    last = max((record["step"] for record in metrics.read(workdir)), default=0)
    if last > latest:
        raise UserError(
            f"workdir {workdir} has records up to step {last}, but no checkpoint, though every {every} "
            "steps one was made; bring the folder checkpoints back, or use a new --workdir to start from "
            "the beginning."
        )


def _restored(run: Run, checkpoints: Checkpoints, step: int) -> TrainState:
    """The state of a checkpoint.

    Raises:
      UserError: it cannot be read, or its numbers are not finite, as versions before 0.2 may have left
        them.
    """
    state = run.restore(checkpoints, step)
    if not jax.jit(run.are_finite)((state.parameters, state.variables)):
        raise UserError(
            f"checkpoint step {step} of this run holds parameters that are not finite, from which "
            "nothing can be learned; delete its folder to continue from an earlier one."
        )
    return state


def _evaluate_finished(
    state: TrainState, step: int, evaluate: Evaluator, workdir: epath.Path
) -> None:
    """Adds the final evaluation where --steps names the step at which a run was stopped."""

    def last_record() -> metrics.Record:
        last = metrics.read(workdir)[-1:]
        return last[0] if last and last[0]["step"] == step else {"step": step}

    if not multihost.by_first_process(lambda: "eval/loss" not in last_record()):
        return
    losses = evaluate(state.parameters, state.variables)
    if _first_process():
        record = last_record()
        writer = metrics.MetricsWriter(workdir, step - 1)
        writer.write({**record, **losses})
        writer.close()


def _first_process() -> bool:
    return jax.process_index() == 0


def _run_record(run: Run, dataset: dict[str, Any]) -> dict[str, Any]:
    """What config.json and the checkpoints' manifests say of the run."""
    return {
        "config": configuration.encode(run.config),
        "imports": component.origins(configuration.classes(run.config)),
        "dataset": dataset,
        **provenance.record(),
    }


def _write_config(record: dict[str, Any], workdir: epath.Path, tokenizer: Tokenizer | None) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:  # First, because with a config.json the run has begun.
        tokenizer.save(workdir)
    _write_record(record, workdir)


def _write_record(record: dict[str, Any], workdir: epath.Path) -> None:
    temporary = workdir / (experiment.CONFIG_FILE + ".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(workdir / experiment.CONFIG_FILE)


class _Loop:
    """The steps of one process's life."""

    def __init__(
        self,
        run: Run,
        data: Pipeline,
        evaluate: Evaluator,
        checkpoints: Checkpoints,
        workdir: epath.Path,
        lock: RunLock | None,
    ) -> None:
        self.run, self.data, self.evaluate = run, data, evaluate
        self.checkpoints, self.workdir, self.lock = checkpoints, workdir, lock
        self.signals = functools.cache(functools.partial(broadcast_signal, run.mesh))
        self.are_finite = jax.jit(run.are_finite)
        self.failure: UserError | None = None
        self.last_good = 0
        self.checked = 0
        # Updates that were skipped: of the whole run, and in a row up to the step that was checked last.
        self.skipped = 0
        self.skipped_now = 0
        self.zero_gradients = 0
        self.postponed = False

    def go(self, state: TrainState, start: int, profiled: range) -> None:
        """Steps `start` + 1 to the last one; see `train` for `profiled`."""
        config = self.run.config
        self.last_good = self.checked = start
        done = updates_done(state.optimizer)
        self.skipped = 0 if done is None else start - done
        writer = self._open_records(start)
        clock = _Clock(config.data.batch_size * config.data.tokens_per_row)
        tracer = StepTracer(profiled, self.workdir)
        if profiled and not set(profiled) & set(range(start + 1, config.steps + 1)):
            _LOG.info(
                "No step is profiled: --profile_steps names the steps %s to %s, and this run does %s to %s.",
                *(profiled[0], profiled[-1], start + 1, config.steps),
            )
        previous: dict[str, Any] | None = None
        try:
            with _progress(start, config.steps) as bar, _stop_signal() as received:
                for step in range(start + 1, config.steps + 1):
                    tracer.before(step, state)
                    batch = self._batch(step)
                    clock.before_call()
                    number = _FAILED if self.failure else received[0] if received else 0
                    signals = self.signals(number)
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, step_metrics = self.run.train_step(
                            state, batch, signals, self.run.hyperparameters
                        )
                    clock.after_call()
                    if tracer.after(step, step_metrics):
                        clock.restart()
                    # Looked at one step late, so that the next step is already on its way.
                    self._check_finite(step - 1, previous)
                    signal_number = 0 if previous is None else int(previous["signal"])
                    previous = step_metrics
                    if self._due(step):
                        self._check_finite(step, step_metrics)
                        record = self._record(step, step_metrics, clock) if writer else {}
                        if self._evaluation_due(step):
                            record |= self.evaluate(state.parameters, state.variables)
                        if writer:
                            self._write(writer, record)
                            _show(bar, record)
                        clock.restart()
                    if self._checkpoint_due(step, step_metrics):
                        self._save(step, state, step_metrics)
                        clock.restart()
                    bar.update()
                    if signal_number == _FAILED:
                        raise self.failure or multihost.first_process_failed()
                    if signal_number and step < config.steps:
                        self._save(step, state, step_metrics)
                        raise Interrupted(
                            f"stopped at step {step} of {config.steps} and saved; run the same "
                            f"command again to continue ({self.workdir})",
                            signal_number,
                        )
            self._say_what_was_skipped()
        finally:
            tracer.close()
            if writer:
                writer.close()

    def _batch(self, step: int) -> dict[str, Any]:
        batch_size = self.run.config.data.batch_size
        return self.run.put(lambda first, last: self.data.rows(step - 1, first, last), batch_size)

    def _due(self, step: int) -> bool:
        config = self.run.config
        return (
            step % config.logging.every == 0 or step == config.steps or self._evaluation_due(step)
        )

    def _evaluation_due(self, step: int) -> bool:
        config = self.run.config
        every = config.evaluation.every
        return step == config.steps or (every > 0 and step % every == 0)

    def _checkpoint_due(self, step: int, step_metrics: dict[str, Any]) -> bool:
        """Every so many steps, but after an update that was done.

        One that was skipped may be the first of many: it shows that the parameters may be of no use, and
        they should not replace those of a good checkpoint.
        """
        config = self.run.config
        if step == config.steps:
            return True
        if not self.postponed and step % config.checkpoint.every:
            return False
        self._check_finite(step, step_metrics)
        self.postponed = self.skipped_now > 0
        return not self.postponed

    def _record(self, step: int, step_metrics: dict[str, Any], clock: "_Clock") -> metrics.Record:
        config = self.run.config
        record = metrics.training_record(jax.device_get(step_metrics), config.model.moe_layers)
        schedule = config.optimizer.learning_rate_at(config.steps)
        # By the updates before this one, as the optimizer counts them.
        skipped_before = self.skipped - (self.skipped_now > 0)
        record["train/learning_rate"] = float(schedule(step - 1 - skipped_before))
        self._say_if_gradients_vanish(step, record)
        return {"step": step, **record, **clock.record()}

    def _open_records(self, start: int) -> metrics.MetricsWriter | None:
        """On process 0, what writes the records."""
        writers: list[metrics.MetricsWriter] = []
        multihost.by_first_process(
            lambda: writers.append(metrics.MetricsWriter(self.workdir, start))
        )
        return writers[0] if writers else None

    def _write(self, writer: metrics.MetricsWriter, record: metrics.Record) -> None:
        """Writes a record; where several processes run, the others learn of a failure from the next step."""
        if self.failure:
            return
        try:
            self._check_folder()
            writer.write(record)
        except OSError as error:
            self.failure = UserError(
                f"the record of step {record['step']} could not be written to "
                f"{self.workdir / metrics.METRICS_FILE}: {error.strerror}; make room or allow writing "
                f"there and run the same command again to continue from step {self.last_good}."
            )
        except UserError as error:
            self.failure = error
        if self.failure and jax.process_count() == 1:
            raise self.failure

    def _check_folder(self) -> None:
        """On process 0: raises UserError where the folder is no longer this run's."""
        if self.failure:
            raise self.failure
        if self.lock:
            self.lock.check()

    def _save(self, step: int, state: TrainState, step_metrics: dict[str, Any]) -> None:
        self._check_finite(step, step_metrics)
        # In the step only where it may still be skipped.
        if not self.are_finite((state.parameters, state.variables)):
            raise self._diverged(step, step_metrics)
        multihost.by_first_process(self._check_folder)
        self.checkpoints.save(step, state)
        self.last_good = step

    def _check_finite(self, step: int, step_metrics: dict[str, Any] | None) -> None:
        if step_metrics is None or step == self.checked:
            return
        self.checked = step
        if bool(step_metrics["finite"]):
            self.skipped_now = 0
            return
        if not self.run.config.skip_nonfinite:
            raise self._diverged(step, step_metrics)
        self.skipped += 1
        self.skipped_now += 1
        what, _ = self._what_is_not_finite(step, step_metrics)
        _LOG.warning("step %d: %s is not finite; its update is skipped", step, what)
        if self.skipped_now == self.run.config.skip_limit:
            raise self._diverged(step, step_metrics)

    def _diverged(self, step: int, step_metrics: dict[str, Any]) -> DivergedError:
        """Says what is not finite and why, and writes all metrics of the step to a file."""
        config = self.run.config
        what, cause = self._what_is_not_finite(step, step_metrics)
        advice = ", or set skip_nonfinite=true to drop such updates"
        if config.skip_nonfinite:
            what = f"after skip_limit={config.skip_limit} skipped updates in a row {what}"
            advice = ""
        return DivergedError(
            f"step {step}: {what} is not finite, {cause}; the last good checkpoint is step "
            f"{self.last_good} in {self.workdir / 'checkpoints'}; lower optimizer.learning_rate"
            f"{advice}{self._written_details(step, step_metrics)}.",
            step,
        )

    def _what_is_not_finite(self, step: int, step_metrics: dict[str, Any]) -> tuple[str, str]:
        """What broke first, and the likely cause."""
        optimizer = self.run.config.optimizer
        rate = f"optimizer.learning_rate={optimizer.learning_rate:g}"
        if not math.isfinite(float(step_metrics["loss"])):
            if step == 1:
                return (
                    "the loss",
                    "before any update, so that the data or the model's settings cause it",
                )
            return "the loss", f"which a too large {rate} causes most often"
        if not math.isfinite(float(step_metrics["gradient_norm"])):
            remedy = "" if optimizer.clip_norm else " or optimizer.clip_norm=0"
            return "the gradient", f"which a too large {rate}{remedy} causes most often"
        return "a parameter", f"though loss and gradient are, which a too large {rate} causes"

    def _written_details(self, step: int, step_metrics: dict[str, Any]) -> str:
        """On process 0, all metrics of a step in a file, and the words that name it."""
        if not _first_process():
            return ""
        moe_layers = self.run.config.model.moe_layers
        record = metrics.training_record(jax.device_get(step_metrics), moe_layers)
        path = self.workdir / f"not_finite_{step}.json"
        try:
            path.write_text(json.dumps({"step": step, **record}, indent=1) + "\n")
        except OSError:  # What is said counts for more.
            return ""
        return f" (details: {path.name})"

    def _say_if_gradients_vanish(self, step: int, record: metrics.Record) -> None:
        if record["train/gradient_norm"]:
            self.zero_gradients = 0
            return
        self.zero_gradients += 1
        if self.zero_gradients == _ZERO_GRADIENTS or step == self.run.config.steps:
            _LOG.warning(
                "step %d: the gradient is exactly 0, for the %d. record in a row, so that nothing is "
                "learned; numbers that are too large or too small for their dtype are the usual cause.",
                *(step, self.zero_gradients),
            )

    def _say_what_was_skipped(self) -> None:
        if self.skipped:
            _LOG.warning(
                "%d of %d updates were skipped; the learning rate went by the others, and ended where "
                "step %d has it.",
                *(self.skipped, self.run.config.steps, self.run.config.steps - self.skipped),
            )


class _Clock:
    """Times of a window between two records; the process's first step, which compiles, is apart."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens = tokens_per_step
        self._compiled = False
        self.restart()

    def restart(self) -> None:
        """Starts a new window."""
        self._start, self._steps, self._in_calls = time.perf_counter(), 0, 0.0

    def before_call(self) -> None:
        """Just before the step function is called."""
        self._call = time.perf_counter()

    def after_call(self) -> None:
        """Just after the call returned, which is before the step is computed."""
        if not self._compiled:
            self._compiled = True
            self.restart()
            return
        self._steps += 1
        self._in_calls += time.perf_counter() - self._call

    def record(self) -> metrics.Record:
        """Throughput and the time until a step's call returns; empty before two steps ran."""
        if not self._steps:
            return {}
        seconds = time.perf_counter() - self._start
        return {
            "time/tokens_per_second": self._tokens * self._steps / seconds,
            "time/step_ms": 1e3 * seconds / self._steps,
            "time/call_returns_ms": 1e3 * self._in_calls / self._steps,
        }


@contextmanager
def _progress(start: int, steps: int) -> Iterator[tqdm]:
    # Off a terminal a line every 10 s is enough.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(
        initial=start,
        total=steps,
        unit="step",
        mininterval=interval,
        leave=True,
        disable=not _first_process(),
    ) as bar:
        yield bar


def _show(bar: tqdm, record: metrics.Record) -> None:
    shown = {"loss": f"{record['train/loss']:.3f}"}
    if "time/tokens_per_second" in record:
        shown["tokens/s"] = f"{record['time/tokens_per_second']:,.0f}"
    if "eval/accuracy" in record:
        shown["held-out accuracy"] = f"{100 * record['eval/accuracy']:.1f}%"
    shown["dropped"] = f"{100 * metrics.dropped_fraction(record):.1f}%"
    bar.set_postfix(shown, refresh=False)


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list that receives SIGTERM or SIGINT; a second SIGINT stops at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
