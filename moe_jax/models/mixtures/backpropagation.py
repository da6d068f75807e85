"""The network of one hidden layer that both papers compare their mixtures with.

Axis letters: B cases, n inputs, h hidden units, m outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.component import field
from moe_jax.models.interface import ModelConfig
from moe_jax.models.mixtures import tree
from moe_jax.models.mixtures.mixture import Link


@dataclasses.dataclass
class BackpropagationConfig(ModelConfig):
    """Logistic hidden units, and outputs with a link of their own.

    Attributes:
      num_inputs: n.
      num_hidden: h.
      num_outputs: m.
      link: of the outputs.
      init_range: weights and biases are uniform between this and its negative.
    """

    num_inputs: int = field(2, at_least=1)
    num_hidden: int = field(6, at_least=1)
    num_outputs: int = field(1, at_least=1)
    link: Link = Link.IDENTITY
    init_range: float = 0.5

    @property
    def moe_layers(self) -> list[int]:
        """Empty."""
        return []

    def split_dimensions(self) -> list[tuple[str, int, str]]:
        """See `ModelConfig`: nothing is split."""
        return []

    def validate(self) -> None:
        """Raises UserError for a network that could not be built."""
        self.check_ranges("model")

    def build(self, key: jax.Array) -> "BackpropagationNetwork":
        """Creates the network with freshly drawn parameters."""
        return BackpropagationNetwork(self, key)


class BackpropagationNetwork(nnx.Module):
    """Parameters `hidden` [n + 1, h] and `output` [h + 1, m]; the last rows are biases."""

    def __init__(self, config: BackpropagationConfig, key: jax.Array) -> None:
        self.config = nnx.static(config)
        hidden_key, output_key = jax.random.split(key)
        sizes = config.num_inputs + 1, config.num_hidden, config.num_outputs

        def uniform(key: jax.Array, *shape: int) -> nnx.Param:
            limit = config.init_range
            numbers = jax.random.uniform(key, shape, jnp.float32, -limit, limit)
            return nnx.Param(numbers, axes=("features", "features"))

        self.hidden = uniform(hidden_key, sizes[0], sizes[1])
        self.output = uniform(output_key, sizes[1] + 1, sizes[2])

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[B, n] to [B, m]."""
        hidden = jax.nn.sigmoid(tree.with_constant(inputs) @ self.hidden[...])
        outputs = tree.with_constant(hidden) @ self.output[...]
        return jax.nn.sigmoid(outputs) if self.config.link == Link.LOGISTIC else outputs
