"""The examples, as many steps as it takes to see them learn."""

import numpy as np

from examples import linen_model, nnx_model


def test_the_layer_learns_in_a_plain_nnx_model():
    errors = nnx_model.main(steps=60)
    assert errors[-1] < errors[0] / 10


def test_the_layer_learns_in_a_linen_model_and_its_bias_moves():
    errors, bias = linen_model.main(steps=60)
    assert errors[-1] < errors[0] / 10
    # Sixty steps of +-0.01, or 0 where an expert had exactly the mean load.
    assert np.abs(bias).max() <= 0.6 + 1e-6
    assert np.abs(bias).max() > 0
