import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax import reference
from moe_jax.dispatch.dropless import Dropless, Method
from moe_jax.dispatch.gather import Gather
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo, number_of_groups
from moe_jax.parallel.mesh import DATA, EXPERT, MODEL, TOKEN_AXES, MeshConfig, make_mesh
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.losses import Losses
from moe_jax.routing.scores import Exploration
from moe_jax.routing.token_choice import TopK

B, L, D, F, E, K, S = 8, 8, 8, 16, 8, 2, 8
C = 2  # S * K * factor / E with factor 1.
MESHES = [(1, 1, 1), (2, 2, 2)]  # tests/layers/test_layouts.py has all.
LOSS_WEIGHTS = {"load_balancing": 0.3, "router_z": 0.1}
MASK = np.arange(B * L).reshape(B, L) % 11 != 5


def build(jitter=0.0, capacity=Capacity(train_factor=1.0), **options):  # noqa: B008
    config = MoEConfig(
        router=TopK(
            k=K,
            losses=Losses(**LOSS_WEIGHTS),
            exploration=Exploration.JITTER if jitter else Exploration.ARGMAX,
            exploration_rate=jitter,
        ),
        capacity=capacity,
        group_size=S,
        **options,
    )
    model = MoE(config, D, F, E, scale=1.0, key=jax.random.key(0))
    # Larger than at the start, so that the router decides and its gradient matters.
    model.router["weights"][...] = jax.random.normal(jax.random.key(1), (D, E))
    return model


def token_info(mask=MASK):
    zeros = jnp.zeros((B, L), jnp.int32)
    return TokenInfo(jnp.array(mask), zeros, zeros, zeros)


def vectors(seed):
    return jax.random.normal(jax.random.key(seed), (B, L, D))


def sharded(parameters, x):
    """Parameters and tokens laid out over the mesh in force as in training."""
    specs = {
        "router": {"weights": PartitionSpec()},
        "w_in": PartitionSpec(EXPERT, DATA, MODEL),
        "w_out": PartitionSpec(EXPERT, MODEL, DATA),
    }
    return jax.device_put(parameters, specs), jax.device_put(x, PartitionSpec(TOKEN_AXES))


def split(model):
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


GRAPH, PARAMETERS = split(build())


def loss(parameters, x):
    """Touches the output, and both losses."""
    y, report = nnx.merge(GRAPH, parameters)(x, token_info(), Mode.TRAIN, None)
    total = jnp.sum(y * vectors(3)) + sum(LOSS_WEIGHTS[n] * v for n, v in report.losses.items())
    return total, (y, report)


differentiated = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@functools.partial(jax.jit, static_argnames="mode")
def output(parameters, x, mode):
    return nnx.merge(GRAPH, parameters)(x, token_info(), mode, None)


def run(parameters, x):
    """Output, report and all gradients."""
    gradients, (y, report) = differentiated(parameters, x)
    return jax.device_get((y, report, gradients))


@functools.cache
def run_on(shape):
    with jax.set_mesh(make_mesh(MeshConfig(*shape))):
        return run(*sharded(PARAMETERS, vectors(2)))


@pytest.fixture(scope="module")
def expected():
    """The loop's output, losses, statistics and gradients."""

    def loop_loss(parameters, x):
        y, losses, statistics = reference.layer(
            x.reshape(-1, D), MASK.reshape(-1), parameters["router"]["weights"],
            parameters["w_in"], parameters["w_out"],
            group_size=S, choices=K, capacity=C,
        )  # fmt: skip
        total = jnp.sum(y * vectors(3).reshape(-1, D))
        total += sum(LOSS_WEIGHTS[name] * value for name, value in losses.items())
        return total, (y.reshape(B, L, D), losses, statistics)

    differentiated = jax.grad(loop_loss, argnums=(0, 1), has_aux=True)
    gradients, (y, losses, statistics) = differentiated(PARAMETERS, vectors(2))
    return jax.device_get((y, losses, statistics, gradients))


def assert_close(got, want, name):
    """Relative to the size of the whole array."""
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 1e-5, f"{name}: relative error {error:.1e}"


def assert_equals_loop(result, expected):
    y, report, (parameters, x) = result
    want_y, want_losses, want_statistics, (want_parameters, want_x) = expected
    assert_close(y, want_y, "output")
    assert_close(x, want_x, "gradient of x")
    got, want = parameters["router"]["weights"], want_parameters["router"]["weights"]
    assert_close(got, want, "gradient of the router")
    for name in ("w_in", "w_out"):
        for expert in range(E):
            assert_close(
                parameters[name][expert], want_parameters[name][expert], f"{name} of {expert}"
            )
    assert report.losses.keys() == want_losses.keys()
    assert report.statistics.keys() == want_statistics.keys()
    for name, value in {**want_losses, **want_statistics}.items():
        np.testing.assert_allclose(
            {**report.losses, **report.statistics}[name], value, rtol=1e-5, err_msg=name
        )


def test_the_case_has_drops_and_padding(expected):
    assert 0.1 < expected[2]["dropped"] < 0.9
    assert not MASK.all()
    assert not expected[0][~MASK].any()


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_equals_the_loop_on_every_mesh(shape, expected):
    assert_equals_loop(run_on(shape), expected)


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_every_mesh_equals_one_device(shape):
    one, many = run_on(MESHES[0]), run_on(shape)
    for (path, want), got in zip(
        jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True
    ):
        assert_close(got, want, jax.tree_util.keystr(path))


def test_works_without_a_mesh(expected):
    assert_equals_loop(run(PARAMETERS, vectors(2)), expected)


def noisy_on(dispatch, capacity, shape, seed):
    """Output and report with jitter and expert dropout."""
    graph, parameters = split(
        build(jitter=0.3, expert_dropout=0.5, dispatch=dispatch, capacity=capacity)
    )

    @jax.jit
    def noisy(parameters, x, key):
        return nnx.merge(graph, parameters)(x, token_info(), Mode.TRAIN, key)

    with jax.set_mesh(make_mesh(MeshConfig(*shape))):
        return jax.device_get(noisy(*sharded(parameters, vectors(2)), jax.random.key(seed)))


def test_random_draws_do_not_depend_on_the_mesh():
    on = functools.partial(noisy_on, Gather(), Capacity(train_factor=1.0))
    y, report = on((1, 1, 1), seed=5)
    for shape in ((2, 4, 1), (2, 2, 2)):
        other_y, other_report = on(shape, seed=5)
        assert_close(other_y, y, "output")
        np.testing.assert_allclose(
            other_report.statistics["load"], report.statistics["load"], rtol=1e-6
        )
    plain, still, _ = run_on((1, 1, 1))
    assert np.abs(y - plain).max() > 0.1, "expert dropout did nothing"
    assert report.statistics["entropy"] != still.statistics["entropy"], "jitter did nothing"
    assert np.abs(y - on((1, 1, 1), seed=6)[0]).max() > 0.1, "the key does not matter"


@pytest.mark.parametrize("method", [Method.SPILL, Method.GROUPED])
def test_random_draws_do_not_depend_on_the_dispatch(method):
    y, _ = noisy_on(Gather(), Capacity(rule=CapacityRule.NO_DROPS), (1, 1, 1), seed=5)
    other_y, _ = noisy_on(Dropless(method=method), Capacity(), (2, 2, 2), seed=5)
    assert_close(other_y, y, "output")


def test_evaluation_draws_nothing():
    graph, parameters = split(build(jitter=0.3, expert_dropout=0.5))

    @jax.jit
    def evaluate(parameters, x, key):
        return nnx.merge(graph, parameters)(x, token_info(), Mode.EVALUATE, key)[0]

    one, two = (evaluate(parameters, vectors(2), jax.random.key(seed)) for seed in (5, 6))
    np.testing.assert_array_equal(one, two)


def test_decoding_drops_nothing_and_rows_do_not_meet():
    y, report = output(PARAMETERS, vectors(2), Mode.DECODE)
    assert report.statistics["dropped"] == 0
    crowded, _ = output(PARAMETERS, vectors(2).at[1:].set(vectors(2)[0]), Mode.DECODE)
    np.testing.assert_allclose(crowded[0], y[0], rtol=1e-5, atol=1e-6)


def test_padding_contents_change_nothing():
    other = jnp.where(jnp.array(MASK)[..., None], vectors(2), 100.0)
    plain, noisy = (output(PARAMETERS, x, Mode.TRAIN) for x in (vectors(2), other))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), noisy, plain)


def test_bfloat16_in_bfloat16_out_with_a_float32_report():
    y, report = output(PARAMETERS, vectors(2).astype(jnp.bfloat16), Mode.TRAIN)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(report)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(y.astype(jnp.float32), run_on((1, 1, 1))[0], atol=0.3)


def test_number_of_groups():
    assert number_of_groups(tokens=64, group_size=8, shards=4) == 8
    with pytest.raises(UserError, match=r"group_size is 7.*not divide the 64 tokens.*; 4 works"):
        number_of_groups(tokens=64, group_size=7, shards=1)
    with pytest.raises(UserError, match=r"2 groups.*group_size=32.*4 shards.*; 16 works"):
        number_of_groups(tokens=64, group_size=32, shards=4)


def test_too_few_groups_for_the_mesh_is_an_error_of_the_layer():
    model = build()
    model.config = nnx.static(MoEConfig(group_size=32))
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=4))),
        pytest.raises(UserError, match=r"2 groups of moe.group_size=32"),
    ):
        model(vectors(2), token_info(), Mode.TRAIN, None)


def test_experts_that_the_mesh_does_not_divide_are_an_error_of_the_layer():
    config = MoEConfig(group_size=8)
    model = MoE(config, D, F, 6, scale=1.0, key=jax.random.key(0))
    with (
        jax.set_mesh(make_mesh(MeshConfig(expert=4))),
        pytest.raises(UserError, match=r"6 experts, which the 4 devices of mesh axis expert"),
    ):
        model(vectors(2), token_info(), Mode.TRAIN, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MoEConfig(group_size=-1), "moe.group_size is -1; it must be at least 1"),
        (MoEConfig(expert_dropout=1.0), r"moe.expert_dropout is 1.0; it must be in \[0, 1\)"),
        (MoEConfig(router=TopK(k=9)), "router.k is 9 but there are 8 experts"),
        (MoEConfig(capacity=Capacity(train_factor=0)), "capacity.train_factor is 0"),
    ],
)
def test_bad_fields_are_named(config, message):
    with pytest.raises(UserError, match=message):
        config.validate(E)
