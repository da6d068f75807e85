"""Slurm's `srun` and `scontrol` as far as launch/slurm.sbatch uses them: install(folder) makes both.

`srun` starts SLURM_NTASKS processes on this machine, passes SIGTERM on to all of them, and ends with
the largest status. `scontrol` writes what it is asked for into the file `requeued` beside it.
"""

import os
import pathlib
import signal
import subprocess
import sys
from types import FrameType


def install(folder: pathlib.Path) -> None:
    for name in ("srun", "scontrol"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$0" "$@"\n')
        program.chmod(0o755)


def srun(command: list[str]) -> int:
    while command[0].startswith("--"):
        command = command[1:]
    count = int(os.environ["SLURM_NTASKS"])
    tasks = []
    for index in range(count):
        place = {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
        place["SLURM_STEP_NODELIST"] = "localhost"
        tasks.append(subprocess.Popen(command, env={**os.environ, **place}))

    def pass_on(number: int, frame: FrameType | None) -> None:
        for task in tasks:
            task.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    statuses = [task.wait() for task in tasks]
    return max(128 - status if status < 0 else status for status in statuses)


if __name__ == "__main__":
    name, path, *arguments = sys.argv[1:]
    if name == "srun":
        sys.exit(srun(arguments))
    (pathlib.Path(path).parent / "requeued").write_text(" ".join(arguments))
