"""Mixture-of-Experts papers in JAX and Flax: `import moe_jax as moe`.

The names below are the front door, loaded when they are first used; docs/api.md lists them.
"""

from etils import epy as _epy

__version__ = "0.2.0"

with _epy.lazy_api_imports(globals()):
    # The layer.
    from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
    from moe_jax.layers.expert_form import ModuleForm
    from moe_jax.layers.feed_forward import FeedForwardForm
    from moe_jax.layers.mode import Mode

    # Routers, and what a router of one's own is made of.
    from moe_jax.routing.router import Mean, Router, RouterInputs
    from moe_jax.routing.balanced import BASE
    from moe_jax.routing.capacity import Capacity, CapacityRule
    from moe_jax.routing.deepseek import DeepSeekV3
    from moe_jax.routing.expert_choice import ExpertChoice
    from moe_jax.routing.fixed import HashRouter
    from moe_jax.routing.losses import Losses
    from moe_jax.routing.noisy_top_k import NoisyTopK
    from moe_jax.routing.soft import SoftMoE
    from moe_jax.routing.token_choice import Choice, GShard, LinearRouter, Switch, TopK, VMoE

    # How tokens reach their experts.
    from moe_jax.dispatch.dropless import Dropless
    from moe_jax.dispatch.gather import Gather

    # A run: its config, and what is done with it.
    from moe_jax.component import Component
    from moe_jax.data.pipelines import TextData
    from moe_jax.errors import UserError
    from moe_jax.models.decoder_lm import DecoderLMConfig
    from moe_jax.parallel.mesh import MeshConfig, make_mesh
    from moe_jax.training.experiment import Experiment
    from moe_jax.training.loop import train
    from moe_jax.training.optimizers import AdamW, Optimizer
    from moe_jax.training.trained import Trained, evaluate, generate, load
