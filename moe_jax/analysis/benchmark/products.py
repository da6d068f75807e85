"""The grouped matrix product at the shapes of published models: every backend, each operation.

Axis letters: R rows sorted by group, E groups (experts), d width in, f width out.
"""

import dataclasses
import enum
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.benchmark.cases import Skew, log_popularity
from moe_jax.analysis.benchmark.rows import Row
from moe_jax.analysis.benchmark.timing import Rounds, interleaved
from moe_jax.dispatch.grouped_matmul.interface import Backend, GroupedMatmul, grouped_matmul
from moe_jax.errors import UserError

TORCH = "torch"
BACKENDS = tuple(backend for backend in Backend if backend != Backend.REFERENCE)
# Of a right result; bfloat16 ones are within 0.4%.
LARGEST_ERROR = 0.01


class Operation(enum.StrEnum):
    """The product itself, and the gradients of its rows (lhs) and of its weights (rhs)."""

    FORWARD = "forward"
    DLHS = "dlhs"
    DRHS = "drhs"


@dataclasses.dataclass(frozen=True)
class ProductShape:
    """[R, d] times [E, d, f].

    Attributes:
      model: whose.
      rows: R, tokens times experts per token.
      experts: E.
      width: d.
      mlp_width: f.
    """

    model: str
    rows: int
    experts: int
    width: int
    mlp_width: int

    @property
    def flops(self) -> int:
        """Of each of the three operations, two per multiply-add."""
        return 2 * self.rows * self.width * self.mlp_width

    def small(self) -> "ProductShape":
        """The same number of experts at a size for any machine."""
        return dataclasses.replace(self, rows=8 * self.experts, width=32, mlp_width=64)


# The first product of an expert, of the models' config.json: hidden_size to (moe_)intermediate_size.
# Tokens per device are ours.
SHAPES = [
    ProductShape("mixtral_8x7b", rows=4096 * 2, experts=8, width=4096, mlp_width=14336),
    ProductShape("deepseek_v3", rows=16384 * 8, experts=256, width=7168, mlp_width=2048),
    ProductShape("qwen3_235b_a22b", rows=16384 * 8, experts=128, width=4096, mlp_width=1536),
    ProductShape("olmoe_1b_7b", rows=16384 * 8, experts=64, width=2048, mlp_width=1024),
]


def shapes_for(small: bool) -> list[ProductShape]:
    """The models' shapes, or small ones.

    Raises:
      UserError: a CPU is to compute the models' shapes, which takes hours.
    """
    if small:
        return [shape.small() for shape in SHAPES]
    if jax.default_backend() == "cpu":
        raise UserError(
            "products is set, but there is no GPU or TPU to compute the models' shapes in time; "
            "add --small for shapes that a CPU can compute."
        )
    return SHAPES


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of one product and its gradients.

    Attributes:
      lhs: [R, d] bfloat16.
      rhs: [E, d, f] bfloat16.
      gradient: [R, f] bfloat16, of the result.
      group_sizes: [E] int32, R in total.
    """

    lhs: jax.Array
    rhs: jax.Array
    gradient: jax.Array
    group_sizes: jax.Array


def inputs_of(shape: ProductShape, skew: Skew) -> Inputs:
    """Random arrays, and group sizes as R draws of an expert each by its popularity.

    With `one_hot` all groups but the first are empty.
    """
    popularity = np.exp(np.asarray(log_popularity(skew, shape.experts), np.float64))
    if skew == Skew.ONE_HOT:
        popularity[1:] = 0
    sizes = np.random.default_rng(0).multinomial(shape.rows, popularity / popularity.sum())
    keys = jax.random.split(jax.random.key(0), 3)
    rows, experts, width, mlp_width = shape.rows, shape.experts, shape.width, shape.mlp_width
    return Inputs(
        jax.random.normal(keys[0], (rows, width), jnp.bfloat16),
        jax.random.normal(keys[1], (experts, width, mlp_width), jnp.bfloat16) / width**0.5,
        jax.random.normal(keys[2], (rows, mlp_width), jnp.bfloat16),
        jnp.asarray(sizes, jnp.int32),
    )


@functools.cache  # So that it is compiled once for all group sizes.
def operation_by(backend: Backend, operation: Operation) -> Callable[[Inputs], jax.Array]:
    """A compiled operation; what the gradients do not need of the product is removed by XLA."""
    backends = GroupedMatmul(forward=backend, lhs_gradient=backend, rhs_gradient=backend)

    @jax.jit
    def run(lhs: jax.Array, rhs: jax.Array, gradient: jax.Array, sizes: jax.Array) -> jax.Array:
        if operation == Operation.FORWARD:
            return grouped_matmul(lhs, rhs, sizes, backends)
        if operation == Operation.DLHS:
            _, pullback = jax.vjp(lambda lhs: grouped_matmul(lhs, rhs, sizes, backends), lhs)
        else:
            _, pullback = jax.vjp(lambda rhs: grouped_matmul(lhs, rhs, sizes, backends), rhs)
        return pullback(gradient)[0]

    return lambda inputs: run(inputs.lhs, inputs.rhs, inputs.gradient, inputs.group_sizes)


def relative_error(operation: Operation, inputs: Inputs, result: Any) -> float:
    """Of the largest group, the smallest that has rows, and an empty one if there is one.

    The whole product again, group by group, would take longer than the benchmark.

    Returns:
      The largest norm of the difference to a float32 product by the norm of that product; infinite
      where the gradient of an empty group's weights is not 0, and NaN where a result is.
    """
    sizes = np.asarray(inputs.group_sizes)
    starts = np.cumsum(sizes) - sizes
    with_rows = np.flatnonzero(sizes)
    groups = {with_rows[np.argmax(sizes[with_rows])], with_rows[np.argmin(sizes[with_rows])]}
    groups |= set(np.flatnonzero(sizes == 0)[:1])
    errors = []
    for group in groups:
        rows = slice(starts[group], starts[group] + sizes[group])
        lhs, rhs, gradient = (
            a.astype(jnp.float32)
            for a in (inputs.lhs[rows], inputs.rhs[group], inputs.gradient[rows])
        )
        match operation:
            case Operation.FORWARD:
                want, got = lhs @ rhs, result[rows]
            case Operation.DLHS:
                want, got = gradient @ rhs.T, result[rows]
            case Operation.DRHS:
                want, got = lhs.T @ gradient, result[group]
        size = float(jnp.linalg.norm(want))
        difference = float(jnp.linalg.norm(jnp.asarray(got, jnp.float32) - want))
        errors.append(difference / size if size else (np.inf if difference else 0.0))
    return float(np.max(errors))  # Unlike max(), which may pass over a NaN.


def measure_products(
    shape: ProductShape, skew: Skew, backends: Sequence[Backend], schedule: Rounds
) -> Iterator[Row]:
    """Times one product by every backend, operation by operation.

    Args:
      shape: of the product.
      skew: of the group sizes.
      backends: to compare; PyTorch's `grouped_mm` joins them where PyTorch has the same GPU.
      schedule: how often each runs.

    Yields:
      Per operation and backend: `model, rows, experts, width, mlp_width, skew, operation, backend,
      milliseconds, rounds, teraflops_per_second`; `relative_error`, None if it is not finite;
      `share_of_best`, the time of the best backend with a right result by this one's (1 is best), None
      if this one's result is wrong. Of a backend that fails, `left_out` instead of figures.
    """
    inputs = inputs_of(shape, skew)
    for operation in Operation:
        case = {**dataclasses.asdict(shape), "skew": str(skew), "operation": str(operation)}
        candidates: dict[str, Callable[[], Any]] = {
            str(backend): functools.partial(operation_by(backend, operation), inputs)
            for backend in backends
        }
        if torch_has_the_gpu():
            candidates[TORCH] = _operation_by_torch(operation, inputs)
        calls, errors = {}, {}
        for name, call in candidates.items():
            try:
                errors[name] = relative_error(operation, inputs, _as_jax(call()))
                calls[name] = call
            except (UserError, NotImplementedError, ValueError, RuntimeError) as error:
                # A kernel may refuse a shape or find no memory; the others are still compared.
                yield {**case, "backend": name, "left_out": _first_line(error)}
        if not calls:
            continue
        times = interleaved(calls, schedule)
        medians = {name: float(np.nanmedian(of_name)) for name, of_name in times.items()}
        right = [name for name in calls if errors[name] <= LARGEST_ERROR]
        best = min(right, key=medians.__getitem__, default=None)
        for name in calls:
            share = np.nanmedian(times[best] / times[name]) if best and name in right else None
            yield {
                **case,
                "backend": name,
                "milliseconds": 1e3 * medians[name],
                "rounds": int(np.isfinite(times[name]).sum()),
                "teraflops_per_second": shape.flops / medians[name] / 1e12,
                "share_of_best": None if share is None else float(share),
                "relative_error": errors[name] if np.isfinite(errors[name]) else None,
            }


def _first_line(error: Exception) -> str:
    """Of its text, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def torch_has_the_gpu() -> bool:
    """Whether PyTorch is installed with CUDA, has `grouped_mm`, and JAX computes on the same GPU."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return False
    torch: Any = importlib.import_module("torch")
    return torch.cuda.is_available() and hasattr(torch.nn.functional, "grouped_mm")


def _operation_by_torch(operation: Operation, inputs: Inputs) -> Callable[[], Any]:
    """The operation by PyTorch on the same arrays, which are not copied."""
    torch: Any = importlib.import_module("torch")
    lhs, rhs, gradient, sizes = (
        torch.from_dlpack(a) for a in (inputs.lhs, inputs.rhs, inputs.gradient, inputs.group_sizes)
    )
    ends = torch.cumsum(sizes, dim=0, dtype=torch.int32)
    operands = {
        Operation.FORWARD: (lhs, rhs),
        Operation.DLHS: (gradient, rhs.transpose(1, 2)),
        Operation.DRHS: (lhs.transpose(0, 1), gradient),
    }[operation]

    def run() -> Any:
        result = torch.nn.functional.grouped_mm(*operands, offs=ends)
        torch.cuda.synchronize()
        return result

    return run


def _as_jax(array: Any) -> jax.Array:
    return array if isinstance(array, jax.Array) else jnp.from_dlpack(array)
