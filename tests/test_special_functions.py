"""Functions with derivatives of their own, and that the library uses them wherever JAX's own would be
refused inside a shard_map."""

import ast
import functools
import inspect
import math
import pathlib

import jax
import jax.numpy as jnp
import jax.scipy.special
import jax.scipy.stats
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import special_functions
from moe_jax.parallel.mesh import TOKEN_AXES, MeshConfig, make_mesh


def exp(x):
    return 0.0 if x < -700 else math.exp(x)


def density(x):
    return exp(-x * x / 2) / math.sqrt(2 * math.pi)


def norm_cdf(x):
    """JAX's, which knows no bfloat16."""
    return jax.scipy.stats.norm.cdf(x.astype(jnp.float32)).astype(x.dtype)


# Ours, JAX's, and the derivative in double precision.
PAIRS = {
    "erf": (special_functions.erf, jax.lax.erf, lambda x: 2 / math.sqrt(math.pi) * exp(-x * x)),
    "erfc": (special_functions.erfc, jax.lax.erfc, lambda x: -2 / math.sqrt(math.pi) * exp(-x * x)),
    "normal_cdf": (special_functions.normal_cdf, norm_cdf, density),
    "gelu": (
        special_functions.gelu,
        functools.partial(jax.nn.gelu, approximate=False),
        lambda x: math.erfc(-x / math.sqrt(2)) / 2 + x * density(x),
    ),
}
EVERY = pytest.mark.parametrize("name", PAIRS)
# Around 0, where branches change, in the tails, and where squares overflow or underflow.
POINTS = [
    *np.linspace(-6, 6, 241),
    *(
        sign * x
        for sign in (-1, 1)
        for x in (0.0, 1e-38, 1e-20, 1e-6, 9.0, 13.0, 30.0, 1e4, 1e19, 1e30)
    ),
]


@functools.cache
def ours_and_jaxs(name, dtype):
    """Values and derivatives at POINTS, as float64."""
    x = jnp.asarray(POINTS, dtype)

    @jax.jit
    def run(x):
        return [(f(x), jax.vmap(jax.grad(f))(x)) for f in PAIRS[name][:2]]

    return jax.tree.map(lambda a: np.asarray(a, np.float64), run(x))


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_those_of_jax(name, dtype):
    (ours, _), (jaxs, _) = ours_and_jaxs(name, dtype)
    computed_alike = name != "normal_cdf" or dtype == "float32"
    np.testing.assert_allclose(ours, jaxs, rtol=0, atol=0 if computed_alike else 4e-3)


@EVERY
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_derivatives_are_those_of_jax_and_of_the_formula(name, dtype, tolerance):
    (_, ours), (_, jaxs) = ours_and_jaxs(name, dtype)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, jaxs, rtol=0, atol=tolerance)
    exact = [PAIRS[name][2](float(x)) for x in np.asarray(jnp.asarray(POINTS, dtype), np.float64)]
    np.testing.assert_allclose(ours, exact, rtol=0, atol=tolerance)


@EVERY
def test_the_dtype_is_kept_and_second_derivatives_are_finite(name):
    function = PAIRS[name][0]
    for dtype in (jnp.float32, jnp.bfloat16):
        assert function(jnp.ones(2, dtype)).dtype == dtype
        assert jax.grad(function)(jnp.ones((), dtype)).dtype == dtype
    curvature = jax.jit(jax.vmap(jax.grad(jax.grad(function))))(jnp.linspace(-8, 8, 65))
    assert np.isfinite(curvature).all() and np.abs(curvature).max() > 0.2


# Functions that JAX 0.10 or 0.12 differentiates inside a shard_map with an error, or through others
# that are; `moe_jax.special_functions` has its own for those that the library needs.
REFUSED = {
    *(f"jax.lax.{name}" for name in ("erf", "erfc")),
    "jax.numpy.sinc",
    *(
        f"jax.scipy.special.{name}"
        for name in (
            *("erf", "erfc", "erfcinv", "erfcx", "exp1", "expi", "expn", "hyp1f1"),
            *("log_ndtr", "ndtr", "ndtri", "spence"),
        )
    ),
    *(f"jax.scipy.stats.norm.{name}" for name in ("cdf", "isf", "logcdf", "logsf", "ppf", "sf")),
    *(f"jax.scipy.stats.truncnorm.{name}" for name in ("cdf", "logcdf", "logsf", "pdf", "sf")),
    "jax.scipy.stats.truncnorm.logpdf",
}
GELUS = {"jax.nn.gelu", "flax.nnx.gelu", "flax.linen.gelu"}  # Exact with approximate=False.


def refused_in(source: str) -> set[str]:
    """Full names of the refused functions that a module mentions."""
    tree = ast.parse(source)
    full: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                full[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def name_of(node) -> str:
        if isinstance(node, ast.Attribute):
            return f"{name_of(node.value)}.{node.attr}"
        return full.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    tanh_gelus = {
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(
            word.arg == "approximate" and ast.unparse(word.value) == "True"
            for word in node.keywords
        )
    }
    return {
        name
        for node in ast.walk(tree)
        if (name := name_of(node)) in REFUSED or (name in GELUS and node not in tanh_gelus)
    } | {name for name in full.values() if name in REFUSED}


ROOT = pathlib.Path(__file__).parents[1]


def test_the_library_uses_its_own_functions_where_jax_refuses_to_differentiate_its_own():
    found = {
        str(path.relative_to(ROOT)): refused
        for path in (ROOT / "moe_jax").rglob("*.py")
        if path.name != "special_functions.py" and (refused := refused_in(path.read_text()))
    }
    assert not found, "use moe_jax.special_functions, or add to it"
    assert refused_in((ROOT / "moe_jax" / "special_functions.py").read_text())


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import jax\ny = jax.lax.erf(x)", "jax.lax.erf"),
        ("from jax import lax\ny = lax.erfc(x)", "jax.lax.erfc"),
        ("import jax.numpy as jnp\ny = jnp.sinc(x)", "jax.numpy.sinc"),
        ("from jax.scipy.stats import norm\ny = norm.cdf(x)", "jax.scipy.stats.norm.cdf"),
        ("from jax.scipy.special import ndtr as phi", "jax.scipy.special.ndtr"),
        ("import jax.scipy.special as s\nf = s.log_ndtr", "jax.scipy.special.log_ndtr"),
        ("import jax\ny = jax.nn.gelu(x, approximate=False)", "jax.nn.gelu"),
        ("from flax import nnx\nf = nnx.gelu", "flax.nnx.gelu"),
    ],
)
def test_every_spelling_is_found(line, name):
    assert refused_in(line) == {name}


def test_the_tanh_gelu_and_functions_of_the_same_name_elsewhere_are_not_refused():
    assert not refused_in("import jax\ny = jax.nn.gelu(x, approximate=True)")
    assert not refused_in("import math\ny = math.erf(x)")
    assert not refused_in("from moe_jax.special_functions import erf\ny = erf(x)")


@pytest.mark.parametrize(
    "module",
    [jax.lax, jax.nn, jax.scipy.special, jax.scipy.stats.norm],
    ids=lambda module: module.__name__,
)
def test_no_other_function_of_jax_is_refused_by_this_version(module):
    """Every function of one array that can be differentiated outside can be inside, or is in REFUSED."""
    mesh, tokens = make_mesh(MeshConfig(2, 4, 1)), PartitionSpec(TOKEN_AXES)
    x = jnp.linspace(0.1, 0.9, 16)
    bad = set()
    for name, function in inspect.getmembers(module, callable):
        if name.startswith("_") or inspect.isclass(function):
            continue
        full = f"{module.__name__}.{name}"
        if full in REFUSED:
            continue
        gradient = jax.grad(functools.partial(summed, function))
        try:
            jax.eval_shape(gradient, x)
        except Exception:  # Not a function of one array of floats.
            continue
        inside = jax.shard_map(gradient, mesh=mesh, in_specs=tokens, out_specs=tokens)
        try:
            jax.eval_shape(inside, x)
        except Exception:
            bad.add(full)
    assert not bad, "add them to REFUSED"


def summed(function, x):
    return jnp.sum(function(x))
