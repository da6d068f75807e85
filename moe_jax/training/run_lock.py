"""One trainer in a run's folder: the file trainer.lock says which, and that it lives.

On one machine, and on file systems whose locks reach other machines, the kernel decides (flock): the
lock of a process that died is free at once. Where no lock reaches, as on another host of many shared
file systems or in an object store, the file decides: its holder renews it every `BEAT_SECONDS`, and who
comes later watches it for `SILENCE_SECONDS`. So no clocks are compared, and a holder that died with its
host is followed after that time. Two that start on two hosts in the same moment may both believe to
hold it; the one whose name is not in the file ends before its next write (`RunLock.check`).

With several processes, process 0 alone holds the lock.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any, NamedTuple

from etils import epath

from moe_jax.errors import UserError
from moe_jax.training.experiment import CONFIG_FILE
from moe_jax.training.storage import is_remote

_LOG = logging.getLogger(__name__)

LOCK_FILE = "trainer.lock"
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
_LOOK_SECONDS = 1.0
# A file that is written in place must not keep the end of a longer text.
_FILE_BYTES = 512


class _Holder(NamedTuple):
    """Who holds a run's folder.

    Attributes:
      pid, host, since: for the user.
      boot: of the host's kernel, which no other machine has, nor the same one after it was restarted.
      token: of this taking of the lock.
      beat: how often it was renewed.
    """

    pid: int
    host: str
    since: str
    boot: str
    token: str
    beat: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class RunLock:
    """The lock of a run's folder; `take` gets it, a with statement gives it back."""

    def __init__(self, workdir: epath.Path) -> None:
        self._workdir, self._path = workdir, workdir / LOCK_FILE
        self._file: int | None = None
        self._made_folder = False
        self._mine = _Holder(
            os.getpid(),
            socket.gethostname(),
            datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            _boot(),
            uuid.uuid4().hex,
            0,
        )
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._beats = threading.Thread(target=self._beat, name="trainer.lock", daemon=True)

    @classmethod
    def take(cls, workdir: epath.PathLike) -> "RunLock":
        """Makes this process the run's only trainer; makes the folder where there is none.

        Raises:
          UserError: another process trains the run, or lives and may do so.
        """
        lock = cls(epath.Path(workdir))
        lock._made_folder = not lock._workdir.exists()
        lock._workdir.mkdir(parents=True, exist_ok=True)
        lock._acquire()
        lock._beats.start()
        return lock

    def check(self) -> None:
        """To be called before each write.

        Raises:
          UserError: the folder vanished, or another process took it.
        """
        holder = self._read()
        if holder is None and (self._workdir / CONFIG_FILE).exists():
            self._acquire()  # Somebody removed the file, but not the run.
        elif holder is None:
            raise UserError(
                f"workdir {self._workdir} was removed or emptied while the run trained in it, so that "
                "nothing more is written there; bring it back to continue from what it holds, or run "
                "the same command again to start anew."
            )
        elif holder.token != self._mine.token:
            raise UserError(
                f"workdir {self._workdir} was taken over by {holder}, because this process did not "
                "renew its lock in time; leave the run to that one, or stop it and run the same "
                "command again."
            )

    def release(self) -> None:
        """Removes the file, if it is still this process's, and a new folder in which nothing is."""
        self._ended.set()
        with contextlib.suppress(OSError), self._writing:
            holder = self._read()
            if holder is not None and holder.token == self._mine.token:
                self._path.unlink()
            if self._made_folder and not is_remote(self._path):
                os.rmdir(self._workdir)  # Fails where a run has begun.
        self._close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _acquire(self) -> None:
        """Writes this process into the file as soon as its holder is known to be dead."""
        watched: _Holder | None = None
        begin = time.monotonic()
        while True:
            locked = self._try_to_lock()
            holder = self._read()
            here = holder is not None and holder.boot == self._mine.boot
            if locked and (holder is None or (here and self._file is not None)):
                break  # What a dead process of this machine had locked, the kernel has freed.
            if not locked and here:
                raise self._refusal(str(holder))
            watched = watched or holder
            if holder and watched and (holder.token, holder.beat) != (watched.token, watched.beat):
                raise self._refusal(str(holder))
            if time.monotonic() - begin > SILENCE_SECONDS:
                if holder is None:
                    raise self._refusal("a process whose name is not in the file")
                _LOG.warning(
                    "workdir %s was held by %s, which has not renewed %s for %.0f s and is taken for dead.",
                    *(self._workdir, holder, LOCK_FILE, SILENCE_SECONDS),
                )
                break
            if holder is not None and time.monotonic() - begin < _LOOK_SECONDS:
                _LOG.info(
                    "workdir %s is held by %s; waiting for up to %.0f s to see whether it lives",
                    *(self._workdir, holder, SILENCE_SECONDS),
                )
            time.sleep(min(_LOOK_SECONDS, SILENCE_SECONDS / 4))
        self._write()

    def _refusal(self, holder: str) -> UserError:
        self._close()
        return UserError(
            f"workdir {self._workdir} is held by {holder}, and a run has one trainer; wait until that one "
            "ends, stop it, or use another --workdir."
        )

    def _try_to_lock(self) -> bool:
        """False if the kernel says that another process has the file locked.

        True without a file that is open where the kernel has no say.
        """
        if is_remote(self._path):
            return True
        self._close()
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return False
            except OSError:  # A file system without locks.
                os.close(file)
                return True
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file).st_ino == os.stat(self._path).st_ino:
                    self._file = file
                    return True
            os.close(file)  # Its holder removed it between the two lines.

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self) -> _Holder | None:
        """Who is in the file; None if nobody is."""
        try:
            return _Holder(**json.loads(self._path.read_text()))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None

    def _write(self) -> None:
        text = json.dumps(self._mine._asdict()).ljust(_FILE_BYTES - 1) + "\n"
        if self._file is None:
            self._path.write_text(text)
        else:
            os.pwrite(self._file, text.encode(), 0)
            os.fsync(self._file)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            # What is wrong with the folder is said at the run's next write.
            with contextlib.suppress(OSError), self._writing:
                holder = self._read()
                if self._ended.is_set() or holder is None or holder.token != self._mine.token:
                    continue
                self._mine = self._mine._replace(beat=self._mine.beat + 1)
                self._write()


def _boot() -> str:
    """Names this start of this machine."""
    path = pathlib.Path("/proc/sys/kernel/random/boot_id")
    number: Any = path.read_text().strip() if path.exists() else uuid.getnode()
    return f"{socket.gethostname()} {number}"
