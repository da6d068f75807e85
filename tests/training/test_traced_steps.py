"""Steps under the profiler: which, where the trace is, and what is refused."""

import logging

import jax.numpy as jnp
import pytest
from etils import epath
from jax.profiler import ProfileData

from moe_jax.errors import UserError
from moe_jax.training import traced_steps
from moe_jax.training.traced_steps import StepTracer


def test_steps_are_read():
    assert traced_steps.parse("10:5") == range(10, 15)
    assert list(traced_steps.parse("")) == []


@pytest.mark.parametrize("text", ["10", "0:5", "10:0", "a:b", "10:5:1", "-1:2"])
def test_what_names_no_steps_is_refused(text):
    with pytest.raises(UserError) as error:
        traced_steps.parse(text)
    assert str(error.value) == (
        f"--profile_steps is {text!r}; write it as FIRST:COUNT, both at least 1, such as 10:5 for "
        "the steps 10 to 14."
    )


def run(tracer: StepTracer, steps: range) -> list[int]:
    """Does some steps, and gives those after which the tracer stopped."""
    stopped = []
    for step in steps:
        tracer.before(step, ())
        if tracer.after(step, jnp.arange(step) + 1):
            stopped.append(step)
    tracer.close()
    return stopped


def traces(workdir: epath.Path) -> list[epath.Path]:
    return list((workdir / "profile" / "process_0").glob("plugins/profile/*/*.xplane.pb"))


def test_the_trace_is_in_the_runs_folder_and_one_line_says_so(tmp_path, caplog):
    workdir = epath.Path(tmp_path)
    with caplog.at_level(logging.INFO, "moe_jax"):
        assert run(StepTracer(range(2, 4), workdir), range(1, 6)) == [3]
    assert [record.getMessage() for record in caplog.records] == [
        f"The trace of this process's devices is in {workdir}/profile/process_0; open all with "
        f"`xprof --logdir={workdir}/profile`."
    ]
    (trace,) = traces(workdir)
    assert list(ProfileData.from_file(str(trace)).planes)


@pytest.mark.parametrize("steps", [range(3, 6), range(1, 3)], ids=["continued", "ended"])
def test_a_run_within_the_steps_traces_those_that_it_does(tmp_path, steps):
    workdir = epath.Path(tmp_path)
    run(StepTracer(range(2, 5), workdir), steps)
    assert len(traces(workdir)) == 1


def test_without_steps_nothing_is_traced(tmp_path):
    assert run(StepTracer(range(0), epath.Path(tmp_path)), range(1, 4)) == []
    assert not list(tmp_path.iterdir())
