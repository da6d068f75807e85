"""Kernels in the text of programs for TPUs and GPUs, and conditionals that XLA has decided."""

import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info

from moe_jax.analysis.hlo import Program, Trips

GMM = (
    '%gmm.1 = bf16[512,64]{1,0:T(8,128)(2,1)} custom-call(%rows, %matrices), custom_call_target='
    '"tpu_custom_call", metadata={op_name="jit(f)/experts/jit(gmm)/pallas_call" stack_frame_id=7}, '
    'backend_config={"custom_call_config":{"body":"TUzvUg(==","cost_estimate":{"flops":"8388608",'
    '"transcendentals":"0","bytes_accessed":"262144","remote_bytes_transferred":"0"}}}'
)  # fmt: skip


def splash(kind: str, integers: str, rows: int = 512, columns: int = 256) -> str:
    """As libtpu 0.0.42 prints it: with line breaks in the metadata."""
    suffix = "" if kind == "fwd" else f"_{kind}"
    sizes = rf"{{\"block_q{suffix}\": {rows}, \"block_kv{suffix}\": {columns}, \"q_layout\": 1}}"
    name = f"splash_mha_{kind}_segmented_residuals"
    return (
        f"%{name}.3 = bf16[3,8,2048,64]{{3,2,1,0}} "
        f"custom-call(%next, %next, %q, %k, %v, {integers}), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        f'"xprof_metadata":"{sizes}"\n'
        f'}}}}, metadata={{op_name="jit(f)/attention/{name}/pallas_call"}}, backend_config={{"a":1}}'
    )


def program(line: str) -> Program:
    return Program(
        f"""HloModule jit_f, is_scheduled=true

ENTRY %main (p: f32[8]) -> f32[8] {{
  %rows = bf16[512,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %matrices = bf16[4,128,64]{{2,1,0:T(8,128)(2,1)}} parameter(1)
  %next = s8[1,4,8]{{2,1,0:T(8,128)(4,1)S(1)}} parameter(2)
  %q = bf16[3,8,2048,128]{{3,2,1,0:T(8,128)(2,1)}} parameter(3)
  %k = bf16[3,2,2048,128]{{3,2,1,0:T(8,128)(2,1)}} parameter(4)
  %v = bf16[3,2,2048,64]{{3,2,1,0:T(8,128)(2,1)}} parameter(5)
  %s = s32[2048,128]{{1,0:T(8,128)}} parameter(6)
  ROOT {line}
}}
"""
    )


def test_a_kernel_costs_what_it_says():
    (kernel,) = program(GMM).kernels()
    assert kernel.op_name == "jit(f)/experts/jit(gmm)/pallas_call"
    # 2 * 512 * 128 * 64.
    assert (kernel.flops, kernel.bytes, kernel.trips) == (8388608, 262144, Trips(1, True))
    assert not program(GMM).matrix_products()


# Of 4 x 8 blocks of 512 x 256 scores, rows 0 to 3 read up to 2, 4, 6 and 8 of them: 20.
CAUSAL = 20 * 512 * 256


@pytest.mark.parametrize(
    ("kind", "integers", "flops"),
    [
        # 3 rows of 8 heads; widths 128 of queries and keys and 64 of values.
        ("fwd", "%s", 2 * 24 * CAUSAL * (128 + 64)),
        ("dq", "%s", 2 * 24 * CAUSAL * (128 + 64 + 128)),
        ("dkv", "%s", 2 * 24 * CAUSAL * (128 + 64 + 64 + 128)),
        # With segments of queries and keys before the positions.
        ("fwd", "%s, %s, %s", 2 * 24 * CAUSAL * (128 + 64)),
        # With segments alone.
        ("fwd", "%s, %s", 2 * 24 * 2048 * 2048 * (128 + 64)),
    ],
)
def test_splash_attention_computes_the_blocks_that_are_not_masked(kind, integers, flops):
    (kernel,) = program(splash(kind, integers)).kernels()
    assert kernel.flops == flops
    # Queries, keys, values and the result, then integers; the schedule lies in VMEM.
    elements = 3 * 2048 * (8 * 128 + 2 * 128 + 2 * 64 + 8 * 64)
    assert kernel.bytes == 2 * elements + integers.count("%s") * 4 * 2048 * 128


@pytest.mark.parametrize(("rows", "columns"), [(512, 256), (128, 512), (256, 256)])
def test_the_causal_schedule_of_splash_attention_is_the_one_assumed(rows, columns):
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((2048, 2048))])
    schedule, _ = splash_attention_mask_info.process_mask(mask, (rows, columns))
    blocks = np.count_nonzero(schedule.block_mask)
    (kernel,) = program(splash("fwd", "%s", rows, columns)).kernels()
    assert kernel.flops == 2 * 24 * blocks * rows * columns * (128 + 64)


def on_gpu(line: str) -> Program:
    return Program(
        f"""HloModule jit_f, is_scheduled=true

ENTRY %main (p: f32[8]) -> f32[8] {{
  %sizes = s32[4]{{0}} parameter(0)
  %rows = bf16[512,128]{{1,0}} parameter(1)
  %turned = bf16[128,512]{{1,0}} parameter(2)
  %matrices = bf16[4,128,64]{{2,1,0}} parameter(3)
  %gradient = bf16[512,64]{{1,0}} parameter(4)
  %q = bf16[2,384,8,128]{{3,2,1,0}} parameter(5)
  %k = bf16[2,384,2,128]{{3,2,1,0}} parameter(6)
  %v = bf16[2,384,2,64]{{3,2,1,0}} parameter(7)
  ROOT {line}
}}
"""
    )


@pytest.mark.parametrize(
    "call",
    [
        # By Mosaic with its integers first, by Triton with them last, as tokamax 0.0.12 has them.
        'bf16[512,64]{1,0} custom-call(%sizes, %rows, %matrices), custom_call_target="mosaic_gpu_v2"',
        'bf16[512,64]{1,0} custom-call(%rows, %matrices, %sizes), '
        'custom_call_target="__gpu$xla.gpu.triton"',
        'bf16[4,128,64]{2,1,0} custom-call(%sizes, %turned, %gradient), '
        'custom_call_target="mosaic_gpu_v2"',
        'bf16[4,128,64]{2,1,0} custom-call(%rows, %gradient, %sizes), '
        'custom_call_target="__gpu$xla.gpu.triton"',
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "op_name",
    [
        r"jit(f)/tokamax:{\"op\":\"tokamax._src.ops.ragged_dot.x\"}",
        # By tokamax 0.0.17.
        "jit(f)/ragged_dot_sm90/mpmd_map",
        "jit(f)/ragged_contracting_dim_dot_sm90/mpmd_map",
    ],
)
def test_a_grouped_product_on_a_gpu_costs_what_its_shapes_say(call, op_name):
    name = f'metadata={{op_name="{op_name}"}}'
    (kernel,) = on_gpu(f"%mine = {call}, {name}").kernels()
    assert kernel.flops == 2 * 512 * 128 * 64
    assert kernel.bytes == 2 * (512 * 128 + 4 * 128 * 64 + 512 * 64) + 4 * 4
    (other,) = on_gpu(f"%mine = {call}").kernels()
    assert other.flops == 0, "nobody knows what another kernel does"


@pytest.mark.parametrize(
    ("kind", "mask", "products"),
    [
        # Of 3 x 3 blocks of 128 x 128 scores 6 are not wholly masked; widths 128, and 64 of values.
        ("", "CAUSAL", 6 * (128 + 64)),
        ("", "PADDING_CAUSAL", 6 * (128 + 64)),
        ("", "NO_MASK", 9 * (128 + 64)),
        ("Backward", "CAUSAL", 6 * (3 * 128 + 2 * 64)),
    ],
)
def test_cudnns_attention_costs_what_its_shapes_say(kind, mask, products):
    (kernel,) = on_gpu(
        "%fmha = (bf16[2,8,384,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %v), "
        f'custom_call_target="__cudnn$fmhaSoftmax{kind}", backend_config='
        f'{{"cudnn_fmha_backend_config": {{"mask_type": "{mask}"}}}}'
    ).kernels()
    assert kernel.flops == 2 * 2 * 8 * products * 128 * 128


def test_another_kernel_without_an_estimate_has_no_flops():
    line = '%mine = bf16[512,64]{1,0} custom-call(%rows), custom_call_target="tpu_custom_call"'
    (kernel,) = program(line).kernels()
    assert (kernel.flops, kernel.bytes) == (0, 2 * 512 * 128 + 2 * 512 * 64)


@pytest.mark.parametrize(("branches", "exact"), [("%sent", True), ("%sent, %kept", False)])
def test_a_conditional_with_one_branch_takes_it(branches, exact):
    read = Program(
        f"""HloModule jit_f, num_partitions=8

%sent (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%x), replica_groups={{}}, to_apply=%add
}}
%kept (y: f32[8]) -> f32[8] {{
  ROOT %y = f32[8]{{0}} parameter(0)
}}
ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %c = s32[] constant(0)
  ROOT %out = f32[8]{{0}} conditional(%c, %p), branch_computations={{{branches}}}
}}
"""
    )
    (collective,) = read.collectives()
    assert collective.trips == Trips(1, exact)
    assert read.memory_bytes().exact == exact
