"""What is wrong is said in one sentence, whatever script it is said to; nothing hangs."""

import pathlib
import subprocess
import sys

import pytest

from tests.bad_input import places
from tests.bad_input.forks import ROOT, Forks
from tests.bad_input.table import CASES


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("bad_input")
    places.make(folder)
    return folder


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    return Forks(tmp_path_factory.mktemp("output"))


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and ". " not in text.replace("e.g. ", "").replace("...", "")


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_one_sentence_and_status_2(number, forks, tmp):
    case, new = CASES[number], str(tmp / f"new{number}")

    def filled(text: str) -> str:
        text = text.replace("{tmp}/new", new)
        return text.replace("{tmp}", str(tmp)).replace("{run}", str(tmp / "run"))

    done = forks.run(case.script, [filled(argument) for argument in case.arguments])
    assert done.status == 2, done.err
    assert done.out == ""
    *_, sentence = done.err.splitlines()
    assert "Traceback" not in done.err
    assert is_one_sentence(sentence), sentence
    for word in case.words:
        assert filled(word) in sentence, sentence


@pytest.mark.parametrize("case", CASES[:: len(CASES) // 15], ids=str)
def test_the_same_in_a_process_of_its_own(case, tmp):
    arguments = [
        argument.replace("{tmp}/new", str(tmp / "process")).replace("{tmp}", str(tmp))
        for argument in case.arguments
    ]
    arguments = [argument.replace("{run}", str(tmp / "run")) for argument in arguments]
    done = subprocess.run(
        [sys.executable, case.script, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert is_one_sentence(done.stderr.splitlines()[-1])
