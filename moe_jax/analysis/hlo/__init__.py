"""What a compiled XLA program does, read from `compiled.as_text()`.

Collectives, matrix products, kernels and memory traffic with how often each runs in one call of the
program: XLA's own cost analysis counts the body of a loop once, whatever its length. Works on the
text of every backend; the forms that it knows are those that XLA printed for CPU, GPU and TPU in
jaxlib 0.10 to 0.12.

https://openxla.org/xla/operation_semantics names the operations.
"""

from moe_jax.analysis.hlo.collectives import COLLECTIVES, Collective, Piece
from moe_jax.analysis.hlo.groups import communicating_groups
from moe_jax.analysis.hlo.kernels import Kernel
from moe_jax.analysis.hlo.products import MatrixProduct
from moe_jax.analysis.hlo.program import Program
from moe_jax.analysis.hlo.text import Array
from moe_jax.analysis.hlo.traffic import TrafficBytes
from moe_jax.analysis.hlo.trips import Trips

__all__ = [
    "COLLECTIVES",
    "Array",
    "Collective",
    "Kernel",
    "MatrixProduct",
    "Piece",
    "Program",
    "TrafficBytes",
    "Trips",
    "communicating_groups",
]
