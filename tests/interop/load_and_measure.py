"""Loads a folder of Hugging Face's on one device and prints, in bytes, as json:

resident: what the model's parameters take
beyond: how much more the process had at its worst, than before loading plus `resident`
"""

import json
import sys

import jax

from moe_jax.interop.huggingface import loading
from moe_jax.interop.huggingface.loading import load
from moe_jax.models.abstract_model import arrays_of
from moe_jax.parallel.mesh import MeshConfig, make_mesh


def memory(field: str) -> int:
    """VmRSS, the resident set, or VmHWM, the largest it ever was.

    The ru_maxrss of getrusage is not the process's own: it begins with that of the process which
    started it.
    """
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main(small: str, large: str) -> None:
    # One device holds most of a parameter, so that a whole one on the host would show most.
    mesh = make_mesh(MeshConfig())
    # What JAX and its compiler take for themselves at first use is not the loading's.
    block_bytes, loading.BLOCK_BYTES = loading.BLOCK_BYTES, 1024
    load(small, mesh)
    loading.BLOCK_BYTES = block_bytes
    before = memory("VmRSS")
    model = load(large, mesh)
    leaves = jax.tree.leaves(arrays_of(model))
    resident = sum(leaf.nbytes for leaf in leaves)
    peak = memory("VmHWM")
    print(json.dumps({"resident": resident, "beyond": peak - before - resident}))


if __name__ == "__main__":
    main(*sys.argv[1:])
