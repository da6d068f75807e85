"""experiments/profile_step.py as a user runs it, and what it attributes to which part."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.quickstart import get_config
from moe_jax.analysis.hlo import Program
from moe_jax.analysis.profile import Flops, Place, flops_by_part, parts_of, shared_time
from tests.scripts import script

LAYERS, WIDTH, MLP_WIDTH, LENGTH, BATCH, GROUP = 2, 32, 64, 32, 16, 64
SMALL = [
    "--config=configs/quickstart.py",
    f"--config.model.num_layers={LAYERS}",
    f"--config.model.width={WIDTH}",
    "--config.model.head_width=16",
    f"--config.model.mlp_width={MLP_WIDTH}",
    "--config.model.unroll=false",
    f"--config.data.sequence_length={LENGTH}",
    f"--config.data.batch_size={BATCH}",
    f"--config.model.moe.group_size={GROUP}",
    "--config.mesh.data=2",
    "--config.mesh.expert=4",
]
EXPERTS = get_config().model.num_experts
CAPACITY = get_config().model.moe.capacity.expert_capacity(GROUP, 1, EXPERTS, train=True)
# On one of the 8 devices.
SLOTS = BATCH * LENGTH // GROUP // 8 * EXPERTS * CAPACITY


@pytest.fixture(scope="module")
def profiled(data_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("profile")
    flags = [*SMALL, f"--config.data.data_dir={data_dir}", f"--output={output}", "--steps=2"]
    done = script("profile_step", *flags, "--format=json")
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout)


def test_an_expert_layer_exchanges_its_slots_four_times(profiled):
    _, result = profiled
    in_blocks = [row for row in result["collectives"] if row["blocks"]]
    (exchange,) = (row for row in in_blocks if row["collective"] == "all-to-all")
    assert exchange["blocks"] == list(range(LAYERS))
    assert (exchange["runs"], exchange["bytes"]) == (4, 4 * SLOTS * WIDTH * 4)
    assert exchange["axes"] == ["expert"] and exchange["exact"]
    assert exchange["parts"] == ["combine", "dispatch"]


def test_sharded_experts_are_gathered_and_their_gradients_scattered(profiled):
    _, result = profiled
    weights = 2 * EXPERTS // 4 * WIDTH * MLP_WIDTH * 4  # Those of the experts of one device.
    by_kind = {row["collective"]: row for row in result["collectives"] if row["blocks"]}
    assert (by_kind["all-gather"]["bytes"], by_kind["all-gather"]["axes"]) == (weights, ["data"])
    assert by_kind["reduce-scatter"]["bytes"] == weights / 2
    assert by_kind["all-gather"]["parts"] == by_kind["reduce-scatter"]["parts"] == ["experts"]


def test_flops_are_those_of_the_accounting(profiled):
    _, result = profiled
    flops = result["flops"]
    forward = sum(both["forward"] for both in flops.values())
    assert forward == pytest.approx(result["accounting_flops_forward"])
    assert sum(both["backward"] for both in flops.values()) == pytest.approx(2 * forward)
    assert flops["experts"]["forward"] == LAYERS * SLOTS * 4 * WIDTH * MLP_WIDTH
    assert all(both["exact"] for both in flops.values())


def test_time_is_divided_among_the_parts_and_what_is_left(profiled):
    _, result = profiled
    seconds = result["seconds"]
    for part in ("attention", "router", "dispatch", "experts", "combine", "logits", "optimizer"):
        assert seconds[part]["forward"] > 0, part
    assert seconds["experts"]["backward"] > 0
    both = sum(part["forward"] + part["backward"] for part in seconds.values())
    assert both + result["unattributed_seconds"] == pytest.approx(result["traced_step_seconds"])
    assert 0.2 * result["traced_step_seconds"] < both < result["traced_step_seconds"]
    waiting = result["collective_seconds"]["dispatch"]
    assert 0 < waiting["forward"] < seconds["dispatch"]["forward"]


def test_the_trace_and_the_picture_are_written(profiled):
    output, result = profiled
    assert (output / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "profile.json").read_text()) == result
    (trace,) = output.glob("plugins/profile/*/perfetto_trace.json.gz")
    assert result["trace"] == str(trace.parent)
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert "train" in names and any(name.startswith("all-to-all") for name in names)


@pytest.mark.parametrize(
    ("op_name", "place", "layer"),
    [
        (
            "jit(step)/transpose(jvp(loss))/blocks_4_to_8/while/body/closed_call/block_1_of_2/moe/"
            "shard_map/dispatch/all_to_all",
            Place((5, 7), "dispatch", backward=True),
            "blocks 5, 7",
        ),
        (
            "jit(step)/jvp(loss)/blocks_0_to_1/block_0_of_1/attention/bld,dnHh->nblHh/dot_general",
            Place((0,), "attention", backward=False),
            "block 0",
        ),
        (
            "jit(step)/jvp(loss)/blocks_0_to_1/block_0_of_1/add",
            Place((0,), "norms and residuals", backward=False),
            "block 0",
        ),
        (
            "jit(step)/jvp(loss)/blocks_0_to_4/while/body/dynamic_slice",
            Place((), "scan", backward=False),
            "scan",
        ),
        ("jit(step)/transpose(jvp(loss))/sub", Place((), "loss", backward=True), "loss"),
        ("jit(step)/optimizer/mul", Place((), "optimizer", backward=False), "optimizer"),
        ("", Place((), "other", backward=False), "other"),
    ],
)
def test_places(op_name, place, layer):
    assert Place.of(op_name) == place
    assert place.layer == layer


def test_flops_within_a_conditional_are_not_exact():
    def step(x):
        with jax.named_scope("experts"):
            x = jax.lax.cond(x[0] > 1, jnp.sin, lambda x: x @ jnp.ones((8, 8)), x)
        with jax.named_scope("logits"):
            return x @ jnp.eye(8)

    program = Program(jax.jit(step).lower(np.ones(8, np.float32)).compile().as_text())
    assert flops_by_part(program) == {
        "experts": Flops(128, 0, exact=False),
        "logits": Flops(128, 0, exact=True),
    }


def test_a_part_with_flops_but_without_time_keeps_its_place():
    assert parts_of({"loss": 1}, {"other": 2, "attention": 3, "loss": 4}) == [
        "attention", "loss", "other",
    ]  # fmt: skip


def test_instructions_at_the_same_time_share_it():
    spans = [(0, 10, "a"), (4, 6, "b"), (4, 8, "a"), (20, 21, "b")]
    # 0-4 a; 4-6 a, a, b; 6-8 a, a; 8-10 a; 20-21 b.
    assert shared_time(spans) == pytest.approx({"a": 4 + 4 / 3 + 2 + 2, "b": 2 / 3 + 1})
