"""What takes a pass over a dataset to find out, kept beside the data for the next start."""

import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_LOG = logging.getLogger(__name__)


def remembered(path: pathlib.Path, of: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """The value that `compute` gives, from `path` if it was computed for the same before.

    A folder that cannot be written to costs only the time of computing again.

    Args:
      path: the JSON file that holds it; it is whole or not there.
      of: JSON-ready; what the value depends on, such as sizes and times of files.
      compute: gives a JSON-ready value.
    """
    of = json.loads(json.dumps(of))
    try:
        kept = json.loads(path.read_text())
        if isinstance(kept, dict) and kept.get("of") == of and "value" in kept:
            return kept["value"]
    except (OSError, ValueError):
        pass
    value = compute()
    try:
        _write(path, json.dumps({"of": of, "value": value}))
    except OSError as error:
        _LOG.info("%s cannot be kept (%s), so every start computes it.", path, error.strerror)
    return value


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, delete=False
    ) as temporary:
        temporary.write(text)
    try:
        os.chmod(temporary.name, 0o644)  # Temporary files are private; the data may be shared.
        os.replace(temporary.name, path)
    except OSError:
        os.unlink(temporary.name)
        raise


def file_name(*parts: str) -> str:
    """A file's name made of names of splits and features, which may be a stranger's."""
    return "_".join("".join(c if c.isalnum() else "_" for c in part) for part in parts) + ".json"


def stamps(files: Sequence[pathlib.Path]) -> dict[str, list[int]]:
    """Size in bytes and time of the last change of each file: other ones mean another content.

    Raises:
      OSError: a file is missing.
    """
    found = {file: file.stat() for file in files}
    return {file.name: [stat.st_size, stat.st_mtime_ns] for file, stat in found.items()}
