import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing.router import Mean, Router, Routing, TokenAssignment
from tests.routing.inputs import group, vectors


def test_mean_of_masked_rows():
    values = jnp.array([[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]])
    mean = Mean.of(values, jnp.array([True, True, False]))
    np.testing.assert_allclose(mean.value(), [2.0, 4.0])


def test_means_add_up_over_groups_of_unequal_size():
    values = jnp.array([1.0, 2.0, 6.0])
    parts = [Mean.of(values[:1], jnp.ones(1, bool)), Mean.of(values[1:], jnp.ones(2, bool))]
    whole = Mean(sum(p.total for p in parts), sum(p.count for p in parts))
    assert whole.value() == 3.0


def test_mean_of_nothing_is_zero():
    assert Mean.of(jnp.ones(3), jnp.zeros(3, bool)).value() == 0


def test_mean_of_booleans_counts_in_float32():
    mean = Mean.of(jnp.ones(3, jnp.bfloat16), jnp.ones(3, bool))
    assert mean.total.dtype == mean.count.dtype == jnp.float32


def test_numbers_of_groups_weigh_alike_and_groups_of_padding_nothing():
    numbers = jnp.array([2.0, 4.0, 100.0])
    masks = jnp.array([[True, True], [False, True], [False, False]])
    means = jax.vmap(Mean.of_group)(numbers, masks)
    np.testing.assert_array_equal(means.total, [2, 4, 0])
    np.testing.assert_array_equal(means.count, [1, 1, 0])
    assert Mean(means.total.sum(), means.count.sum()).value() == 3


def test_a_group_of_padding_stops_the_gradient_of_its_number():
    def total(value):
        return Mean.of_group(value, jnp.zeros(2, bool)).value()

    assert jax.grad(total)(5.0) == 0


class FirstExpert(Router):
    """The smallest router that the contract allows: every token goes to expert 0."""

    def route(self, parameters, inputs, num_experts, capacity):
        count = len(inputs.mask)
        experts = jnp.zeros((count, 1), jnp.int32)
        slots = jnp.minimum(jnp.arange(count)[:, None], capacity)
        assignment = TokenAssignment(experts, slots, jnp.ones((count, 1)), capacity)
        return Routing(assignment, jax.nn.one_hot(experts[:, 0], num_experts), {}, {})


def test_a_router_needs_no_more_than_route():
    router = FirstExpert()
    router.validate(4)
    assert (router.choices, router.leak, router.loss_coefficients) == (1, None, {})
    assert router.init(jax.random.key(0), 8, 4) == router.init_state(4) == {}
    state = {"bias": jnp.ones(4)}
    assert router.next_state(state, {}) is state
    # Through jit and vmap over two groups, as the layer calls it.
    groups = jax.tree.map(lambda *leaves: jnp.stack(leaves), group(vectors(3)), group(vectors(3)))
    routing = jax.jit(jax.vmap(lambda one: router.route({}, one, 4, 2)))(groups)
    np.testing.assert_array_equal(routing.assignment.position_in_expert[..., 0], [[0, 1, 2]] * 2)
    assert routing.assignment.capacity == 2
