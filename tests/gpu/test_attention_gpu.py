"""Attention compiled for GPUs. Run by `make test-gpu`."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from moe_jax.analysis.hlo import Program
from moe_jax.layers.attention_kernels import attend
from moe_jax.parallel.mesh import MODEL, TOKEN_AXES
from tests.gpu.programs import CUDNN, CUDNN_BACKWARD, array, compiled, gpus, kernels

pytestmark = pytest.mark.gpu

BATCH, LENGTH, WIDTH = 8, 1024, 128


@pytest.mark.parametrize(
    ("heads", "kv_heads", "causal", "pairs"),
    [
        # Of 8 x 8 blocks of 128 x 128 scores 36 are not wholly masked.
        pytest.param(8, 8, True, 36 * 128 * 128, id="causal"),
        pytest.param(8, 2, True, 36 * 128 * 128, id="grouped queries"),
        pytest.param(8, 8, False, LENGTH * LENGTH, id="all keys"),
    ],
)
def test_attention_and_its_gradient_are_cudnns(heads, kv_heads, causal, pairs):
    """Rows over `data` and `expert`, heads over `model`; no device has scores, or others' rows."""
    mesh = gpus("h100:1x8", data=2, expert=2, model=2)
    split = PartitionSpec(TOKEN_AXES, None, MODEL)

    def of_heads(count):
        return array(mesh, jnp.bfloat16, BATCH, LENGTH, count, WIDTH, spec=split)

    def loss(query, key, value):
        return (attend(query, key, value, causal=causal).astype(jnp.float32) ** 2).sum()

    step = jax.value_and_grad(loss, argnums=(0, 1, 2))
    text = compiled(mesh, step, *map(of_heads, (heads, kv_heads, kv_heads))).as_text() or ""
    assert kernels(text) == [CUDNN, CUDNN_BACKWARD]
    assert not re.findall(rf"\w+\[\d[\d,]*,{LENGTH},{LENGTH}\]", text), "scores are held"
    assert not re.findall(r"all-gather|all-to-all|collective-permute", text)
    # On a device 2 rows and 4 heads. Backward, the scores are computed once more: 5 products for 2.
    product = 2 * 2 * 4 * pairs * WIDTH
    forward, backward = Program(text).kernels()
    assert (forward.flops, backward.flops) == (2 * product, 5 * product)
