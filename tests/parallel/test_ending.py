"""Several processes all end with the sentence and the status of the one that failed."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import pytest

from moe_jax.parallel import ending
from moe_jax.parallel.stderr_relay import LOST, Filter

ROOT = pathlib.Path(__file__).parents[2]

_SERVICE = b"E1129 18:33:24.301658    5244 coordination_service.cc:1549] [4954] Use error polling\n"
_CLIENT = (
    b"F1129 18:33:24.302346    5255 client.h:80] Terminating process because the JAX distribu\n"
)
_TRACES = b"1\n*** Check failure stack trace: ***\n    @     0x7f2e35e40634  absl::lts\n"


def relayed(*contents: bytes) -> bytes:
    relay = Filter()
    return b"".join([*(relay.passed(content) for content in contents), relay.rest()])


@pytest.mark.parametrize("fatal", [_SERVICE, _CLIENT, _SERVICE + _TRACES + _CLIENT])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_of_fatal_lines_one_sentence_is_passed_on(fatal, size):
    written = b"Starting\n" + fatal + _TRACES
    parts = [written[i : i + size] for i in range(0, len(written), size)]
    assert relayed(*parts) == b"Starting\n" + LOST.encode() + b"\n"
    assert relayed(b"\r 5%", fatal, _TRACES) == b"\r 5%\n" + LOST.encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        b"", b"E", b"Every word\n", b"E1129", b"E1129 18:33:24.1 5 other.cc:1] text\n", b"\r 5%\r 6%",
        b"W1129 18:33:24.1 5 coordination_service.cc:1] text\n", b"Fatal Python error: Aborted\n",
        b"of client.h:80] in the middle\n", "\u00e4\u2588\n".encode(), b"\xff\n",
    ],
)  # fmt: skip
def test_other_lines_are_passed_on_as_they_are(line):
    assert relayed(line) == line
    assert relayed(*(bytes([byte]) for byte in line)) == line


def test_what_cannot_become_fatal_is_passed_on_at_once():
    relay = Filter()
    assert relay.passed(b"\r 5%") == b"\r 5%"
    assert relay.passed(b"E11x") == b"E11x"


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error", True),
        ("UNAVAILABLE: Socket closed", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: unhandled system error", True),
        ("UNAVAILABLE: Error writing gs://bucket/run/checkpoints/8/d: Connection reset by peer", False),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.", False),
        ("the config is wrong, because the connection closed", False),
    ],
)  # fmt: skip
def test_errors_of_a_lost_process_are_told_from_others(monkeypatch, message, lost):
    assert not ending.is_of_lost_process(ValueError(message))  # Alone, a process can lose none.
    monkeypatch.setattr(ending, "_is_one_of_several", lambda: True)
    for kind in (ValueError, jax.errors.JaxRuntimeError):
        assert ending.is_of_lost_process(kind(message)) == lost
    assert not ending.is_of_lost_process(OSError(message))


_PROGRAM = """
    import os, signal, sys
    import jax
    from moe_jax import command_line
    from moe_jax.errors import UserError
    from moe_jax.parallel import ending, multihost

    ending._LINGER_SECONDS = 1.5 * ending._LOOK_SECONDS
    multihost.PATIENCE_SECONDS = 5
    address, index, failing, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

    def main():
        multihost.join(coordinator=address, process_count=2, process_id=index)
        multihost.wait_for_all()
        if index == failing and how == "user":
            raise UserError("the data are gone.")
        if index == failing and how == "python":
            raise ValueError("a bug")
        if index == failing and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(100_000):
            multihost.wait_for_all()

    command_line.report_to_user(main)
"""


def ended(failing: int, how: str) -> tuple[list[int], list[str]]:
    """Statuses, and what is on stderr, of two processes of which one fails."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(_PROGRAM), address]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(failing), how], env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # Without the log before the program begins.
    said = [
        [
            line
            for line in text.splitlines()
            if line and "joins the others" not in line and "Logging" not in line
        ]
        for text in errors
    ]
    return [process.returncode for process in processes], said


def test_a_mistake_of_one_ends_both_with_its_sentence_and_status():
    codes, said = ended(1, "user")
    assert codes == [2, 2], said
    assert said == [["process 1 ended: the data are gone."], ["the data are gone."]]


def test_an_error_of_one_has_its_traceback_there_only():
    codes, said = ended(1, "python")
    assert codes == [1, 1], said
    assert said[1][0].startswith("Traceback") and said[1][-1] == "ValueError: a bug"
    assert said[0] == ["process 1 ended: ValueError, whose traceback it has written."]


@pytest.mark.parametrize("failing", [0, 1])
def test_of_a_killed_process_the_other_says_one_sentence(failing):
    codes, said = ended(failing, "kill")
    assert codes[failing] == -signal.SIGKILL
    assert codes[1 - failing] in (-signal.SIGABRT, ending.LOST_STATUS), said
    assert said[1 - failing] == [LOST] and not said[failing]
