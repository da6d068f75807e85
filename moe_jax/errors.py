"""The one exception whose message is written for the person at the keyboard."""

import pathlib
import traceback


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


def where_it_failed(error: BaseException, file: pathlib.Path) -> str:
    """What went wrong in a user's file, in half a sentence: "line 3: RuntimeError: it is wrong"."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == file]
    line = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    told = " ".join(message.replace(". ", "; ").split()).rstrip(".")
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}: {told}"
