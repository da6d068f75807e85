"""Flags of machines; tests/tpu/test_xla_flags.py asks libtpu whether it knows them."""

import os
import subprocess
import sys

import pytest

from moe_jax.errors import UserError
from moe_jax.pods.hardware import CHIPS
from moe_jax.pods.xla_flags import flags_for


def names(machine: str) -> list[str]:
    return [flag.name for flag in flags_for(machine)]


def test_every_machine_has_flags_with_a_reason_and_a_source():
    for chip in CHIPS:
        machine = (
            f"{chip.name}-8" if not chip.shapes else f"{chip.name}-{chip.number(chip.shapes[-1])}"
        )
        flags = flags_for(machine)
        assert flags
        assert len(set(names(machine))) == len(flags), machine
        for flag in flags:
            assert flag.why and flag.source.startswith("https://")
            assert str(flag) == f"--{flag.name}={flag.value}"


def test_only_several_slices_get_the_flags_of_the_network_between_them():
    between = "xla_tpu_enable_data_parallel_all_reduce_opt"
    assert between not in names("tpu-v5e-256")
    assert between in names("2*tpu-v5e-256")
    assert set(names("tpu-v5e-256")) < set(names("2*tpu-v5e-256"))


def test_a_machine_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"^topology is 'tpu-v9-8'; "):
        flags_for("tpu-v9-8")


def test_jaxlib_knows_the_flags_of_gpus():
    """Its parser does not ask whether there is a GPU, and ends the process at an unknown flag."""
    flags = " ".join(map(str, flags_for("gpu-h100-64")))
    for more, status in (("", 0), (" --xla_gpu_no_such_flag=true", 1)):
        done = subprocess.run(
            [sys.executable, "-c", "import jax; jax.jit(abs)(1)"],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags + more},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr


def test_the_command_prints_one_line_for_a_shell():
    command = [sys.executable, "-m", "moe_jax.pods.xla_flags"]
    done = subprocess.run([*command, "2*v5e:16x16"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == " ".join(map(str, flags_for("2*v5e:16x16"))) + "\n"
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr == "name one machine: python -m moe_jax.pods.xla_flags tpu-v5p-128.\n"
