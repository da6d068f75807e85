"""What every dispatch does: bring tokens to their experts and the outputs back.

Axis letters
  G groups of this device    S tokens per group    K choices per token
  E experts, of which this device has E/X          d width
  C slots per expert         R rows in one array, whatever experts they are for
Annotations have E_X for E/X, and *rows for the dimensions of rows that may be in slots or not.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe_jax.component import Component
from moe_jax.dispatch.grouped_matmul.interface import GroupedMatmul, grouped_matmul
from moe_jax.routing.router import Assignment, Mean, Router

# (rows, one weight) -> rows; how depends on where the rows of an expert are.
Product = Callable[[jax.Array, jax.Array], jax.Array]


class Network(Protocol):
    """A feed-forward network in two steps, both of rows [...] alone; static and hashable.

    What lies between them is all that is kept for the gradient. Their only access to weights is
    `product`, so that the same network works on slots, on sorted rows and on blocks.
    """

    def up(self, weights: Any, rows: Float[Array, "*rows d"], product: Product) -> Any:
        """[..., d] to what the activation function is applied to, a tree of [..., f]."""

    def down(
        self, weights: Any, hidden: Any, keys: Key[Array, "*rows"] | None, product: Product
    ) -> Float[Array, "*rows d"]:
        """That to [..., d]; keys [...] are a PRNG key for each row, or None."""


@dataclasses.dataclass(frozen=True)
class Experts:
    """The feed-forward networks of this device's experts.

    Attributes:
      num_experts: E, over all devices.
      first: [] int32 global number of this device's first expert.
      parameters: tree of arrays [E/X, ...].
      network: applies them; its only access to weights is `product`.
      row_key: (token index, expert) -> PRNG key, elementwise; None where nothing is random.
    """

    num_experts: int
    first: jax.Array
    parameters: Any
    network: Network
    row_key: Callable[[jax.Array, jax.Array], jax.Array] | None

    @property
    def num_local(self) -> int:
        """E/X."""
        return jax.tree.leaves(self.parameters)[0].shape[0]

    def on_slots(
        self, rows: Float[Array, "E_X R d"], token: Int[Array, "E_X R"]
    ) -> Float[Array, "E_X R d"]:
        """As many rows for each expert: one batched product for each weight.

        Args:
          rows: [E/X, R, d].
          token: [E/X, R] int32 index of each row's token in the global batch.

        Returns:
          [E/X, R, d].
        """
        keys = self.keys(token, jnp.arange(self.num_local)[:, None])
        return run(self.network, self.parameters, rows, keys, batched_product)

    def on_groups(
        self,
        rows: Float[Array, "R d"],
        token: Int[Array, " R"],
        sizes: Int[Array, " E_X"],
        backends: GroupedMatmul,
    ) -> Float[Array, "R d"]:
        """Rows sorted by expert, with one grouped product for each weight.

        Args:
          rows: [R, d].
          token: [R] int32, as in `on_slots`.
          sizes: [E/X] int32 rows of each expert; the rows after them are empty and give 0.
          backends: what computes the products.

        Returns:
          [R, d].
        """

        def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
            return grouped_matmul(rows, weight, sizes, backends)

        keys = self.keys(token, row_experts(sizes, rows.shape[0]))
        return run(self.network, self.parameters, rows, keys, product)

    def keys(
        self, token: Int[Array, "*rows"], expert: Int[Array, "..."]
    ) -> Key[Array, "*rows"] | None:
        """PRNG keys of rows: token [...] int32, expert of this device broadcast to it; or None."""
        if self.row_key is None:
            return None
        return self.row_key(token, self.first + jnp.broadcast_to(expert, token.shape))


def row_experts(sizes: Int[Array, " E"], rows: int) -> Int[Array, " {rows}"]:
    """[R] int32 which expert each row is for, of [E] rows each; the last one for rows beyond."""
    # Comparing with all is one fused loop; jnp.repeat and searchsorted take far longer to compile.
    place = jnp.arange(rows, dtype=jnp.int32)
    before = jnp.cumsum(sizes)[:-1] <= place[:, None]
    return before.sum(axis=1, dtype=jnp.int32)


@jax.named_scope("experts")
def run(
    network: Network,
    weights: Any,
    rows: Float[Array, "*rows d"],
    keys: Key[Array, "*rows"] | None,
    product: Product,
) -> Float[Array, "*rows d"]:
    """Both steps of the network."""
    return network.down(weights, network.up(weights, rows, product), keys, product)


def batched_product(
    rows: Float[Array, "E_X R d"], weight: Float[Array, "E_X d f"]
) -> Float[Array, "E_X R f"]:
    """[E/X, R, d] times [E/X, d, f]."""
    return jnp.einsum("erd,edf->erf", rows, weight)


class Dispatch(Component, abc.ABC):
    """A component of a config; runs inside the MoE layer's shard_map."""

    @property
    @abc.abstractmethod
    def dropless(self) -> bool:
        """Whether experts have no capacity: every choice of every token is served."""

    @abc.abstractmethod
    def validate(self, router: Router) -> None:
        """Raises UserError where the fields are impossible, or cannot work with the router."""

    @abc.abstractmethod
    def apply(
        self,
        x: Float[Array, "G S d"],
        assignment: Assignment,
        token_index: Int[Array, "G S"],
        experts: Experts,
        axis: str,
    ) -> tuple[Float[Array, "G S d"], dict[str, Mean]]:
        """Runs every token of this device through its experts.

        Args:
          x: [G, S, d] this device's tokens, in groups.
          assignment: the router's, lifted over G.
          token_index: [G, S] int32 index of each token in the global batch.
          experts: of this device.
          axis: mesh axis of X devices that the experts are split over.

        Returns:
          [G, S, d], 0 for tokens that no expert served; and statistics of this device's tokens by
          name.
        """
