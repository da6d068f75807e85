import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training.optimizers import AdamW, Schedule, weight_decay_mask


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        # Peak 1 after 10 steps; half-way down a cosine to 0.1 is 0.55.
        (Schedule.COSINE, {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}),
        # sqrt(10 / step).
        (Schedule.INVERSE_SQRT, {0: 0.0, 5: 0.5, 10: 1.0, 40: 0.5, 1000: 0.1}),
    ],
)
def test_schedules(schedule, at):
    optimizer = AdamW(learning_rate=1.0, schedule=schedule, warmup_steps=10, final_fraction=0.1)
    rate = optimizer.learning_rate_at(110)
    for step, expected in at.items():
        assert float(rate(step)) == pytest.approx(expected, abs=1e-6), step


def test_only_matrices_decay():
    axes = {
        "norm": ("layers", "norm"),
        "table": ("vocabulary", "embed"),
        "w": ("layers", "experts", "expert_embed", "mlp"),
        "router": ("router", "router"),
    }
    assert weight_decay_mask(axes) == {
        "norm": False, "table": False, "w": True, "router": True,
    }  # fmt: skip


def test_first_update_by_hand():
    """Adam's first step is -rate * sign(g); decay adds -rate * 0.5 * w on matrices only."""
    optimizer = AdamW(
        learning_rate=0.1, warmup_steps=1, final_fraction=1.0, weight_decay=0.5, clip_norm=0.0
    )
    axes = {"w": ("embed", "mlp"), "scale": ("norm",)}
    parameters = {"w": jnp.full((2, 2), 2.0), "scale": jnp.ones(2)}
    gradients = {"w": jnp.full((2, 2), 3.0), "scale": jnp.full(2, -7.0)}
    transformation = optimizer.build(10, axes)
    state = transformation.init(parameters)
    # The schedule is 0 at the first step, so the second shows the rate.
    _, state = transformation.update(gradients, state, parameters)
    updates, _ = transformation.update(gradients, state, parameters)
    np.testing.assert_allclose(updates["w"], -0.1 * (1 + 0.5 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(updates["scale"], 0.1, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    """Adam does not see a common factor, so clipping shows in its second moment."""
    parameters = {"w": jnp.zeros((1, 2))}
    transformation = AdamW(clip_norm=1.0, b2=0.0).build(10, {"w": ("embed", "mlp")})
    _, state = transformation.update(
        {"w": jnp.array([[3.0, 4.0]])}, transformation.init(parameters), parameters
    )
    second = [x for x in jax.tree.leaves(state) if getattr(x, "shape", None) == (1, 2)][1]
    np.testing.assert_allclose(second, [[0.36, 0.64]], rtol=1e-5)
