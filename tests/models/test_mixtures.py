"""Trees of gates and experts against loops over cases and experts in NumPy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from moe_jax.errors import UserError
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.mixtures import tree
from moe_jax.models.mixtures.mixture import Link, MixtureConfig, MixtureOutput
from moe_jax.models.mixtures.objectives import Objective, errors
from moe_jax.models.mixtures.tree import Tree

BRANCHES = (2, 3)


@pytest.fixture(scope="module")
def numbers() -> Tree:
    """Two inputs, two outputs, six experts in two levels, deviations other than 1."""
    random = np.random.default_rng(0)
    return Tree(
        tuple(
            jnp.asarray(random.normal(size=(nodes, 3, branches)), jnp.float32)
            for nodes, branches in zip((1, 2), BRANCHES, strict=True)
        ),
        jnp.asarray(random.normal(size=(6, 3, 2)), jnp.float32),
        jnp.asarray(random.normal(size=(6, 2)) / 3, jnp.float32),
    )


@pytest.fixture(scope="module")
def cases() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return random.normal(size=(7, 2)), random.normal(size=(7, 2))


def loop(numbers: Tree, x: np.ndarray, y: np.ndarray, link=lambda z: z):
    """For one case: proportion, output and density of each expert, by walking down the tree."""
    ones = np.append(x, 1.0)

    def softmax(scores):
        return np.exp(scores) / np.exp(scores).sum()

    top = softmax(ones @ np.asarray(numbers.gates[0][0]))
    proportions, outputs, densities = [], [], []
    for i, j in itertools.product(*map(range, BRANCHES)):
        expert = BRANCHES[1] * i + j
        below = softmax(ones @ np.asarray(numbers.gates[1][i]))
        proportions.append(top[i] * below[j])
        outputs.append(link(ones @ np.asarray(numbers.experts[expert])))
        deviation = np.exp(np.asarray(numbers.log_deviations[expert]))
        factors = np.exp(-(((y - outputs[-1]) / deviation) ** 2) / 2) / deviation
        densities.append(np.prod(factors))
    return np.array(proportions), np.array(outputs), np.array(densities)


def test_likelihood_and_prediction_are_the_loops(numbers, cases):
    inputs, targets = cases
    logs, predictions = [], []
    for x, y in zip(inputs, targets, strict=True):
        proportions, outputs, densities = loop(numbers, x, y)
        assert proportions.sum() == pytest.approx(1)
        logs.append(math.log(proportions @ densities / (2 * math.pi)))
        predictions.append(proportions @ outputs)
    x, y = (jnp.asarray(values, jnp.float32) for values in cases)
    np.testing.assert_allclose(
        jax.jit(tree.log_likelihood)(numbers, x, y), np.mean(logs), rtol=1e-5
    )
    np.testing.assert_allclose(jax.jit(tree.predict)(numbers, x), predictions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", Objective)
def test_errors_are_the_papers(numbers, cases, objective):
    abstract_model = AbstractModel.of(
        MixtureConfig(2, 2, BRANCHES, link=Link.LOGISTIC, deviations=False)
    )
    unit = Tree(numbers.gates, numbers.experts, jnp.zeros((6, 2)))
    parameters = {"gates": dict(enumerate(unit.gates)), "experts": unit.experts}
    wanted = []
    for x, y in zip(*cases, strict=True):
        p, o, _ = loop(unit, x, y, link=lambda z: 1 / (1 + np.exp(-z)))
        squared = ((y - o) ** 2).sum(axis=1)
        wanted.append(
            {
                Objective.COOPERATIVE: ((y - p @ o) ** 2).sum(),
                Objective.EXPECTED: p @ squared,
                Objective.COMPETITIVE: -np.log(p @ np.exp(-squared / 2)),
            }[objective]
        )
    inputs, targets = (jnp.asarray(values, jnp.float32) for values in cases)
    found = jax.jit(lambda x, y: errors(objective, abstract_model.merge(parameters)(x), y))(
        inputs, targets
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_gradient_of_the_likelihood_is_the_finite_difference(numbers, cases):
    with jax.enable_x64(True):
        x, y = (jnp.asarray(values, jnp.float64) for values in cases)
        numbers = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), numbers)
        flat, rebuild = ravel_pytree(numbers)
        likelihood = jax.jit(lambda flat: tree.log_likelihood(rebuild(flat), x, y))
        gradient = np.asarray(jax.jit(jax.grad(likelihood))(flat))
        step = 1e-6
        differences = [
            (likelihood(flat.at[i].add(step)) - likelihood(flat.at[i].add(-step))) / (2 * step)
            for i in range(len(flat))
        ]
    assert np.abs(gradient).min() > 0
    np.testing.assert_allclose(gradient, differences, atol=1e-7)


def test_competition_favors_the_expert_that_is_nearest():
    """Jacobs et al. section 1: the gradient of 1.3 is that of 1.2 with posteriors for p."""
    outputs = jnp.array([[[0.0], [2.0]]])
    target = jnp.array([[0.4]])
    logs = jnp.log(jnp.array([[0.5, 0.5]]))

    def gradient(objective):
        def error(outputs):
            return errors(objective, MixtureOutput(logs, outputs, jnp.zeros((2, 1))), target).sum()

        return jax.jit(jax.grad(error))(outputs)[0, :, 0]

    difference = np.array([0.0 - 0.4, 2.0 - 0.4])
    np.testing.assert_allclose(gradient(Objective.EXPECTED), 2 * 0.5 * difference, rtol=1e-6)
    density = np.exp(-(difference**2) / 2)
    np.testing.assert_allclose(
        gradient(Objective.COMPETITIVE), density / density.sum() * difference, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": ()}, "model.branches is ()"),
        ({"branches": (2, 0)}, "model.branches is (2, 0)"),
        ({"num_inputs": 0}, "model.num_inputs is 0"),
        ({"init_range": 0.0}, "model.init_range is 0.0"),
    ],
)
def test_impossible_mixtures_are_refused(changes, message):
    with pytest.raises(UserError) as raised:
        MixtureConfig(**changes).validate()
    assert message in str(raised.value)
