"""Runs what claims need, a process for each run, until nothing is left to do.

What is to be done next is a function of the folders alone, so that a suite which was killed goes on
where it was.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import SpawnProcess
from types import FrameType

from tqdm import tqdm

from moe_jax.analysis.accounting import families
from moe_jax.analysis.accounting.training import training_flops
from moe_jax.parallel.mesh import AXES
from moe_jax.reproduction.claim import Claim, Measurement, Profile, Side
from moe_jax.reproduction.results import Results, SideResult
from moe_jax.reproduction.runs import RunFolder
from moe_jax.reproduction.worker import work
from moe_jax.training.loop import Interrupted


@dataclasses.dataclass(frozen=True)
class Job:
    """Work for one process.

    Attributes:
      folder: the run.
      measurements: to be made when it is trained.
      label: for people: claim, side, learning rate and seed that asked first.
    """

    folder: RunFolder
    measurements: tuple[Measurement, ...]
    label: str


@dataclasses.dataclass(frozen=True)
class SidePlan:
    """A side of a claim in a suite's workdir."""

    claim: str
    side: Side
    workdir: pathlib.Path

    @functools.cached_property
    def folders(self) -> dict[tuple[float, int], RunFolder]:
        """(learning rate, seed) -> the run."""
        return {
            (rate, seed): RunFolder.of(self.side.config(rate, seed), self.workdir)
            for rate in self.side.learning_rates
            for seed in self.side.seeds
        }

    def grid(self) -> dict[float, RunFolder]:
        """Learning rate -> the first seed's run."""
        return {x: self.folders[x, self.side.seeds[0]] for x in self.side.learning_rates}

    def learning_rate(self) -> float | None:
        """The one with the lowest validation loss; None while runs of the grid are missing."""
        grid = self.grid()
        if len(grid) == 1:
            return self.side.learning_rates[0]
        if not all(run.trained for run in grid.values()):
            return None
        return min(grid, key=lambda rate: grid[rate].validation_loss)

    def runs(self, learning_rate: float) -> list[RunFolder]:
        """Of all seeds."""
        return [self.folders[learning_rate, seed] for seed in self.side.seeds]

    def jobs(self) -> list[Job]:
        """What can be done now; empty when the side is finished."""
        rate = self.learning_rate()
        if rate is None:
            unfinished = [(x, run) for x, run in self.grid().items() if not run.trained]
            return [self._job(run, (), x) for x, run in unfinished]
        wanted = self.side.measurements
        return [
            self._job(run, wanted, rate)
            for run in self.runs(rate)
            if not run.trained or run.missing(wanted)
        ]

    def _job(self, run: RunFolder, wanted: tuple[Measurement, ...], rate: float) -> Job:
        label = f"{self.claim}: {self.side.name}, rate {rate:g}, seed {run.config.seed}"
        return Job(run, wanted, label)

    def runs_left(self) -> set[pathlib.Path | tuple[str, str, int]]:
        """Runs that are to be trained or measured, as names; of a rate not chosen yet, too."""
        left: set[pathlib.Path | tuple[str, str, int]] = {job.folder.path for job in self.jobs()}
        if self.learning_rate() is None:
            first = str(next(iter(self.grid().values())).path)
            left |= {("chosen", first, seed) for seed in self.side.seeds}
        return left

    def result(self, platform: str) -> SideResult:
        """What came of the finished side, whose runs were on `platform` (cpu, gpu)."""
        rate = self.learning_rate()
        assert rate is not None, f"{self.claim}: {self.side.name} is not finished"
        config = self.side.config(rate, self.side.seeds[0]).with_group_sizes()
        mesh = {axis: getattr(config.mesh, axis) for axis in AXES}
        flops = training_flops(config.model, config.data, platform, mesh)
        grid = self.grid() if len(self.side.learning_rates) > 1 else {}
        runs = self.runs(rate)
        trained = {run.path: run for run in (*grid.values(), *runs)}
        return SideResult(
            self.side,
            config,
            rate,
            {x: run.validation_loss for x, run in grid.items()},
            [run.finished(self.side.measurements) for run in runs],
            sum(run.seconds for run in trained.values()),
            families.account(config.model, config.data).parameters,
            config.steps * flops.algorithmic,
            config.steps * flops.executed,
        )


@dataclasses.dataclass(frozen=True)
class Working:
    """A process at work: its job, and when it began, in seconds of `time.time`."""

    process: SpawnProcess
    job: Job
    start: float


def plans_of(claim: Claim, profile: Profile, workdir: pathlib.Path) -> list[SidePlan]:
    """Of all sides."""
    return [SidePlan(claim.name, side, workdir) for side in claim.sides(profile)]


def jobs_of(plans: Sequence[SidePlan]) -> list[Job]:
    """What can be done now, each run once with the measurements that all plans want."""
    jobs: dict[pathlib.Path, Job] = {}
    for plan in plans:
        for job in plan.jobs():
            known = jobs.get(job.folder.path, job)
            named = {m.name: m for m in (*known.measurements, *job.measurements)}
            jobs[job.folder.path] = dataclasses.replace(known, measurements=tuple(named.values()))
    return list(jobs.values())


def run_all(plans: Sequence[SidePlan], processes: int) -> dict[pathlib.Path, str]:
    """Trains and measures until nothing can be done any more.

    Args:
      plans: of all claims.
      processes: how many work at the same time; with several, each has its share of the cores.

    Returns:
      Folder of each run that failed -> what it was; the others were finished all the same.

    Raises:
      Interrupted: SIGTERM or SIGINT came; all runs have saved their states.
    """
    failed: dict[pathlib.Path, str] = {}
    running: dict[int, Working] = {}
    left = _left(plans)
    with _stop_signal() as received, tqdm(total=left, unit="run", disable=not left) as bar:
        try:
            while True:
                if not received:
                    _start_what_can_be(plans, failed, running, processes)
                if not running:
                    break
                _show(bar, plans, running, failed)
                for place in _ended(running, received):
                    ended = running.pop(place)
                    ended.job.folder.worked(time.time() - ended.start)
                    if ended.process.exitcode and not received:
                        failed[ended.job.folder.path] = ended.job.label
                        bar.write(
                            f"failed: {ended.job.label}; see {ended.job.folder.log}",
                            file=sys.stderr,
                        )
        finally:
            for working in running.values():
                working.process.terminate()
                working.process.join()
        _show(bar, plans, running, failed)
    if received:
        left = _left(plans)
        raise Interrupted(f"stopped with {left} runs left; the same command continues", received[0])
    return failed


def results_of(claim: Claim, profile: Profile, workdir: pathlib.Path) -> Results | None:
    """What came of a claim's runs; None while some are missing."""
    plans = plans_of(claim, profile, workdir)
    if any(plan.jobs() for plan in plans):
        return None
    return Results(profile, {plan.side.name: plan.result(profile.value) for plan in plans})


def _start_what_can_be(
    plans: Sequence[SidePlan],
    failed: Mapping[pathlib.Path, str],
    running: dict[int, Working],
    processes: int,
) -> None:
    """Gives a job to each place that has none."""
    busy = {working.job.folder.path for working in running.values()} | failed.keys()
    ready = [job for job in jobs_of(plans) if job.folder.path not in busy]
    free = [place for place in range(processes) if place not in running]
    # Only Linux keeps a process on some cores.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for place, job in zip(free, ready, strict=False):
        own = cores[place::processes] if processes > 1 else cores
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=work, args=(job.folder, job.measurements, own))
        process.start()
        running[place] = Working(process, job, time.time())


def _ended(running: Mapping[int, Working], received: Sequence[int]) -> list[int]:
    """Waits until some processes end; after a signal all are asked to save and stop."""
    processes = [working.process for working in running.values()]
    while not received:
        if multiprocessing.connection.wait([p.sentinel for p in processes], timeout=1.0):
            break
    else:
        for process in processes:
            process.terminate()
            process.join()
    return [place for place, working in running.items() if working.process.exitcode is not None]


def _left(plans: Sequence[SidePlan]) -> int:
    return len(set[object]().union(*(plan.runs_left() for plan in plans)))


def _show(
    bar: tqdm,
    plans: Sequence[SidePlan],
    running: Mapping[int, Working],
    failed: Mapping[pathlib.Path, str],
) -> None:
    bar.set_description("; ".join(x.job.label for x in running.values()), refresh=False)
    bar.set_postfix({"failed": len(failed)} if failed else {}, refresh=False)
    bar.update(bar.total - _left(plans) - bar.n)
    bar.refresh()


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list that receives SIGTERM or SIGINT, which a terminal sends to the runs as well."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
