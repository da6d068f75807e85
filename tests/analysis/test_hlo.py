"""Reading compiled programs: hand-written lines in every notation, and real programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax.analysis.hlo import Array, Program, Trips, communicating_groups
from moe_jax.parallel.mesh import DATA, EXPERT, MODEL, TOKEN_AXES, MeshConfig, make_mesh

MESH = {"data": 2, "expert": 4, "model": 1}
ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ROWS),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, use_global_device_ids=true", COLUMNS),
        ("replica_groups={}, to_apply=%add", (tuple(range(8)),)),
        ("replica_groups=[2,4]<=[8]", ROWS),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", COLUMNS),
        ("replica_groups=mesh['data'=2,'expert'=4] {'expert'}", ROWS),
        ("replica_groups=mesh['data'=2,'expert'=4] {'data'}, dimensions={0}", COLUMNS),
        ("replica_groups=mesh['data'=2,'expert'=4] {'data','expert'}", (tuple(range(8)),)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ROWS),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", COLUMNS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ROWS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", COLUMNS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}", ROWS),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", ROWS),
    ],
)
def test_devices_that_talk_in_every_notation(written, groups):
    assert communicating_groups(f", channel_id=1, {written}", 8) == groups


def test_an_unknown_notation_is_an_error():
    with pytest.raises(ValueError, match=r"unknown notation.*replica_groups=V9"):
        communicating_groups("replica_groups=V9<8>", 8)


def program(body: str, rest: str = "") -> Program:
    lines = "\n".join(f"  {line}" for line in body.strip().splitlines())
    return Program(
        f"HloModule jit_f, is_scheduled=true, num_partitions=8\n{rest}\n"
        f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}\n}}\n"
    )


def test_asynchronous_and_combined_collectives_count_their_results_once():
    read = program(
        """
%p = f32[8]{0:T(256)} parameter(0)
%q = bf16[4,2]{1,0:T(8,128)(2,1)S(1)} parameter(1)
%g = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
%gd = f32[32]{0} all-gather-done(%g)
%both = ((f32[8]{0}, bf16[4,2]{1,0}), (f32[16]{0}, bf16[8,2]{1,0})) all-gather-start(%p, %q), replica_groups=[4,2]<=[2,4]T(1,0)
%r = (f32[8]{0}, /*index=1*/bf16[4,2]{1,0}) all-reduce-start(%p, %q), replica_groups={}, to_apply=%add
%c = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
%s = ((f32[8]{0}), f32[2]{0}, u32[]) reduce-scatter-start(%p), replica_groups=[2,4]<=[8], to_apply=%add
%t = (f32[2]{0}, f32[2]{0}, f32[2]{0}, f32[2]{0}) all-to-all(%a, %b, %c, %d), replica_groups=[2,4]<=[8]
%v = f32[64,8]{1,0} ragged-all-to-all(%p, %q, %i, %j, %k, %l), replica_groups={{0,1,2,3},{4,5,6,7}}
%w = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%wrapped
%wd = f32[8]{0} async-done(%w), calls=%wrapped
ROOT %alone = f32[8]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
""",
        "%wrapped (x: f32[8]) -> f32[8] {\n"
        "  ROOT %inner = f32[8]{0} all-to-all(%x), replica_groups=[2,4]<=[8], dimensions={0}\n}\n",
    )
    found = [(c.instruction, c.name, c.elements, c.bytes, c.axes(MESH)) for c in read.collectives()]
    assert found == [
        ("inner", "all-to-all", 8, 32, ("expert",)),
        ("g", "all-gather", 32, 128, ("expert",)),
        ("both", "all-gather", 32, 96, ("data",)),
        ("r", "all-reduce", 16, 48, ("data", "expert")),
        ("c", "collective-permute", 8, 32, ("expert",)),
        ("s", "reduce-scatter", 2, 8, ("expert",)),
        ("t", "all-to-all", 8, 32, ("expert",)),
        ("v", "ragged-all-to-all", 512, 2048, ("expert",)),
    ]
    assert all(c.trips == Trips(1, exact=True) for c in read.collectives())


def test_bytes_of_types():
    sizes = {"f32": 40, "bf16": 20, "pred": 10, "s4": 5, "f8e4m3fn": 10, "c64": 80, "token": 0}
    assert {name: Array(name, (2, 5)).bytes for name in sizes} == sizes


LOOP = """
%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %two = s32[] constant(2)
  %copy = s32[] copy(%i)
  %next = s32[] add(%i, %two)
  %y = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %y)
}
%condition (u: (s32[], f32[8])) -> pred[] {
  %u = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %stop = s32[] constant(11)
  ROOT %less = pred[] compare(%j, %stop), direction=LT
}
"""
ENTRY = """
%p = f32[8]{0} parameter(0)
%start = s32[] constant(1)
%initial = (s32[], f32[8]{0}) tuple(%start, %p)
ROOT %loop = (s32[], f32[8]{0}) while(%initial), condition=%condition, body=%body
"""


# As XLA for GPUs leaves it: two trips in one, and test and sum in fusions.
UNROLLED = """
%fused_test (k: s32[]) -> pred[] {
  %k = s32[] parameter(0)
  %stop = s32[] constant(11)
  ROOT %less = pred[] compare(%k, %stop), direction=LT
}
%fused_sum (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] constant(2)
  %c = s32[] add(%a, %b)
  ROOT %d = s32[] add(%c, %b)
}
%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %copy = s32[] copy(%i)
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %next = s32[] fusion(%copy), kind=kLoop, calls=%fused_sum
  %y = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %y)
}
%condition (u: (s32[], f32[8])) -> pred[] {
  %u = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  ROOT %end = pred[] fusion(%j), kind=kLoop, calls=%fused_test
}
"""


@pytest.mark.parametrize(
    ("entry", "loop", "trips"),
    [
        (ENTRY, LOOP, Trips(5, exact=True)),  # 1, 3, 5, 7, 9
        (ENTRY, LOOP.replace("add(%i,", "add(%copy,"), Trips(5, exact=True)),
        (ENTRY, UNROLLED, Trips(3, exact=True)),  # 1, 5, 9
        (ENTRY, UNROLLED.replace("add(%a, %b)", "add(%b, %b)"), Trips(1, exact=False)),
        (ENTRY.replace("s32[] constant(1)", "s32[] parameter(1)"), LOOP, Trips(1, exact=False)),
        (ENTRY, LOOP.replace("constant(11)", "parameter(2)"), Trips(1, exact=False)),
        (ENTRY, LOOP.replace("add(%i, %two)", "multiply(%i, %two)"), Trips(1, exact=False)),
        (
            ENTRY.rstrip() + ', backend_config={"known_trip_count":{"n":"7"}}',
            LOOP.replace("constant(11)", "parameter(2)"),
            Trips(7, exact=True),
        ),
    ],
)
def test_trips_of_loops_are_counted_or_said_to_be_unknown(entry, loop, trips):
    (collective,) = program(entry, loop).collectives()
    assert collective.trips == trips
    assert collective.trips.known == (trips.count if trips.exact else None)


@pytest.mark.parametrize(("written", "synchronous"), [("true", True), ("false", False)])
def test_a_program_for_gpus_says_which_collectives_it_waits_for(written, synchronous):
    entry = f"""
%p = f32[8]{{0}} parameter(0)
%g = (f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={{0}}, \
backend_config={{"collective_backend_config":{{"is_sync":{written},"is_pipelined":false}}}}
ROOT %d = f32[32]{{0}} all-gather-done(%g)
"""
    (collective,) = program(entry.replace("\\\n", "")).collectives()
    assert collective.synchronous == synchronous


def test_a_combined_collective_belongs_to_each_place_that_it_serves():
    entry = """
%p = f32[8]{0} parameter(0)
%a = (f32[8]{0}, f32[2]{0}) all-reduce(%p, %q), replica_groups={}, metadata={op_name="jit(f)/(block_0/dot:g(block_1)/vmap(a:b)/sum)"}
ROOT %b = (f32[8]{0}, f32[2]{0}) all-reduce(%p, %q), replica_groups={}, metadata={op_name="jit(f)/vmap()"}
"""
    first, second = program(entry).collectives()
    assert [(piece.op_name, piece.array.elements) for piece in first.pieces] == [
        ("jit(f)/block_0/dot", 8),
        ("jit(f)/g(block_1)/vmap(a:b)/sum", 2),
    ]
    assert [piece.op_name for piece in second.pieces] == ["jit(f)/vmap()"] * 2


def test_a_product_without_metadata_belongs_to_what_computes_with_it():
    fused = """
%fused (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    entry = """
%p = f32[4,8]{1,0} parameter(0)
%q = f32[8,2]{1,0} parameter(1)
%product = f32[4,2]{1,0} fusion(%p, %q), kind=kCustom, calls=%fused
%sent = f32[4,2]{1,0} all-to-all(%product), replica_groups={}, metadata={op_name="combine/all_to_all"}
ROOT %relu = f32[4,2]{1,0} maximum(%product, %p), metadata={op_name="experts/max"}
"""
    (product,) = program(entry, fused).matrix_products()
    assert (product.op_name, product.flops) == ("experts/max", 2 * 4 * 8 * 2)


def test_a_dilated_convolution_counts_only_what_meets_the_input():
    # A batch of 8 products of 256 x 64 by 64 x 32, as the TPU compiler writes it; and a window of 3
    # that hangs over both ends of 10 inputs.
    read = program(
        """
%p = bf16[8,256,64]{2,1,0} parameter(0)
%q = bf16[8,32,64]{2,1,0} parameter(1)
%batched = bf16[8,256,32]{2,1,0} convolution(%p, %q), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf
%x = f32[1,10,4]{2,1,0} parameter(2)
%k = f32[3,4,5]{2,1,0} parameter(3)
ROOT %same = f32[1,10,5]{2,1,0} convolution(%x, %k), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
"""
    )
    batched, same = read.matrix_products()
    assert batched.flops == 8 * 2 * 256 * 64 * 32
    assert same.flops == 2 * 4 * 5 * (3 * 10 - 2)


def test_cublas_calls_are_matrix_products():
    (product,) = program(
        """
%p = f32[4,8]{1,0} parameter(0)
%q = f32[8,2]{1,0} parameter(1)
ROOT %gemm = (f32[4,2]{1,0}, s8[128]{0}) custom-call(%p, %q), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
"""
    ).matrix_products()
    assert product.flops == 2 * 4 * 8 * 2


def test_nested_scans_of_a_real_program():
    """3 x 5 rounds over `expert`, 3 over `data`, and one reduction over both at the end."""

    def inner(x, w):
        with jax.named_scope("inside"):
            return jax.lax.psum(x @ w, EXPERT) * 0.1, None

    def outer(x, ws):
        x, _ = jax.lax.scan(inner, jax.lax.pcast(x, EXPERT, to="varying"), ws)
        return jax.lax.all_gather(x, DATA, axis=0, tiled=True)[:4], None

    def device(x, ws):
        for_all = jax.lax.scan(lambda x, w: outer(x, w), x, ws)[0]
        return jax.lax.psum(for_all, TOKEN_AXES)

    mesh = make_mesh(MeshConfig(2, 4, 1))
    spec = PartitionSpec(TOKEN_AXES)
    function = jax.shard_map(
        device, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip
    x, ws = np.ones((32, 16), np.float32), np.ones((3, 5, 16, 16), np.float32)
    read = Program(jax.jit(function).lower(x, ws).compile().as_text())
    collectives = {(c.name, c.axes(mesh.shape)): c for c in read.collectives()}
    assert len(collectives) == len(read.collectives()) == 3
    inside = collectives["all-reduce", (EXPERT,)]
    gather = collectives["all-gather", (DATA,)]
    last = collectives["all-reduce", (DATA, EXPERT)]
    assert (inside.bytes, inside.trips, inside.group_size) == (4 * 4 * 16, Trips(15, True), 4)
    assert (gather.bytes, gather.trips, gather.group_size) == (2 * 4 * 4 * 16, Trips(3, True), 2)
    assert (last.bytes, last.trips, last.group_size) == (4 * 4 * 16, Trips(1, True), 8)
    (product,) = read.matrix_products()
    assert (product.flops, product.trips) == (2 * 4 * 16 * 16, Trips(15, True))
    assert "/inside/" in product.op_name and "/inside/" in inside.pieces[0].op_name
    assert MODEL not in {axis for c in read.collectives() for axis in c.axes(mesh.shape)}


def test_a_loop_of_unknown_length_and_a_branch_of_a_real_program():
    def step(x):
        x = jax.lax.cond(x[0] > 1, lambda x: jnp.sin(x), lambda x: x @ jnp.ones((8, 8)), x)
        return jax.lax.while_loop(lambda x: x[0] < 1, lambda x: x @ jnp.eye(8), x)

    products = Program(jax.jit(step).lower(np.ones(8, np.float32)).compile().as_text())
    assert [p.trips.known for p in products.matrix_products()] == [None, None]


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program("HloModule nothing\n")
