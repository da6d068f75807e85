"""docs/one_token.md names the files that one token's training step goes through, and they are few."""

import pathlib
import re
import sys
from types import FrameType

import jax
import pytest

import moe_jax
from configs.quickstart import get_config
from moe_jax.training.run import Run

PACKAGE = pathlib.Path(moe_jax.__file__).parent
PAGE = (PACKAGE.parent / "docs/one_token.md").read_text()


def file_of(frame: FrameType) -> str | None:
    """The module's path in the package; None outside."""
    path = pathlib.Path(frame.f_code.co_filename)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


@pytest.fixture(scope="module")
def walk() -> tuple[list[str], list[str]]:
    """Files from `train_step` to the first product of the experts while the quickstart is traced.

    Returns:
      those on the way, outermost first (the call stack at the product); and all whose functions ran
      in between.
    """
    run = Run.build(get_config())
    stack: list[str] = []
    ran: list[str] = []
    started = False

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal started
        file = file_of(frame)
        if event != "call" or file is None or stack:
            return
        function = frame.f_code.co_qualname
        started = started or function == "train_step.<locals>.step"
        if started and file not in ran:
            ran.append(file)
        if function == "FeedForwardExpert.up":
            caller: FrameType | None = frame
            while caller is not None and file_of(caller) != "training/run.py":
                name = file_of(caller)
                if name is not None and name not in stack:
                    stack.append(name)
                caller = caller.f_back

    with jax.set_mesh(run.mesh):
        arguments = run.abstract_arguments()
        sys.setprofile(profile)
        try:
            run.train_step.trace(*arguments)
        finally:
            sys.setprofile(None)
    return stack[::-1], ran


def listed(heading: str) -> list[str]:
    """The files of the page's list under a heading, in order."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(
        r"^(?:\d+\.|-) \[([\w/]+\.py)\]\(\.\./moe_jax/\1\)", section, flags=re.MULTILINE
    )


def test_a_token_passes_through_few_files(walk):
    path, _ = walk
    assert path[0] == "training/step.py" and path[-1] == "layers/feed_forward.py"
    assert len(path) <= 10
    assert listed("The way to its expert") == path


def test_what_decides_where_it_goes_is_listed(walk):
    path, ran = walk
    asked = [
        file for file in ran if file.startswith(("routing/", "dispatch/")) and file not in path
    ]
    assert listed("Who decides where it goes") == asked
