"""How one of several processes ends: with a sentence and a status that tell the truth, and not alone.

Who fails leaves the others in a computation that waits for it. It therefore leaves its last sentence and
its status with JAX's coordination service, where the others look once a second, and all end with them.
A process that is killed can leave nothing; JAX's C++ notices that one is missing, and ends the others
with status 134, of whose last lines `stderr_relay` makes one sentence.
"""

import atexit
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed  # The service's store of keys has no public name.

from moe_jax.parallel import stderr_relay

LOST_STATUS = 128 + signal.SIGABRT
_KEY = "moe_jax/ended"
_LOOK_SECONDS = 1.0
# The service ends with process 0, and the computation with whoever ends first.
_LINGER_SECONDS = 2.5 * _LOOK_SECONDS
# What JAX says of a computation with a process that is gone; object stores lose connections, too.
_OF_LOST_PROCESS = re.compile(
    r"(?!.*://)[A-Z_]+: .*(gloo|nccl|socket closed|connection (reset|closed)|heartbeat|coordination_?service)",
    re.IGNORECASE | re.DOTALL,
)

_ending = threading.Event()
# Whoever ends the process takes it for ever, so that no other thread adds a word.
_last_word = threading.Lock()
_relays: list[subprocess.Popen[bytes]] = []


def watch() -> None:
    """Makes this process end with the others; call it once they are joined."""
    if not _is_one_of_several():
        return
    _start_relay()
    watching = threading.Thread(target=_watch, name="watch_others", daemon=True)
    watching.start()

    def stop_watching() -> None:
        _ending.set()
        watching.join()

    atexit.register(stop_watching)  # It ends before JAX's service, which was registered earlier.
    python_hook = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if is_of_lost_process(error):
            end(stderr_relay.LOST, LOST_STATUS)
        python_hook(kind, error, trace)
        end(f"{kind.__name__}, whose traceback it has written.", 1, say=False)

    sys.excepthook = hook


def is_of_lost_process(error: BaseException) -> bool:
    """Whether JAX raised an error because another process is gone."""
    of_jax = isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
    return of_jax and _is_one_of_several() and bool(_OF_LOST_PROCESS.match(str(error)))


def end(message: str, status: int, say: bool = True) -> None:
    """Ends this process; does nothing where it is the only one.

    Args:
      message: one sentence, why.
      status: of the exit, here and of the others; of a lost process they find out by themselves.
      say: write the sentence here, too.
    """
    if not _is_one_of_several():
        return
    if status == LOST_STATUS:
        time.sleep(
            _LINGER_SECONDS
        )  # Its last sentence, which `_watch` says, is better than this one.
    _last_word.acquire()
    _ignore_sigterm()
    _ending.set()
    if say:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if status != LOST_STATUS:
        index = distributed.global_state.process_id
        _leave({"process": index, "message": message, "status": status})
        time.sleep(_LINGER_SECONDS)
    # Not sys.exit: JAX's own end waits for the others, in vain, and then aborts.
    os._exit(status)


def _is_one_of_several() -> bool:
    # Not `jax.process_count()`, which starts the backend before its devices are configured.
    return (
        distributed.global_state.client is not None and distributed.global_state.num_processes > 1
    )


def _ignore_sigterm() -> None:
    """A launcher sends it to all that are left when the first has ended, whose status is the true one."""
    # Not signal.signal, which is for the main thread; that one may wait in a computation.
    ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(int(signal.SIG_IGN)))


def _leave(last_words: dict[str, Any]) -> None:
    client: Any = distributed.global_state.client
    try:
        client.key_value_set(_KEY, json.dumps(last_words))
    except jax.errors.JaxRuntimeError:
        return  # Another one was faster, or the service is gone.


def _watch() -> None:
    client: Any = distributed.global_state.client
    while not _ending.wait(_LOOK_SECONDS):
        try:
            last_words = json.loads(client.key_value_try_get(_KEY))
        except jax.errors.JaxRuntimeError:
            continue  # Nobody has left any.
        if not _last_word.acquire(blocking=False):
            return
        _ignore_sigterm()
        print(f"\nprocess {last_words['process']} ended: {last_words['message']}", file=sys.stderr)
        sys.stderr.flush()
        if distributed.global_state.process_id == 0:
            time.sleep(2 * _LINGER_SECONDS)  # The service aborts whoever is left.
        os._exit(last_words["status"])


def _start_relay() -> None:
    """Puts `stderr_relay` between this process's stderr and where it leads."""
    sys.stderr.flush()
    reading, writing = os.pipe()
    stderr = os.dup(2)
    # It ends when the last of this process's stderr is read.
    _relays.append(
        subprocess.Popen(
            [sys.executable, "-S", "-E", stderr_relay.__file__],
            stdin=reading,
            stdout=stderr,
            stderr=stderr,
        )
    )
    os.dup2(writing, 2)
    for file in (reading, writing, stderr):
        os.close(file)
