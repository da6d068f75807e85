"""softmax(q k) v by the kernel that suits the platform: XLA, cuDNN or splash attention.

Axis letters: B batch, L query length, M key length, H heads of queries, J heads of keys and values,
h head width, v width of a head's values.
"""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from moe_jax.parallel.mesh import (
    MODEL,
    TOKEN_AXES,
    mesh_in_force,
    nvidia_capability,
    platform_in_force,
)
from moe_jax.parallel.sharding import axis_size

_LOG = logging.getLogger(__name__)

# Rows of scores that a splash kernel holds at once, from the largest that divides the length.
SPLASH_BLOCKS = (512, 256, 128)
# Causal queries whose products a CPU computes at once; of long rows more, since each block is compiled.
CPU_BLOCK, MOST_BLOCKS = 64, 16

# What is asked of arguments can be asked before there are any.
ArrayOrShape = Array | jax.ShapeDtypeStruct


def attend(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B M J h"],
    value: Float[Array, "B M J v"],
    *,
    bias: Float[Array, "#B #H #L #M"] | None = None,
    mask: Bool[Array, "#B #H #L #M"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "B L H v"]:
    """Scaled dot-product attention, grouped-query where keys have fewer heads.

    On GPUs cuDNN's flash attention, on TPUs splash attention, wherever they can do what is asked;
    neither holds the [B, H, L, M] scores. Where they cannot, XLA, and which argument they could not take is
    logged once. On CPUs `in_products`.

    Args:
      query: [B, L, H, h].
      key: [B, M, J, h]; J divides H.
      value: [B, M, J, v].
      bias: what is added to the scaled scores, broadcastable to [B, H, L, M]; None for nothing.
      mask: bool, broadcastable to [B, H, L, M], False for keys that may not be read; None for none.
      causal: query l reads the keys up to l only.
      scale: of the scores; None for 1 / sqrt(h).

    Returns:
      [B, L, H, v] in the query's dtype. Where a query may read no key at all, it is finite and
      means nothing.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    platform, length = platform_in_force(), query.shape[1]
    if platform == "tpu":
        obstacle = obstacle_to_splash(query, key, bias, mask)
        if not obstacle:
            return in_splash(query, key, value, mask, causal, scale)
        _log_once("splash attention", obstacle)
    elif platform == "gpu":
        obstacle = obstacle_to_cudnn(query, key, value, bias, mask, nvidia_capability())
        if not obstacle:
            return jax.nn.dot_product_attention(
                query, key, value, bias, is_causal=causal, scale=scale, implementation="cudnn"
            )
        _log_once("cuDNN's flash attention", obstacle)
    if platform != "cpu" and value.shape[-1] == key.shape[-1]:
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, is_causal=causal, scale=scale, implementation="xla"
        )
    block = max(CPU_BLOCK, -(-length // MOST_BLOCKS)) if platform == "cpu" and causal else length
    return in_products(query, key, value, bias, mask, causal, scale, block)


def obstacle_to_cudnn(
    query: Float[ArrayOrShape, "B L H h"],
    key: Float[ArrayOrShape, "B M J h"],
    value: Float[ArrayOrShape, "B M J v"],
    bias: Float[ArrayOrShape, "#B #H #L #M"] | None,
    mask: Bool[ArrayOrShape, "#B #H #L #M"] | None,
    capability: float,
) -> str:
    """What of the arguments of `attend` cuDNN cannot do; empty where it can do all."""
    width, lengths = query.shape[-1], (query.shape[1], key.shape[1])
    if capability < 8:
        return f"the GPU's compute capability is {capability}, below 8.0"
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"the dtype is {query.dtype}, not of 16 bits"
    if width % 8 or width > 128:
        return f"the head width is {width}, not a multiple of 8 up to 128"
    if value.shape[-1] != width:
        return f"values have width {value.shape[-1]}, and keys {width}"
    if mask is not None:
        # cuDNN would take it as a bias, of which it computes a gradient.
        return "there is a mask"
    if bias is not None and (
        bias.shape != (1, query.shape[2], *lengths) or any(map(_odd, lengths))
    ):
        return f"the bias is {bias.shape}, not one of all heads for a whole batch and even lengths"
    return ""


def obstacle_to_splash(
    query: Float[ArrayOrShape, "B L H h"],
    key: Float[ArrayOrShape, "B M J h"],
    bias: Float[ArrayOrShape, "#B #H #L #M"] | None,
    mask: Bool[ArrayOrShape, "#B #H #L #M"] | None,
) -> str:
    """What of the arguments of `attend` splash attention cannot do; empty where it can do all."""
    mesh = mesh_in_force()
    batch, length, heads, width = query.shape
    shards, heads_shards = axis_size(mesh, TOKEN_AXES), axis_size(mesh, MODEL)
    for size in (length, key.shape[1]):
        if size % SPLASH_BLOCKS[-1]:
            return f"the length is {size}, not a multiple of {SPLASH_BLOCKS[-1]}"
    if width % 8:
        return f"the head width is {width}, not a multiple of 8"
    if bias is not None:
        return "there is a bias"
    if mask is not None and mask.shape[1:3] != (1, 1):
        return f"the mask is {mask.shape}, not one of keys alone"
    if batch % shards:
        return f"the {batch} rows are not divisible by the {shards} devices of data x expert"
    for name, count in (("heads", heads), ("key and value heads", key.shape[2])):
        if count % heads_shards:
            return f"the {count} {name} are not divisible by the {heads_shards} devices of model"
    return ""


def in_splash(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B M J h"],
    value: Float[Array, "B M J v"],
    mask: Bool[Array, "#B 1 1 M"] | None,
    causal: bool,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B L H v"]:
    """`attend` on TPUs, where `obstacle_to_splash` finds none.

    Rows are split over `data` and `expert`, heads over `model`; nothing moves between devices.

    Args:
      query, key, value, causal, scale: as of `attend`.
      mask: of keys alone; None for none.
      interpret: run the kernel's program on a CPU.
    """
    batch, length = query.shape[:2]
    readable = jnp.ones((1, 1, 1, key.shape[1]), bool) if mask is None else mask
    readable = jnp.broadcast_to(readable[:, 0, 0], (batch, key.shape[1]))
    heads = PartitionSpec(TOKEN_AXES, None, MODEL)

    def of_shard(
        query: jax.Array, key: jax.Array, value: jax.Array, readable: jax.Array
    ) -> jax.Array:
        kernel = _splash_kernel(length, key.shape[1], query.shape[2], causal, interpret)
        # Queries are all of segment 1, and so are the keys that they may read.
        segments = splash_attention.SegmentIds(
            jnp.ones(query.shape[:2], jnp.int32), readable.astype(jnp.int32)
        )
        by_head = (x.swapaxes(1, 2) for x in (query * scale, key, value))
        attended: Any = jax.vmap(kernel)(*by_head, *([] if mask is None else [segments]))
        return attended.swapaxes(1, 2)

    # Nothing checks a kernel's output for which axes it varies over.
    split = jax.shard_map(
        of_shard,
        mesh=mesh_in_force(),
        in_specs=(heads, heads, heads, PartitionSpec(TOKEN_AXES)),
        out_specs=heads,
        check_vma=False,
    )
    return split(query, key, value, readable)


def _splash_kernel(
    length: int, key_length: int, heads: int, causal: bool, interpret: bool
) -> splash_attention.splash_attention_kernel.SplashAttentionKernel:
    """Of one row of the batch: [H, L, h], [J, M, h], [J, M, v] and segments to [H, L, v]."""
    kind = splash_attention.CausalMask if causal else splash_attention.FullMask
    block_q, block_kv = (
        next(size for size in SPLASH_BLOCKS if n % size == 0) for n in (length, key_length)
    )
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([kind((length, key_length))] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def in_products(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B M J h"],
    value: Float[Array, "B M J v"],
    bias: Float[Array, "#B #H #L #M"] | None,
    mask: Bool[Array, "#B #H #L #M"] | None,
    causal: bool,
    scale: float,
    block: int,
) -> Float[Array, "B L H v"]:
    """`attend` by products of matrices, of `block` queries after another.

    What causal queries cannot read is left out of their block's products; and each block divides by the
    sum of its exponentials after the product with the values, as flash attention does (Dao et al. 2022,
    section 3.1), not the scores before. Forward and backward in float32 on a core of an AMD EPYC this
    takes 11 ms at [8, 256, 4, 64] and 25 ms at [4, 512, 8, 32], `jax.nn.dot_product_attention` 25 and
    144 ms.

    Args:
      query, key, value, bias, mask, causal, scale: as of `attend`.
      block: queries at once.
    """
    batch, length, heads, width = query.shape
    key_length, kv_heads = key.shape[1:3]
    queries = (query * scale).swapaxes(1, 2).reshape(batch, kv_heads, -1, length, width)
    keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)

    def of_block(first: int) -> jax.Array:
        rows = min(block, length - first)
        stop = first + rows if causal else key_length
        part = queries[:, :, :, first : first + rows].reshape(batch, kv_heads, -1, width)
        scores = jnp.einsum(
            "bjqh,bjmh->bjqm", part, keys[:, :, :stop], preferred_element_type=jnp.float32
        ).reshape(batch, heads, rows, stop)
        if bias is not None:
            scores = scores + _part(bias, first, rows, stop)
        allowed = None if mask is None else _part(mask, first, rows, stop)
        if causal:
            earlier = jnp.arange(stop) <= first + jnp.arange(rows)[:, None]
            allowed = earlier if allowed is None else earlier & allowed
        if allowed is not None:
            scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
        largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - largest)
        by_kv_head = weights.astype(value.dtype).reshape(batch, kv_heads, -1, stop)
        attended = jnp.einsum("bjqm,bjmv->bjqv", by_kv_head, values[:, :, :stop])
        attended = attended.reshape(batch, heads, rows, -1)
        return (attended / weights.sum(axis=-1, keepdims=True)).astype(query.dtype)

    blocks = [of_block(first) for first in range(0, length, block)]
    return jnp.concatenate(blocks, axis=2).swapaxes(1, 2)


def _part(x: jax.Array, first: int, rows: int, stop: int) -> jax.Array:
    """The part of a bias or mask of [#B, #H, #L, #M] for `rows` queries and the keys before `stop`."""
    if x.shape[2] > 1:
        x = x[:, :, first : first + rows]
    return x[..., :stop] if x.shape[3] > 1 else x


def _odd(number: int) -> bool:
    return number % 2 == 1


@functools.cache
def _log_once(kernel: str, obstacle: str) -> None:
    _LOG.info("attention is left to XLA instead of %s: %s", kernel, obstacle)
