"""The numbers of a config that a compiled step takes as arguments."""

import dataclasses
from typing import Any

import jax
import numpy as np

from moe_jax.component import factors_of
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.routing.router import RouterFactors
from moe_jax.training.experiment import Experiment
from moe_jax.training.step import noise_key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Numbers that change what a step computes, but not its program.

    Runs that differ in nothing else (seeds, learning rates, coefficients of the router losses, gate
    scales) share one compiled program, which the second finds in the cache: 0.5 s in place of 20 for
    configs/claims/text_cpu.py on a core.

    The same tree also holds shapes in place of the arrays.

    Attributes:
      noise_key_data: uint32, of the key of dropout and router noise, which follows from the seed.
      optimizer: factors of the optimizer's config by name, see `moe_jax.component.field`: the learning
        rate at the peak. [] float32.
      routers: path of a MoE module -> factors of its router, [] float32.
    """

    noise_key_data: Any
    optimizer: dict[str, Any]
    routers: dict[str, RouterFactors]

    @classmethod
    def of(cls, config: Experiment, abstract_model: AbstractModel) -> "Hyperparameters":
        """Those of a config.

        Args:
          config: of the run.
          abstract_model: its model.
        """
        numbers = (factors_of(config.optimizer), abstract_model.factors)
        return cls(jax.random.key_data(noise_key(config.seed)), *jax.tree.map(np.float32, numbers))
