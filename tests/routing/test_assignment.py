import jax.numpy as jnp
import numpy as np

from moe_jax.routing.assignment import Mean


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
