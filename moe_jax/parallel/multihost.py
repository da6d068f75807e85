"""Runs of several processes: how they find each other, agree, and notice that one is gone.

Every process runs the same command and gets its own devices; the mesh is made of the devices of all
(`mesh.host_devices` counts those of one process). On CPU they talk through gloo, JAX's default.

Whoever decides something from a file or a clock may decide differently on each process, and then
they wait for each other for ever. So what is read from files is decided by process 0
(`by_first_process`), what the user gave is compared (`check_same`), and signals travel with the
metrics of a step (`moe_jax.training.loop`).

A process that fails takes the others with it, with its sentence and its status
(`moe_jax.parallel.ending`). One that is killed is missed by JAX's coordination service, which process 0
hosts: when process 0 dies the others end at once, when another dies all end after `PATIENCE_SECONDS`
without its heartbeat. To end is JAX's doing: an abort (status 134), of which one sentence is shown. The
same command on every process then continues from the newest checkpoint.
"""

import collections
import hashlib
import logging
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.errors import UserError
from moe_jax.parallel import ending

_LOG = logging.getLogger(__name__)

# How long a silent process, or one late at the exit, is waited for; JAX's default for heartbeats.
# For the exit it would wait 300 s.
PATIENCE_SECONDS = 100


def join(
    detect: bool = False,
    coordinator: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
) -> None:
    """Makes this process one of several; does nothing if no argument is given.

    Call it before anything that starts JAX's backend. JAX itself ends a process that has waited 300
    seconds for the others.

    Args:
      detect: let JAX find out the rest, on Cloud TPU, Kubernetes (GKE), Slurm and Open MPI.
      coordinator: host:port of process 0, on which it listens.
      process_count: of all processes.
      process_id: of this one, from 0.

    Raises:
      UserError: the arguments name no place among processes, or JAX cannot start with them.
    """
    explicit = {
        "coordinator": coordinator,
        "process_count": process_count,
        "process_id": process_id,
    }
    given = [name for name, value in explicit.items() if value is not None]
    if not given and not detect:
        return
    if detect and given:
        raise UserError(
            f"--distributed and --{given[0]} are both given; the first lets JAX detect what the "
            "second says, so give one of them."
        )
    if given:
        _check_place(coordinator, process_count, process_id)
        # JAX waits in silence.
        _LOG.info("process %s of %s joins the others at %s", process_id, process_count, coordinator)
    # Signals are the training loop's: JAX's service would catch SIGTERM before Python sees it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            # What the user gave is not to be mixed with what a cluster's variables say.
            cluster_detection_method="deactivate" if given else None,
            # Not on all interfaces of the machine, as JAX would.
            coordinator_bind_address=coordinator,
            heartbeat_timeout_seconds=PATIENCE_SECONDS,
            shutdown_timeout_seconds=PATIENCE_SECONDS,
        )
        ending.watch()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if given:
            raise UserError(
                f"--coordinator={coordinator} does not work here ({reason}); give all processes a "
                "host:port on which process 0 can listen, and each its own --process_id."
            ) from error
        raise UserError(
            f"--distributed does not work here ({reason}); give --coordinator, --process_count and "
            "--process_id instead."
        ) from error


def _check_place(
    coordinator: str | None, process_count: int | None, process_id: int | None
) -> None:
    explicit = (coordinator, process_count, process_id)
    if coordinator is None or process_count is None or process_id is None:
        names = ("--coordinator", "--process_count", "--process_id")
        missing = [name for name, value in zip(names, explicit, strict=True) if value is None]
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given; "
            "--coordinator, --process_count and --process_id go together, so give all three."
        )
    host, _, port = coordinator.rpartition(":")
    is_number = port.isascii() and port.isdigit()
    if not host or not is_number or not 1 <= int(port) <= 65535:
        raise UserError(
            f"--coordinator is {coordinator!r}; write it as host:port, with a port from 1 to 65535."
        )
    if process_count < 1:
        raise UserError(f"--process_count is {process_count}; it must be at least 1.")
    if not 0 <= process_id < process_count:
        raise UserError(
            f"--process_id is {process_id}; it must be at least 0 and below "
            f"--process_count={process_count}."
        )


def check_mesh(mesh: Mesh) -> None:
    """Checks that every process has as many devices, and that the mesh has some of every process.

    Raises:
      UserError: a process has more or fewer devices than process 0, which JAX cannot arrange when the
        processes talk; or one would have nothing to do, and JAX waits for it for ever.
    """
    counts = collections.Counter(device.process_index for device in jax.devices())
    for process, count in sorted(counts.items()):
        if count != counts[0]:
            raise UserError(
                f"process {process} has {count} devices and process 0 has {counts[0]}; give every "
                "process the same mesh.host_devices."
            )
    used = {device.process_index for device in mesh.devices.flat}
    if len(used) < jax.process_count():
        unused = min(set(range(jax.process_count())) - used)
        raise UserError(
            f"the mesh has {mesh.size} of the {jax.device_count()} devices of "
            f"{jax.process_count()} processes, which leaves process {unused} without any; enlarge "
            "the mesh, start fewer processes, or on CPU lower mesh.host_devices, which counts the "
            "devices of one process."
        )


def check_same(what: str, text: str) -> None:
    """Checks that all processes have the same text; every process must call it.

    Args:
      what: its name in the error, such as "config".
      text: compared by its sha256.

    Raises:
      UserError: on every process, if one differs from process 0.
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = _of_all(digest)
    differing = np.flatnonzero((digests != digests[0]).any(axis=1))
    if differing.size:
        raise UserError(
            f"process {differing[0]} has another {what} than process 0; give every process the same "
            "flags and files."
        )


def by_first_process(action: Callable[[], int | None]) -> int:
    """What `action` returns on process 0, which alone calls it; every process must call this.

    Args:
      action: reads or writes files; gives an int32, or None for 0.

    Raises:
      Exception: on process 0, what `action` raises.
      UserError: on the others, if it does.
    """
    failure: Exception | None = None
    result = 0
    if jax.process_index() == 0:
        try:
            result = action() or 0
        except Exception as error:  # Whatever it is, the others wait for a word.
            failure = error
    failed, result = _of_all(np.array([failure is not None, result], np.int32))[0].tolist()
    if failure is not None:
        raise failure
    if failed:
        raise first_process_failed()
    return result


def first_process_failed() -> UserError:
    """What the other processes say where process 0 has said why."""
    return UserError("process 0 cannot go on, and its last line says why.")


def wait_for_all() -> None:
    """Returns when every process has called it."""
    _of_all(np.zeros(1, np.int32))


def _of_all(mine: np.ndarray) -> np.ndarray:
    """What every process gives, in equal shapes, under a new first axis of processes."""
    if jax.process_count() == 1:
        return mine[None]
    devices = np.array(jax.devices()).reshape(jax.process_count(), jax.local_device_count())
    mesh = Mesh(devices, ("process", "local_device"))
    sharding = NamedSharding(mesh, P("process"))
    everyone = jax.make_array_from_process_local_data(sharding, mine[None])
    with jax.set_mesh(mesh):
        everywhere = jax.jit(_itself, out_shardings=P())(everyone)
    # On all devices, where JAX's `process_allgather` waits for the first only: a process that exits
    # while gloo connects its other devices leaves those of the other processes waiting in JAX's
    # clean-up (9 of 140 programs that end here, on 2 busy cores; none of 140 with this line).
    return np.asarray(jax.block_until_ready(everywhere).addressable_data(0))


def _itself(array: jax.Array) -> jax.Array:
    return array  # A name at the top level, so that JAX compiles it once.


def only_first_informs() -> None:
    """Leaves INFO lines of this package to process 0; warnings come from every process."""
    if jax.process_index():
        logging.getLogger("moe_jax").setLevel(logging.WARNING)
