import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from moe_jax.errors import UserError
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.parallel.sharding import MESH_AXES, STACKING_AXES
from moe_jax.training.matrices import is_matrix
from moe_jax.training.optimizers import (
    SGD,
    Adafactor,
    AdamW,
    Decayed,
    Schedule,
    is_decayed,
    updates_done,
)
from moe_jax.training.state import state_shardings

STACKED = {
    "w": ("layers", "experts", "expert_embed", "mlp"),
    "qkv": ("layers", "embed", "qkv", "heads", "head"),
    "scale": ("layers", "norm"),
}
SHAPES = {"w": (3, 4, 6, 8), "qkv": (3, 6, 3, 2, 4), "scale": (3, 6)}


def random_tree(seed, shapes):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


@pytest.mark.parametrize(
    ("fields", "at"),
    [
        # Peak 1 after 10 steps; half-way down a cosine to 0.1 is 0.55.
        (dict(schedule=Schedule.COSINE), {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}),
        (dict(schedule=Schedule.LINEAR), {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}),
        (dict(schedule=Schedule.CONSTANT), {5: 0.5, 10: 1.0, 500: 1.0}),
        # sqrt(10 / step).
        (dict(schedule=Schedule.INVERSE_SQRT), {0: 0.0, 5: 0.5, 10: 1.0, 40: 0.5, 1000: 0.1}),
        # T5 and GLaM: 10 / sqrt(max(step, 100)).
        (
            dict(schedule=Schedule.INVERSE_SQRT, warmup_steps=0, constant_steps=100),
            {0: 1.0, 100: 1.0, 400: 0.5, 10_000: 0.1},
        ),
        # Soft MoE: 1 / sqrt(1 + (step - 10) / 30), times what is left of the last 20 steps.
        (
            dict(schedule=Schedule.INVERSE_SQRT, timescale=30, cooldown_steps=20),
            {5: 0.5, 10: 1.0, 90: (1 + 80 / 30) ** -0.5, 100: 0.5 * 2**-1, 110: 0.0, 200: 0.0},
        ),
        # DeepSeek: steps 88 and 99 are at 80% and 90% of 110.
        (
            dict(schedule=Schedule.STEPS),
            {5: 0.5, 10: 1.0, 87: 1.0, 88: 0.316, 98: 0.316, 99: 0.316**2, 500: 0.316**2},
        ),
        # OLMoE: the cosine has come to 0.1 when the cooldown begins.
        (
            dict(schedule=Schedule.COSINE, cooldown_steps=20),
            {10: 1.0, 50: 0.55, 90: 0.1, 100: 0.05, 110: 0.0},
        ),
    ],
)
def test_schedules(fields, at):
    fields = {"warmup_steps": 10} | fields
    optimizer = AdamW(learning_rate=1.0, final_fraction=0.1, **fields)
    optimizer.validate()
    rate = optimizer.learning_rate_at(110)
    for step, expected in at.items():
        assert float(rate(step)) == pytest.approx(expected, abs=1e-6), step


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (AdamW(decay_at=(0.8, 1.0)), ["optimizer.decay_at is (0.8, 1.0)", "between 0 and 1"]),
        (Adafactor(constant_steps=0), ["inverse_sqrt", "constant_steps"]),
        (AdamW(clip_norm=0.0, clip_excludes_experts=True), ["clip_excludes_experts", "clip_norm"]),
        (Adafactor(min_size_to_factor=0), ["min_size_to_factor is 0", "at least 1"]),
        (SGD(momentum=1.5), ["optimizer.momentum is 1.5", "[0, 1)"]),
        (AdamW(b1=1), ["optimizer.b1 is 1; it must be in [0, 1)."]),
        (AdamW(b2=1.0), ["optimizer.b2 is 1.0", "[0, 1)"]),
        (Adafactor(b1=1.0), ["optimizer.b1 is 1.0", "[0, 1)"]),
        (Adafactor(b2=1.5), ["optimizer.b2 is 1.5", "[0, 1]"]),
        (AdamW(weight_decay=float("nan")), ["optimizer.weight_decay is nan", "at least 0"]),
    ],
)
def test_what_cannot_work_is_refused(optimizer, words):
    with pytest.raises(UserError) as error:
        optimizer.validate()
    assert all(word in str(error.value) for word in words)


def test_only_matrices_decay():
    expected = {
        ("layers", "experts", "expert_embed", "mlp"): True,
        ("router", "router"): True,
        ("embed", "heads", "head"): True,
        ("embed", "gates", "units"): True,
        ("layers", "norm"): False,
        ("layers", "experts", "mlp"): False,
        ("qkv", "heads", "head"): False,
        ("gates", "units"): False,
        (): False,
        ("vocabulary", "embed"): False,
        ("positions", "embed"): False,
    }
    assert {names: is_decayed(names, Decayed.MATRICES) for names in expected} == expected
    assert is_decayed(("vocabulary", "embed"), Decayed.MATRICES_AND_TABLES)
    assert not is_decayed(("layers", "norm"), Decayed.MATRICES_AND_TABLES)
    assert is_decayed(("layers", "norm"), Decayed.ALL)


# To whoever adds a name: is there a matrix for each index along it?
_OWN_AXES = (
    "embed latent vocabulary heads head kv_heads positions mlp expert_embed patch channels classes gates "
    "units features router norm batch length width"
)


@pytest.mark.parametrize("name", MESH_AXES)
def test_every_name_of_a_dimension_is_of_a_matrix_or_counts_matrices(name):
    assert (name in STACKING_AXES) != (name in _OWN_AXES.split())
    assert is_matrix((name, "embed", "mlp"))
    assert is_matrix((name, "mlp")) == (name not in STACKING_AXES)
    assert is_decayed(("experts", name, "mlp"), Decayed.MATRICES_AND_TABLES) == (
        name not in STACKING_AXES
    )


def test_networks_within_an_expert_do_not_change_each_others_updates():
    """BASE's experts are stacks of ten networks."""
    axes = {"w": ("experts", "sublayers", "expert_embed", "mlp")}
    parameters = random_tree(0, {"w": (2, 3, 4, 5)})
    optimizer = Adafactor(min_size_to_factor=2).build(10, axes)
    gradients = random_tree(1, {"w": (2, 3, 4, 5)})
    larger = {"w": gradients["w"].at[:, 1].multiply(100.0)}
    update, other = (
        optimizer.update(g, optimizer.init(parameters), parameters)[0]["w"]
        for g in (gradients, larger)
    )
    np.testing.assert_array_equal(update[:, [0, 2]], other[:, [0, 2]])


def test_the_updates_that_an_optimizer_has_seen():
    parameters = {"w": jnp.ones((2, 2))}
    optimizer = AdamW().build(10, {"w": ("embed", "mlp")})
    state = optimizer.init(parameters)
    assert updates_done(state) == 0
    _, state = optimizer.update(parameters, state, parameters)
    assert updates_done(state) == 1
    assert updates_done(optax.sgd(0.1).init(parameters)) is None


def test_first_update_by_hand():
    """Adam's first step is -rate * sign(g); decay adds -rate * 0.5 * w on matrices only."""
    optimizer = AdamW(
        learning_rate=0.1,
        schedule=Schedule.CONSTANT,
        warmup_steps=0,
        weight_decay=0.5,
        head_weight_decay=3.0,
        clip_norm=0.0,
    )
    axes = {"w": ("embed", "mlp"), "scale": ("norm",), "head": ("embed", "classes")}
    parameters = {"w": jnp.full((2, 2), 2.0), "scale": jnp.ones(2), "head": jnp.full((2, 2), 2.0)}
    gradients = {"w": jnp.full((2, 2), 3.0), "scale": jnp.full(2, -7.0), "head": jnp.ones((2, 2))}
    transformation = optimizer.build(10, axes)
    updates, _ = transformation.update(gradients, transformation.init(parameters), parameters)
    np.testing.assert_allclose(updates["w"], -0.1 * (1 + 0.5 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(updates["scale"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["head"], -0.1 * (1 + 3.0 * 2.0), rtol=1e-5)


def test_momentum_adds_up_gradients():
    transformation = SGD(learning_rate=0.5, momentum=0.9).build(10, {"w": ("embed", "mlp")})
    gradients = {"w": jnp.ones((1, 2))}
    _, state = transformation.update(gradients, transformation.init(gradients), gradients)
    updates, _ = transformation.update(gradients, state, gradients)
    np.testing.assert_allclose(updates["w"], -0.5 * 1.9, rtol=1e-6)


@pytest.mark.parametrize(
    ("excludes_experts", "factor"),
    [(False, 1 / 13), (True, 1 / 5)],
)
def test_gradients_are_clipped_by_their_global_norm(excludes_experts, factor):
    optimizer = SGD(learning_rate=1.0, clip_norm=1.0, clip_excludes_experts=excludes_experts)
    axes = {"w": ("embed", "mlp"), "e": ("experts", "expert_embed", "mlp")}
    gradients = {"w": jnp.array([[3.0, 4.0]]), "e": jnp.array([[[0.0, 12.0]]])}
    transformation = optimizer.build(10, axes)
    updates, _ = transformation.update(gradients, transformation.init(gradients), gradients)
    np.testing.assert_allclose(updates["w"], -factor * gradients["w"], rtol=1e-6)
    np.testing.assert_allclose(updates["e"], -factor * gradients["e"], rtol=1e-6)


def updates_of(transformation, parameters, steps=3):
    """Updates of the last of some steps with other gradients in each."""
    state = transformation.init(parameters)
    update = jax.jit(transformation.update)
    for step in range(steps):
        shapes = {name: leaf.shape for name, leaf in parameters.items()}
        gradients = random_tree(step + 1, shapes)
        updates, state = update(gradients, state, parameters)
    return updates


def test_adafactor_treats_stacked_matrices_as_optax_does_each_alone():
    """Layers times experts are among the largest dimensions, which optax would factor."""
    optimizer = Adafactor(learning_rate=0.3, constant_steps=1, min_size_to_factor=5)
    parameters = random_tree(0, SHAPES)
    updates = updates_of(optimizer.build(10, STACKED), parameters)

    def alone(name, index, shape):
        theirs = optax.adafactor(optimizer.learning_rate_at(10), min_dim_size_to_factor=5)
        matrix = parameters[name][index].reshape(shape)
        state, update = theirs.init(matrix), jax.jit(theirs.update)
        for step in range(3):
            gradient = random_tree(step + 1, SHAPES)[name][index].reshape(shape)
            result, state = update(gradient, state, matrix)
        return result.reshape(updates[name][index].shape)

    for name, index, shape in [
        ("w", (1, 2), (6, 8)),
        ("qkv", (2, slice(None), 1), (6, 8)),
        ("scale", (1,), (6,)),
    ]:
        np.testing.assert_allclose(
            updates[name][index], alone(name, index, shape), rtol=2e-5, atol=1e-7
        )


def test_adafactor_without_its_extras_is_a_running_mean():
    """Shazeer 2017, appendix D: decay 1 - 1 / t is the mean of all squares; b2 bounds it."""
    optimizer = Adafactor(
        learning_rate=1.0,
        schedule=Schedule.CONSTANT,
        decay_exponent=1.0,
        clipping_threshold=0.0,
        scale_by_parameters=False,
    )
    parameters = {"scale": jnp.ones((1, 6))}
    gradients = [random_tree(step + 1, {"scale": (1, 6)})["scale"] for step in range(3)]
    axes = {"scale": ("layers", "norm")}
    updates = updates_of(optimizer.build(10, axes), parameters)
    moments = np.mean(np.square(gradients), axis=0)
    np.testing.assert_allclose(updates["scale"], -gradients[2] / np.sqrt(moments), rtol=1e-5)
    optimizer.b2 = 0.25
    updates = updates_of(optimizer.build(10, axes), parameters)
    first, second, third = np.square(gradients)
    moments = 0.0625 * first + 0.1875 * second + 0.75 * third
    np.testing.assert_allclose(updates["scale"], -gradients[2] / np.sqrt(moments), rtol=1e-5)


def test_factored_moments_are_split_as_their_parameters_and_change_nothing():
    """On data=2 x expert=4: rows of [layers, experts, d, f] over experts and d, columns not d."""
    optimizer = Adafactor(min_size_to_factor=4, b1=0.5, weight_decay=0.1)
    axes = STACKED | {"qkv": ("layers", "embed", "qkv", "heads", "head")}
    shapes = {"w": (2, 4, 4, 8), "qkv": (2, 8, 3, 2, 4), "scale": (2, 8)}
    parameters = random_tree(0, shapes)
    transformation = optimizer.build(10, axes)
    abstract = jax.eval_shape(lambda: parameters)
    abstract_model = AbstractModel(None, abstract, axes, {}, {})
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    shardings = state_shardings(abstract_model, transformation, mesh, fsdp_min_size=1)
    moments = optax.tree_utils.tree_get(shardings.optimizer, "rows")
    columns = optax.tree_utils.tree_get(shardings.optimizer, "columns")
    assert moments["w"].spec == PartitionSpec(None, "expert", "data", None)
    assert columns["w"].spec == PartitionSpec(None, "expert", None, "model")
    assert moments["qkv"].spec == PartitionSpec(None, ("data", "expert"), None, None, None)

    def two_steps(parameters):
        updates = updates_of(transformation, parameters, steps=2)
        return updates

    expected = jax.jit(two_steps)(parameters)
    on_mesh = jax.jit(two_steps, in_shardings=(shardings.parameters,))(parameters)
    for name in shapes:
        np.testing.assert_allclose(on_mesh[name], expected[name], rtol=2e-5, atol=1e-8)
