"""The grouped matrix product with its own gradients, over the backends that the other files are.

Axis letters: R rows sorted by group, E groups, d and f widths.

Each backend has two functions: `product` (forward, and the gradient of the rows with the matrices
transposed) and `outer` (the gradient of the matrices). Which backend computes which of the three is
chosen when the program is traced.
"""

import dataclasses
import enum
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moe_jax.component import Component
from moe_jax.dispatch.grouped_matmul import blocks, ragged_dot, reference, tokamax
from moe_jax.dispatch.varying import varying_alike
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import nvidia_capability, platform_in_force

_LOG = logging.getLogger(__name__)


class Backend(enum.StrEnum):
    """What computes a grouped product.

    AUTO: the fastest known for the platform, the operation and the shapes.
    REFERENCE: every row times every matrix.
    BLOCKS: a loop over blocks of rows; made for CPUs.
    RAGGED_DOT: `jax.lax.ragged_dot_general`. For CPUs and GPUs XLA multiplies all rows by all matrices,
      in E times the time and in buffers of [E, R, d], so AUTO never chooses it.
    MEGABLOX: JAX's Pallas kernels for TPUs.
    TOKAMAX_MOSAIC: the tokamax package's kernels for NVIDIA Hopper.
    TOKAMAX_TRITON: the tokamax package's kernels for NVIDIA GPUs since Ampere.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    BLOCKS = "blocks"
    RAGGED_DOT = "ragged_dot"
    MEGABLOX = "megablox"
    TOKAMAX_MOSAIC = "tokamax_mosaic"
    TOKAMAX_TRITON = "tokamax_triton"


# Backends that run on one platform only.
_PLATFORM = {
    Backend.MEGABLOX: "tpu",
    Backend.TOKAMAX_MOSAIC: "gpu",
    Backend.TOKAMAX_TRITON: "gpu",
}
_TOKAMAX: dict[Backend, tokamax.Implementation] = {
    Backend.TOKAMAX_MOSAIC: "mosaic",
    Backend.TOKAMAX_TRITON: "triton",
}


@dataclasses.dataclass
class GroupedMatmul(Component):
    """Which backend computes what; a component of a config.

    Attributes:
      forward: of the product itself.
      lhs_gradient: of the gradient of the rows.
      rhs_gradient: of the gradient of the matrices.
    """

    forward: Backend = Backend.AUTO
    lhs_gradient: Backend = Backend.AUTO
    rhs_gradient: Backend = Backend.AUTO

    def validate(self) -> None:
        """Raises UserError for a backend that the installed packages do not have."""
        for field in dataclasses.fields(self):
            backend = getattr(self, field.name)
            if backend in _TOKAMAX and _TOKAMAX[backend] not in tokamax.available():
                found = ", ".join(sorted(tokamax.available())) or "nothing"
                raise UserError(
                    f"grouped_matmul.{field.name} is {backend}, but of tokamax's kernels {found} is "
                    "installed; install the extra gpu or set it to auto."
                )


def grouped_matmul(
    lhs: Float[Array, "R d"],
    rhs: Float[Array, "E d f"],
    group_sizes: Int[Array, " groups"],
    backends: GroupedMatmul,
    group_offset: Int[Array, ""] | None = None,
) -> Float[Array, "R f"]:
    """Multiplies each row by its group's matrix.

    Differentiable once in `lhs` and `rhs`. Inside a shard_map, all arrays are those of one device.

    Args:
      lhs: [R, d] rows sorted by group.
      rhs: [E, d, f] in the dtype of `lhs`.
      group_sizes: [E] int32 rows of each group, at most R in all.
      backends: what computes it.
      group_offset: [] int32; then `group_sizes` is of all groups, and `rhs` has the matrices of
        groups group_offset up to group_offset + E. Rows of other groups give 0.

    Returns:
      [R, f] in the dtype of `lhs`, accumulated in float32. Rows beyond the last group are 0 and get
      no gradient; the gradient of a group without rows is 0.

    Raises:
      UserError: a backend that `backends` asks for cannot run here.
    """
    if group_offset is not None:
        # Our groups' rows are brought to the front, so that no backend needs to know of the others.
        before = jnp.arange(group_sizes.shape[0]) < group_offset
        start = jnp.sum(jnp.where(before, group_sizes, 0))
        sizes = jax.lax.dynamic_slice_in_dim(group_sizes, group_offset, rhs.shape[0])
        return jnp.roll(grouped_matmul(jnp.roll(lhs, -start, 0), rhs, sizes, backends), start, 0)
    chosen = _choose(backends, lhs, rhs.shape[2])
    sizes = jnp.asarray(group_sizes, jnp.int32)
    return _grouped_matmul(*varying_alike(lhs, rhs, sizes), chosen)


class _Chosen(NamedTuple):
    """The fields of `GroupedMatmul`, none of them AUTO; hashable, as custom_vjp wants it."""

    forward: Backend
    lhs_gradient: Backend
    rhs_gradient: Backend


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, chosen: _Chosen
) -> jax.Array:
    return _product(chosen.forward, lhs, rhs, group_sizes, False)


def _forward(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, chosen: _Chosen
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _grouped_matmul(lhs, rhs, group_sizes, chosen), (lhs, rhs, group_sizes)


def _backward(
    chosen: _Chosen, residuals: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    lhs, rhs, group_sizes = residuals
    of_lhs = _product(chosen.lhs_gradient, gradient, rhs, group_sizes, True)
    of_rhs = _outer(chosen.rhs_gradient, lhs, gradient, group_sizes)
    return of_lhs.astype(lhs.dtype), of_rhs.astype(rhs.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def _product(
    backend: Backend, lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, transpose_rhs: bool
) -> jax.Array:
    compute = functools.partial(_functions(backend)[0], transpose_rhs=transpose_rhs)
    if backend in (Backend.REFERENCE, Backend.BLOCKS):
        return compute(lhs, rhs, group_sizes)
    result = _run_kernel(backend, compute, lhs, rhs, group_sizes)
    # Kernels leave rows beyond the last group uninitialised.
    is_row = jnp.arange(lhs.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(is_row[:, None], result, 0)


def _outer(
    backend: Backend, lhs: jax.Array, gradient: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    return _run_kernel(backend, _functions(backend)[1], lhs, gradient, group_sizes)


def _functions(backend: Backend) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """`product` and `outer` of a backend."""
    if backend in _TOKAMAX:
        return (
            functools.partial(tokamax.product, implementation=_TOKAMAX[backend]),
            functools.partial(tokamax.outer, implementation=_TOKAMAX[backend]),
        )
    if backend == Backend.MEGABLOX:
        # Imported here because importing Pallas takes 0.3 s, which other platforms need not pay.
        from moe_jax.dispatch.grouped_matmul import megablox

        return megablox.product, megablox.outer
    module: Any = {
        Backend.REFERENCE: reference,
        Backend.BLOCKS: blocks,
        Backend.RAGGED_DOT: ragged_dot,
    }[backend]
    return module.product, module.outer


def _run_kernel(
    backend: Backend, compute: Callable[..., jax.Array], *arrays: jax.Array
) -> jax.Array:
    """Calls a backend; inside a shard_map, without its check of varying axes if it is Pallas.

    A `pallas_call` must say how its result varies, and those of other packages do not. A shard_map
    over no further axis turns the check off for the call; afterwards the result is said to vary as
    the arguments do.
    """
    if backend not in _PLATFORM or not jax.sharding.get_abstract_mesh().manual_axes:
        return compute(*arrays)
    whole = PartitionSpec()
    unchecked = jax.shard_map(
        compute, in_specs=(whole,) * len(arrays), out_specs=whole, check_vma=False
    )
    return varying_alike(unchecked(*arrays), *arrays)[0]


def _choose(backends: GroupedMatmul, lhs: jax.Array, width: int) -> _Chosen:
    """Replaces AUTO, checks the others, logs the choice; `lhs` is [R, d] and `width` f."""
    backends.validate()
    platform = platform_in_force()
    automatic = _automatic(platform, lhs, width)
    values = []
    for field, default in automatic._asdict().items():
        backend = getattr(backends, field)
        if _PLATFORM.get(backend, platform) != platform:
            raise UserError(
                f"grouped_matmul.{field} is {backend}, which runs on {_PLATFORM[backend]}, but the "
                f"program is for {platform}; set it to auto, ragged_dot or blocks."
            )
        if backend == Backend.TOKAMAX_MOSAIC and not tokamax.fits_mosaic(lhs, width):
            raise UserError(
                f"grouped_matmul.{field} is {backend}, which needs 16-bit numbers and widths that "
                f"are multiples of 128, but the rows are {lhs.dtype} and the widths "
                f"{lhs.shape[1]} and {width}; set it to auto or tokamax_triton."
            )
        if backend == Backend.AUTO:
            backend = default
            if platform == "gpu" and backend == Backend.BLOCKS:
                _warn_of_blocks()
        if platform == "gpu" and backend == Backend.RAGGED_DOT:
            _warn_of_ragged_dot()
        values.append(backend)
    chosen = _Chosen(*values)
    _log_once(chosen, platform)
    return chosen


def _automatic(platform: str, lhs: jax.Array, width: int) -> _Chosen:
    """The fastest backends known for [R, d] rows and matrices of d x f; f = `width`."""
    if platform == "tpu":
        # Not measured on a TPU; read in programs that libtpu 0.0.42 compiled. Of `ragged_dot`, XLA
        # makes E times the work for the gradient of the matrices, and writes the product in float32
        # before it rounds: 470 MB of temporary memory for Mixtral's shapes on v5p (R = 8192 rows of
        # 2 experts), where Megablox takes 1.3 MB.
        return _Chosen(Backend.MEGABLOX, Backend.MEGABLOX, Backend.MEGABLOX)
    if platform == "gpu":
        return _automatic_on_gpu(lhs, width)
    return _Chosen(Backend.BLOCKS, Backend.BLOCKS, Backend.BLOCKS)


def _automatic_on_gpu(lhs: jax.Array, width: int) -> _Chosen:
    """By the H100 medians that tokamax publishes (TFLOP/s in bfloat16, Mosaic / Triton).

    DeepSeek-V3's shapes: forward 462 / 407 and 372 / 139, gradient of the rows 269 / 185, gradient
    of the matrices 114 / 538. (Mixtral's 8 wide experts are an exception: forward 461 / 649.) Not
    measured here.
    """
    capability = nvidia_capability()
    has_triton = capability >= 8 and "triton" in tokamax.available()
    # Hopper only: nothing is published for Blackwell.
    if 9 <= capability < 10 and "mosaic" in tokamax.available() and tokamax.fits_mosaic(lhs, width):
        of_rhs = Backend.TOKAMAX_TRITON if has_triton else Backend.TOKAMAX_MOSAIC
        return _Chosen(Backend.TOKAMAX_MOSAIC, Backend.TOKAMAX_MOSAIC, of_rhs)
    if has_triton:
        return _Chosen(Backend.TOKAMAX_TRITON, Backend.TOKAMAX_TRITON, Backend.TOKAMAX_TRITON)
    # Not `ragged_dot`: compiled for an H100 by jax 0.10.2 and 0.12.0.1, it takes E * R * d * 2 bytes.
    return _Chosen(Backend.BLOCKS, Backend.BLOCKS, Backend.BLOCKS)


@functools.cache
def _warn_of_blocks() -> None:
    _LOG.warning(
        "no kernel of tokamax is installed for this GPU, these widths and this dtype, so grouped "
        "products are a loop over blocks of rows, which starts several kernels for each; install the "
        "extra gpu, and use bfloat16 and widths that are multiples of 128."
    )


@functools.cache
def _warn_of_ragged_dot() -> None:
    _LOG.warning(
        "grouped products go to jax.lax.ragged_dot, as the config says; for GPUs XLA makes it multiply "
        "all rows by all experts, so use auto unless it is to be measured."
    )


@functools.cache
def _log_once(chosen: _Chosen, platform: str) -> None:
    choices = ", ".join(f"{field} {backend}" for field, backend in chosen._asdict().items())
    _LOG.info("grouped matrix product on %s: %s", platform, choices)
