"""The one exception whose message is written for the person at the keyboard."""

import difflib
import pathlib
import traceback
from collections.abc import Iterable

_MOST_NAMES = 10


class UserError(ValueError):
    """Something the user asked for cannot be done.

    The message is one sentence that names the field, its value and what would be right. Scripts
    print it without a traceback and exit with status 2 (see `moe_jax.command_line`).
    """


def user_error_behind(error: BaseException) -> UserError | None:
    """The first UserError of what led to `error`; ml_collections wraps those of a config file."""
    found = None
    behind: BaseException | None = error
    while behind:
        found = behind if isinstance(behind, UserError) else found
        behind = behind.__cause__ or behind.__context__
    return found


def names_instead(name: str, known: Iterable[str], kind: str, everything: str) -> str:
    """What to write instead of a name that does not exist, in half a sentence.

    Args:
      name: what was written.
      known: all names.
      kind: of what they are, such as "fields".
      everything: how to see all, where there are more than 10.

    Returns:
      "the nearest is 'width', and other fields are head_width, mlp_width"; without a similar one
      "its fields are head_width, mlp_width".
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=_MOST_NAMES, cutoff=0)
    nearest = difflib.get_close_matches(name, known, n=1)
    # All are listed as they stand, a choice by likeness.
    listed = near if len(known) > _MOST_NAMES else known
    others = [other for other in listed if other not in nearest]
    more = len(known) - len(listed)
    rest = f" and {more} more, which {everything} shows" if more else ""
    if not nearest:
        return f"its {kind} are {', '.join(others)}{rest}"
    return f"the nearest is {nearest[0]!r}" + (
        f", and other {kind} are {', '.join(others)}{rest}" if others else ""
    )


def where_it_failed(error: BaseException, file: pathlib.Path) -> str:
    """What went wrong in a user's file, in half a sentence: "line 3: RuntimeError: it is wrong"."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == file]
    line = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    told = " ".join(message.replace(". ", "; ").split()).rstrip(".")
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}: {told}"
