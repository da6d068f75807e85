"""What several processes agree on, and the places among them that are refused."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import types

import jax
import pytest

from moe_jax.errors import UserError
from moe_jax.parallel import multihost
from moe_jax.parallel.mesh import MeshConfig, make_mesh

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"coordinator": "a:1", "process_id": 0},
            "--process_count is not given; --coordinator, --process_count and --process_id go "
            "together, so give all three.",
        ),
        (
            {"process_count": 2},
            "--coordinator and --process_id are not given; --coordinator, --process_count and "
            "--process_id go together, so give all three.",
        ),
        *(
            (
                {"coordinator": address, "process_count": 2, "process_id": 0},
                f"--coordinator is '{address}'; write it as host:port, with a port from 1 to 65535.",
            )
            for address in ("a", "a:b", ":1", "a:", "a:0", "a:65536", "a:\u0661", "a:\u00b2")
        ),
        (
            {"coordinator": "a:1", "process_count": 0, "process_id": 0},
            "--process_count is 0; it must be at least 1.",
        ),
        (
            {"coordinator": "a:1", "process_count": 2, "process_id": 2},
            "--process_id is 2; it must be at least 0 and below --process_count=2.",
        ),
        (
            {"detect": True, "process_count": 2},
            "--distributed and --process_count are both given; the first lets JAX detect what the "
            "second says, so give one of them.",
        ),
    ],
)
def test_a_place_that_does_not_exist_is_refused(arguments, message):
    with pytest.raises(UserError) as error:
        multihost.join(**arguments)
    assert str(error.value) == message


def test_without_arguments_nothing_is_joined():
    multihost.join()
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "flag", "advice"),
    [
        (
            {"detect": True},
            "--distributed",
            "give --coordinator, --process_count and --process_id instead.",
        ),
        (
            {"coordinator": "a:1", "process_count": 2, "process_id": 0},
            "--coordinator=a:1",
            "give all processes a host:port on which process 0 can listen, and each its own "
            "--process_id.",
        ),
    ],
)
def test_a_process_that_cannot_be_started_is_one_sentence(arguments, flag, advice):
    jax.devices()
    with pytest.raises(UserError) as error:
        multihost.join(**arguments)
    assert str(error.value).startswith(f"{flag} does not work here (jax.distributed.init")
    assert str(error.value).endswith(f"); {advice}")
    assert "\n" not in str(error.value)


def test_a_mesh_without_devices_of_a_process_is_refused(monkeypatch):
    mesh = make_mesh(MeshConfig(expert=4))
    multihost.check_mesh(mesh)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"has 4 of the 8 devices of 2 processes, .* process 1 "):
        multihost.check_mesh(mesh)


def test_processes_with_unequal_devices_are_refused_before_they_talk(monkeypatch):
    mesh = make_mesh(MeshConfig(expert=4))
    devices = [types.SimpleNamespace(process_index=index) for index in (0, 0, 0, 1, 1, 1, 2, 2)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(UserError) as error:
        multihost.check_mesh(mesh)
    assert str(error.value) == (
        "process 2 has 2 devices and process 0 has 3; give every process the same "
        "mesh.host_devices."
    )


def test_alone_the_process_decides_for_itself():
    assert multihost.by_first_process(lambda: 7) == 7
    assert multihost.by_first_process(lambda: None) == 0
    multihost.check_same("config", "x")
    with pytest.raises(OSError, match="full"):
        multihost.by_first_process(_fail)


def _fail() -> int:
    raise OSError("full")


_PROGRAM = """
    import logging, socket, sys
    import jax
    from moe_jax.errors import UserError
    from moe_jax.parallel import multihost

    index = int(sys.argv[2])
    multihost.join(coordinator=sys.argv[1], process_count=2, process_id=index)
    assert jax.process_index() == index and jax.process_count() == 2
    with socket.socket() as probe:  # The service listens where it was told to, and not everywhere.
        assert probe.connect_ex(("127.0.0.2", int(sys.argv[1].rpartition(":")[2])))

    def fail():
        raise OSError("disk full")

    assert multihost.by_first_process(lambda: 40 + index) == 40
    multihost.check_same("config", "the same")
    for attempt in (
        lambda: multihost.check_same("config", f"of {index}"),
        lambda: multihost.by_first_process(fail),
    ):
        try:
            attempt()
        except (UserError, OSError) as error:
            print(type(error).__name__, error, file=sys.stderr)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    multihost.only_first_informs()
    logging.getLogger("moe_jax.x").info("told once")
    logging.getLogger("moe_jax.x").warning("told by each")
"""


def test_two_processes_agree():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    # JAX warns of each variable that names a proxy.
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(_PROGRAM), address]
    processes = [
        subprocess.Popen(
            [*command, str(index)],
            env=environment,
            stdout=subprocess.DEVNULL,  # Gloo writes a line for each connection.
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], errors
    differing = (
        "UserError process 1 has another config than process 0; give every process the same flags "
        "and files."
    )
    told = "told by each"
    assert errors[0] == [differing, "OSError disk full", "told once", told]
    assert errors[1] == [
        differing,
        "UserError process 0 cannot go on, and its last line says why.",
        told,
    ]
