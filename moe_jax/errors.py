"""The one exception whose message is written for the person at the keyboard."""


class UserError(ValueError):
    """Something the user asked for cannot be done.

    The message is one sentence that names the field, its value and what would be right. Scripts
    print it without a traceback and exit with status 2 (see `moe_jax.command_line`).
    """
