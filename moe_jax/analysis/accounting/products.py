"""Matrix products of a training step, and how often the machine makes each."""

import dataclasses
from collections.abc import Sequence

from moe_jax.models.stack import Remat


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product, or several alike.

    Attributes:
      flops: forward, of the global batch, summed over all devices.
      backward: FLOPs of its gradients for each of `flops`: 2 where both factors have one, 1 where one
        of them is constant, more for kernels that compute something anew.
      batched: it has batch dimensions or is inside a kernel, so Remat.DOTS does not keep it.
      residual: its result is only added to the residual stream: no gradient of its own sublayer reads
        it, but those of the sublayers after it do.
      skipped: like `flops`, of rows that a kernel passes over though its cost estimate counts them.
    """

    flops: float
    backward: float = 2.0
    batched: bool = False
    residual: bool = False
    skipped: float = 0.0

    def times(self, repetitions: int) -> "Product":
        """So many of it."""
        flops, skipped = repetitions * self.flops, repetitions * self.skipped
        return dataclasses.replace(self, flops=flops, skipped=skipped)


Sublayer = Sequence[Product]


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of a step over all devices.

    Attributes:
      executed: by the machine.
      skipped: see `Product`.
    """

    executed: float
    skipped: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.executed + other.executed, self.skipped + other.skipped)


def cost(sublayers: Sequence[Sublayer], remat: Remat = Remat.NONE) -> Cost:
    """Forward, backward, and what the backward pass recomputes.

    Args:
      sublayers: what is recomputed together, such as one period of blocks, in its order.
      remat: by which policy. A result that nothing reads is not recomputed: that of the last sublayer
        goes to the next period, which has kept it.
    """
    executed = skipped = 0.0
    for sublayer in sublayers:
        for product in sublayer:
            again = remat == Remat.FULL or (remat == Remat.DOTS and product.batched)
            read = not product.residual or sublayer is not sublayers[-1]
            runs = 1 + product.backward + (again and read)
            executed += runs * product.flops
            skipped += runs * product.skipped
    return Cost(executed, skipped)
