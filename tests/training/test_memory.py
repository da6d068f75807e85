"""A state that cannot fit is refused before any of it is made."""

import jax
import pytest

from moe_jax.errors import UserError
from moe_jax.training import memory
from moe_jax.training.run import Run
from tests.tiny import tiny_config


def test_a_state_that_cannot_fit_is_refused():
    config = tiny_config("unread")
    config.model.width = config.model.mlp_width = 2**19
    run = Run.build(config)
    with pytest.raises(
        UserError, match=r"take [\d,.]+ GB of this machine, which has [\d.]+ GB; make"
    ):
        run.initial_state()


def test_every_device_of_a_cpu_counts(monkeypatch):
    run = Run.build(tiny_config("unread"))
    state = jax.tree.leaves(run.abstract_arguments()[0])
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in state)  # Most of it is replicated.
    monkeypatch.setattr(memory, "memory_of", lambda device: whole)
    with pytest.raises(UserError):
        run.initial_state()
