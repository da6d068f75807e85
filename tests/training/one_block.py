"""A config for runs of several processes, each of which compiles its step anew."""

from moe_jax.parallel.mesh import MeshConfig
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Evaluation, Experiment
from tests.tiny import tiny_config


def get_config() -> Experiment:
    """One MoE block with an expert on each of eight devices, and little to compile.

    Nothing is cached for any process but the first.
    """
    config = tiny_config("")
    config.steps = 9
    config.model.num_layers = config.model.moe_every = 1
    config.model.num_experts, config.model.dropout = 8, 0.0
    config.model.moe.router, config.model.moe.expert_dropout = TopK(), 0.0
    config.mesh = MeshConfig(expert=8)
    config.logging.every, config.checkpoint.every, config.checkpoint.keep = 1, 3, 9
    config.evaluation = Evaluation(every=0, batches=1)
    return config
