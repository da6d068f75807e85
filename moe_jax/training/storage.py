"""Where runs are kept: on this machine, or in an object store such as gs://bucket/run.

Objects cannot grow. A file that does is there written whole whenever it shall be kept: fine for the
megabytes of a run's records, and never for arrays, which Orbax writes.
"""

import errno
import io
import os
from typing import Any, Protocol

from etils import epath

from moe_jax.errors import UserError

_OBJECT_STORES = ("gs", "s3")


def is_remote(path: epath.PathLike) -> bool:
    """Whether only epath can read it, and not the operating system.

    Raises:
      UserError: it is in a store that epath and TensorBoard do not both know.
    """
    scheme, separator, _ = os.fspath(path).partition("://")
    if separator and scheme not in _OBJECT_STORES:
        raise UserError(
            f"the path {os.fspath(path)} begins with {scheme}://; use gs:// or s3://, or a folder that "
            "every process can write to."
        )
    return bool(separator)


def absolute(path: epath.PathLike) -> epath.Path:
    """As Orbax wants it; `epath.Path.absolute` would make gs://x a local one."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).absolute()


class Appender(Protocol):
    """A file that grows."""

    def append(self, text: str) -> None:
        """Adds to the end; stored when it returns.

        Raises:
          OSError: the file is gone, or cannot be written.
        """

    def close(self) -> None:
        """No `append` after it."""


def appender(path: epath.PathLike) -> Appender:
    """Opens an existing text file for what is to be added."""
    return _RemoteAppender(path) if is_remote(path) else _LocalAppender(path)


class _LocalAppender:
    def __init__(self, path: epath.PathLike) -> None:
        self._path = os.fspath(path)
        self._file = open(self._path, "a")  # noqa: SIM115 - open as long as the run is.

    def append(self, text: str) -> None:
        # What is written to a file that was removed is lost without an error.
        if os.stat(self._path).st_ino != os.fstat(self._file.fileno()).st_ino:
            raise FileNotFoundError(errno.ENOENT, "it was replaced by another file", self._path)
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _RemoteAppender:
    def __init__(self, path: epath.PathLike) -> None:
        self._path = epath.Path(path)
        self._text = self._path.read_text()

    def append(self, text: str) -> None:
        self._text += text
        self._path.write_text(self._text)

    def close(self) -> None:
        pass


class _RemoteEvents:
    """TensorBoard's event files in an object store, as tensorboardX asks for them.

    Its own need another package for each store.
    """

    class _File:
        def __init__(self, path: str) -> None:
            self._path, self._bytes = epath.Path(path), io.BytesIO()

        def write(self, data: bytes) -> None:
            self._bytes.write(data)

        def flush(self) -> None:
            self._path.write_bytes(self._bytes.getvalue())

        def close(self) -> None:
            self.flush()

    def open(self, path: str) -> "_RemoteEvents._File":
        return self._File(path)

    def directory_check(self, path: str) -> None:
        """Object stores have no folders to make."""


def event_writer(workdir: epath.PathLike, step: int) -> Any:
    """TensorBoard's writer of a run's events; what it has after `step` is to be repeated."""
    from tensorboardX import SummaryWriter
    from tensorboardX.record_writer import register_writer_factory

    for store in _OBJECT_STORES:
        register_writer_factory(store, _RemoteEvents())
    return SummaryWriter(os.fspath(epath.Path(workdir)), purge_step=step + 1)
