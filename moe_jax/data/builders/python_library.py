"""The source code and documentation that every Python brings along, labelled by package."""

import ast
import collections
import pathlib
import platform
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from moe_jax.data.builders.labelled_text import Document, LabelledTextBuilder

NUM_PACKAGE_DOMAINS = 10
"""How many of the largest packages are domains of their own."""

_TESTS_OR_INSTALLED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
# Tables rather than text: character maps, the paths of this machine's build, entity names.
_TABLES = re.compile(r"encodings/.*|_sysconfigdata.*|html/entities\.py|stringprep\.py|config-.*")


def library_sources(library: pathlib.Path) -> Iterator[Document]:
    """Yields the modules of a standard library as documents, by path.

    Tests, installed packages and tables are left out. The ten largest packages are domains; the
    other packages and the single-file modules are in the domain `modules`.

    Args:
      library: the folder that holds `asyncio/`, `os.py` and so on.
    """
    modules = [
        path.relative_to(library)
        for path in sorted(library.rglob("*.py"))
        if not _TESTS_OR_INSTALLED & set(path.relative_to(library).parts)
        and not _TABLES.fullmatch(path.relative_to(library).as_posix())
        and path.relative_to(library).parts[0] != "pydoc_data"
    ]
    package_bytes: collections.Counter[str] = collections.Counter()
    for module in modules:
        if len(module.parts) > 1:
            package_bytes[module.parts[0]] += (library / module).stat().st_size
    largest = {package for package, _ in package_bytes.most_common(NUM_PACKAGE_DOMAINS)}
    for module in modules:
        # Not every module is UTF-8; `tokenize.open` follows the encoding a module declares.
        with tokenize.open(library / module) as file:
            text = file.read()
        domain = module.parts[0] if module.parts[0] in largest else "modules"
        yield Document(domain, module.as_posix(), text)


def language_reference(topics_module: pathlib.Path) -> Iterator[Document]:
    """Yields the language reference, a document per topic, from `pydoc_data/topics.py`.

    The module is parsed, not imported, so that the library of another Python can be read. Yields
    nothing where a distribution has left the module out.
    """
    if not topics_module.exists():
        return
    tree = ast.parse(topics_module.read_text(encoding="utf-8"))
    (topics,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    for name, text in sorted(ast.literal_eval(topics).items()):
        yield Document("documentation", name, text)


class PythonLibrary(LabelledTextBuilder):
    """The standard library of the Python that prepares it: about 10 MB in twelve domains.

    Another Python version has another text; the version and the corpus' sha256 are recorded.
    Licence: PSF-2.0.
    """

    VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))  # Its text is Python's.
    BLOCK_BYTES = 8_000
    PREPARED_ON_FIRST_USE = True  # Nothing is downloaded.
    SUMMARY = "Standard library sources and language reference, labelled by package."

    def collect(self, downloads: pathlib.Path) -> tuple[list[Document], dict[str, Any]]:
        """Reads the library of the running Python; downloads nothing."""
        library = pathlib.Path(sysconfig.get_path("stdlib"))
        documents = [
            *language_reference(library / "pydoc_data" / "topics.py"),
            *library_sources(library),
        ]
        return documents, {"python_version": platform.python_version()}
