"""The one exception whose message is written for the person at the keyboard."""


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
