"""What a step is compiled for, as far as its products depend on it."""

import dataclasses
import math
from collections.abc import Mapping

from moe_jax.parallel.mesh import TOKEN_AXES


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices of one kind.

    Attributes:
      platform: `cpu`, `gpu` or `tpu`.
      mesh: axis name -> size (`mesh.shape`).
    """

    platform: str
    mesh: Mapping[str, int]

    @property
    def token_shards(self) -> int:
        """Devices that have tokens of their own, those along data x expert."""
        return math.prod(self.mesh[axis] for axis in TOKEN_AXES)
