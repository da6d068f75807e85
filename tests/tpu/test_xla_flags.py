"""libtpu knows every flag that we print for it. Run by `make test-tpu`."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from moe_jax.pods.xla_flags import flags_for

pytestmark = pytest.mark.tpu

ROOT = pathlib.Path(__file__).parents[2]

# libtpu reads its flags once in a process.
_PROGRAM = textwrap.dedent("""
    import sys
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from moe_jax.pods.hardware import describe, topology

    machine = topology(sys.argv[1])
    mesh = Mesh(np.array(describe(machine)).reshape(machine.slices, -1), ("data", "expert"))
    rows = PartitionSpec(("data", "expert"))

    def exchange(tokens):
        sent = jax.lax.all_to_all(tokens, "expert", 0, 0, tiled=True)
        return sent @ sent.T

    function = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=rows, out_specs=rows))
    tokens = jax.ShapeDtypeStruct(
        (mesh.size * 256, 256), jax.numpy.bfloat16, sharding=NamedSharding(mesh, rows)
    )
    print(function.lower(tokens).compile().as_text())
""")


def compile_with(flags: str, machine: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0",
        "LIBTPU_INIT_ARGS": flags, "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, machine], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "machine", ["v3:2x2", "v4:2x2x1", "v5e:2x2", "2*v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
)
def test_libtpu_accepts_the_flags_and_exchanges_tokens_asynchronously(machine):
    done = compile_with(" ".join(map(str, flags_for(machine))), machine)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all-to-all-start" in done.stdout


def test_without_the_flags_a_device_waits_for_its_tokens():
    done = compile_with("", "v5p:2x2x1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all-to-all(" in done.stdout and "all-to-all-start" not in done.stdout


def test_libtpu_refuses_a_flag_that_it_does_not_know():
    done = compile_with("--xla_tpu_no_such_flag=true", "v5p:2x2x1")
    assert done.returncode != 0
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in done.stderr
