"""Matrix products of attention's scores and weighted values, by the kernel that computes them.

Axis letters: B batch, L query length, M key length, H heads, J heads of keys and values, h head width,
v width of a head's values.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from moe_jax.analysis.accounting.machine import Machine
from moe_jax.analysis.accounting.products import Product
from moe_jax.analysis.hlo.kernels import causal_scores, cudnn_pairs, cudnn_widths
from moe_jax.layers.attention_kernels import SPLASH_BLOCKS, obstacle_to_cudnn, obstacle_to_splash


@dataclasses.dataclass(frozen=True)
class Scores:
    """One layer's attention.

    Attributes:
      batch, length, key_length, heads, kv_heads: B, L, M, H, J.
      head_width, value_width: h, v, those of `AttentionConfig.score_widths`.
      causal: a query reads the keys up to its own position only.
      biased: something is added to the scores.
      padded: there is a mask of keys.
      dtype: of queries, keys and values.
    """

    batch: int
    length: int
    key_length: int
    heads: int
    kv_heads: int
    head_width: int
    value_width: int
    causal: bool
    biased: bool
    padded: bool
    dtype: Any

    def product(self, machine: Machine) -> Product:
        """Scores and weighted values, forward 2 (h + v) operations for a query and a key.

        Splash attention skips blocks that are wholly masked. Its backward pass is two kernels, both
        of which compute the scores and the gradient of the weights anew: one of the queries (scores
        h, gradient of the weights v, of the queries h), one of keys and values (h, v, h, v).
        cuDNN's kernels skip such blocks, too, and compute the scores anew once. Everything else is
        counted as XLA does it, whose four gradients read kept scores, and masked scores are computed
        like others.
        """
        widths = self.head_width + self.value_width
        if self._cudnn(machine):
            forward, backward = cudnn_widths(self.head_width, self.value_width)
            pairs = cudnn_pairs(self.length, self.key_length, self.causal)
            return self._of_pairs(pairs, backward / forward)
        if not self._splash(machine):
            return self._of_pairs(self.length * self.key_length, 2.0)
        backward = 4 * self.head_width + 3 * self.value_width
        return self._of_pairs(self._pairs_in_splash(), backward / widths)

    def _of_pairs(self, pairs: int, backward: float) -> Product:
        widths = self.head_width + self.value_width
        return Product(2.0 * self.batch * self.heads * pairs * widths, backward, batched=True)

    def _cudnn(self, machine: Machine) -> bool:
        """Whether a Hopper GPU, the usual one, computes it by cuDNN."""
        if machine.platform != "gpu" or self.biased:
            return False
        heads_and_widths = (
            (self.length, self.heads, self.head_width),
            (self.key_length, self.kv_heads, self.head_width),
            (self.key_length, self.kv_heads, self.value_width),
        )
        query, key, value = (
            jax.ShapeDtypeStruct((self.batch, *shape), self.dtype) for shape in heads_and_widths
        )
        mask = jax.ShapeDtypeStruct((self.batch, 1, 1, self.key_length), jnp.bool_)
        padding = mask if self.padded else None
        return not obstacle_to_cudnn(query, key, value, None, padding, capability=9.0)

    def _splash(self, machine: Machine) -> bool:
        def array(length: int, heads: int) -> Any:
            shape = (self.batch, length, heads, self.head_width)
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

        if machine.platform != "tpu" or self.biased:
            return False
        query, key = array(self.length, self.heads), array(self.key_length, self.kv_heads)
        mesh = AbstractMesh(tuple(machine.mesh.values()), tuple(machine.mesh))
        with jax.sharding.use_abstract_mesh(mesh):
            return not obstacle_to_splash(query, key, bias=None, mask=None)

    def _pairs_in_splash(self) -> int:
        """Scores in all blocks that are not wholly masked, of one head of one row."""
        if not self.causal:
            return self.length * self.key_length
        lengths = (self.length, self.key_length)
        rows, columns = (
            next(block for block in SPLASH_BLOCKS if length % block == 0) for length in lengths
        )
        return causal_scores(*lengths, rows, columns)
