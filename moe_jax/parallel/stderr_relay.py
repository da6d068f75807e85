"""Passes a process's stderr on until JAX's C++ says that another process of the run died: one sentence.

What JAX writes then, up to a hundred lines of stack traces, names no cause. It is written by threads of
C++ that end the process, so that nothing in the process itself can shorten it. This program does from
outside: `python stderr_relay.py < pipe 2> stderr`, with the pipe in place of the process's stderr.

It imports nothing but Python's own modules, so that it starts in 20 ms.
"""

import os
import re
import signal

LOST = (
    "another process of this run died or lost its connection, so that this one ends, too; that one's last "
    "lines may say why, and the same command on every process continues from the newest checkpoint."
)

# What the coordination service of JAX and its client write, after date, time and thread by absl.
_FATAL = re.compile(rb"[EF]\d{4} [^\n]*\b(coordination_service\w*\.cc|client\.h):\d+\]")
# What a line may yet become when the rest of it comes.
_MAY_BE_FATAL = re.compile(rb"[EF](\d{0,4}|\d{4} [^\n\]]*)")


class Filter:
    """What of a stream of bytes is to be passed on."""

    def __init__(self) -> None:
        self._held = b""
        self._at_line_start = True
        self._ended = False

    def passed(self, content: bytes) -> bytes:
        """What follows of what was held back and `content`, which was written at once.

        The sentence stands in place of the fatal lines, which may come after half a line of progress.
        """
        out: list[bytes] = []
        for line in (self._held + content).splitlines(keepends=True):
            self._held = b""
            if self._ended:
                break
            if _FATAL.match(line):
                out.append(b"" if self._at_line_start else b"\n")
                out.append(f"{LOST}\n".encode())
                self._ended = True
            elif _MAY_BE_FATAL.fullmatch(line):
                self._held = line
            else:
                out.append(line)
                self._at_line_start = line.endswith(b"\n")
        return b"".join(out)

    def rest(self) -> bytes:
        """What is held back at the end."""
        return self._held


def main() -> None:
    """Relays fd 0 to fd 2."""
    # It ends with the process, whose signals are not its own.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    relay = Filter()
    while content := os.read(0, 1 << 16):
        os.write(2, relay.passed(content))
    os.write(2, relay.rest())


if __name__ == "__main__":
    main()
