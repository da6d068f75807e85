"""The benchmark of the layer: what it measures, what its rows say, and the script."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis import figures
from moe_jax.analysis.benchmark import (
    cases,
    measurement,
    plan,
    products,
    report,
    rows,
    timing,
)  # fmt: skip
from moe_jax.analysis.benchmark.cases import Pass, Shape, Skew
from moe_jax.analysis.benchmark.timing import NO_LIMITS, Limits, Rounds
from moe_jax.analysis.benchmark.variants import VARIANTS
from moe_jax.analysis.floors import decoder
from moe_jax.analysis.floors.decoder import DecoderShape
from moe_jax.analysis.hlo import Program
from moe_jax.dispatch.grouped_matmul.interface import Backend
from moe_jax.errors import UserError
from moe_jax.training import step_benchmark
from tests.scripts import ROOT, script

ONCE = Rounds(rounds=1, least_rounds=1, seconds=0)
TINY = Shape(tokens=64, width=8, experts=4, k=2)
KEYS = {
    "variant", "tokens", "width", "experts", "k", "skew", "mode", "ratio_to_dense",
    "ratio_to_balanced", "temp_bytes",
}  # fmt: skip


def first_choices(shape, skew):
    """[T] experts that the router's logits put first, as counts by expert."""
    weights = cases.parameters(shape, jax.random.key(0))["router"]["weights"]
    x = cases.tokens(shape, skew, weights, jax.random.key(1))
    assert x.shape == (shape.tokens, shape.width)
    return np.bincount(np.argmax(x @ weights, axis=1), minlength=shape.experts)


def test_the_router_sends_tokens_by_popularity():
    shape = Shape(tokens=4000, width=64, experts=8, k=2)
    counts = first_choices(shape, Skew.ZIPF)
    share = np.arange(1, 9) ** -1.5
    np.testing.assert_allclose(counts / 4000, share / share.sum(), atol=0.03)
    counts = first_choices(shape, Skew.ONE_HOT)
    assert counts[0] == 4000
    # Random columns that are alike prefer some experts, but none by much.
    counts = first_choices(shape, Skew.UNIFORM)
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.5 * counts.mean()


# einsum_g2048 needs that many tokens; all variants with the same parameters and tokens.
LARGE = Shape(tokens=2048, width=8, experts=4, k=2)


def by_loop(parameters, x, slots, group_size):
    """Top-2 with softmax gates over the experts, served left to right within groups; and drops."""
    logits = np.asarray(x @ parameters["router"]["weights"], np.float64)
    gates = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y, dropped = np.zeros_like(x), 0
    for group in range(0, len(x), group_size):
        taken = dict.fromkeys(range(LARGE.experts), 0)
        for t in range(group, group + group_size):
            for e in np.argsort(-logits[t], kind="stable")[:2]:
                if taken[e] == slots:
                    dropped += 1
                    continue
                taken[e] += 1
                hidden = np.maximum(x[t] @ parameters["w_in"][e], 0)
                y[t] += gates[t, e] * (hidden @ parameters["w_out"][e])
    return y, dropped / (2 * len(x))


@pytest.mark.parametrize(
    ("variant", "slots", "group_size"),
    [
        ("gather_cf1.0", 1024, 2048),
        ("gather_cf1.25", 1280, 2048),
        ("gather_cf2.0", 2048, 2048),
        ("dropless", 2048, 2048),
        ("einsum_g256", 160, 256),
        ("einsum_g2048", 1280, 2048),
        ("ragged_dot", 2048, 2048),
        ("all_experts", 2048, 2048),
    ],
)
def test_variants_are_what_their_names_say(variant, slots, group_size):
    parameters = cases.parameters(LARGE, jax.random.key(0))
    x = cases.tokens(LARGE, Skew.ZIPF, parameters["router"]["weights"], jax.random.key(1))
    y, statistics = jax.jit(VARIANTS[variant](LARGE))(parameters, x)
    want, dropped = by_loop(jax.device_get(parameters), np.asarray(x), slots, group_size)
    np.testing.assert_allclose(y, want, atol=1e-4)
    assert float(statistics["dropped"]) == pytest.approx(dropped, abs=1e-6)


def test_every_variant_is_checked_above():
    (mark,) = test_variants_are_what_their_names_say.pytestmark
    assert [variant for variant, *_ in mark.args[1]] == list(VARIANTS)


@pytest.fixture(scope="module")
def measured():
    """Rows of a tiny case, where ragged_dot takes more than it may."""
    names = {
        Skew.UNIFORM: ["gather_cf1.0", "ragged_dot"],
        Skew.ONE_HOT: ["gather_cf1.0"],
    }
    # The product of all rows with all experts; the others take a quarter of it.
    flops = 3 * 4 * 2 * 2 * TINY.assignments * TINY.width * TINY.mlp_width
    limits = dataclasses.replace(NO_LIMITS, flops=flops * 0.9)
    found = list(measurement.measure(TINY, Pass.FORWARD_BACKWARD, names, limits, ONCE))
    assert json.loads(rows.as_json(found)) == found
    return found


def test_rows_have_the_keys_and_the_floors(measured):
    figures_of = [row for row in measured if "left_out" not in row]
    assert [(row["skew"], row["variant"]) for row in figures_of] == [
        (skew, variant)
        for skew in ("uniform", "one_hot")
        for variant in ("dense", "balanced", "gather_cf1.0")
    ]
    for row in figures_of:
        assert row.keys() >= KEYS
        assert row["mode"] == "forward_backward" and row["k"] == 2 and row["width"] == 8
        assert row["temp_bytes"] > 0 and row["milliseconds"] > 0 and row["rounds"] == 1
    for dense, balanced, gather in (figures_of[:3], figures_of[3:]):
        assert dense["ratio_to_dense"] == balanced["ratio_to_balanced"] == 1
        # Of one round, so all ratios are of the same times.
        for row, floor in ((dense, balanced), (gather, balanced), (gather, dense)):
            ratio = row["milliseconds"] / floor["milliseconds"]
            assert row[f"ratio_to_{floor['variant']}"] == pytest.approx(ratio)
    uniform, one_hot = (row for row in figures_of if row["variant"] == "gather_cf1.0")
    assert uniform["max_over_mean_load"] < one_hot["max_over_mean_load"] == 2
    assert one_hot["dropped"] > uniform["dropped"]


def test_what_takes_too_much_is_left_out_with_the_reason(measured):
    (row,) = (row for row in measured if "left_out" in row)
    assert row["variant"] == "ragged_dot" and row["skew"] == "uniform"
    assert "TFLOP a call, the limit is" in row["left_out"]
    lowered = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64)))
    with pytest.raises(timing.TooExpensive, match="GB of memory, the limit is"):
        Limits(bytes=1000, flops=1e12).compile(lowered)
    assert Limits.of_this_machine(1).bytes > 1e8


def test_gradients_of_everything_are_kept():
    """Or else the compiler would leave out work."""
    weights, x = {"a": jnp.ones((8, 6)), "b": jnp.ones((8, 6))}, jnp.ones((64, 8))

    def layer(weights, x):
        return x @ (weights["a"] * weights["b"]), {"largest": x.max()}

    program = timing.TimedProgram.of(layer, Pass.FORWARD_BACKWARD, weights, x)
    y, statistics, (of_weights, of_x) = program(weights, x)
    assert y.shape == (64, 6) and statistics["largest"] == 1 and program.temp_bytes >= 0
    np.testing.assert_allclose(
        of_x, program.cotangent.sum(axis=1)[:, None] * jnp.ones(8), atol=1e-5
    )
    for name in "ab":
        want = np.tile(program.cotangent.sum(axis=0), (8, 1))
        np.testing.assert_allclose(of_weights[name], want, atol=1e-5)


def test_rounds_interleave_and_slow_programs_leave_early():
    log = []

    def call(name, seconds):
        log.append(name)
        time.sleep(seconds)

    calls = {"fast": lambda: call("fast", 0), "slow": lambda: call("slow", 0.03)}
    times = timing.interleaved(calls, Rounds(rounds=5, least_rounds=2, seconds=0.02))
    assert log.count("fast") == 5 and log.count("slow") == 2
    assert all(set(log[i : i + 2]) == {"fast", "slow"} for i in (0, 2))
    assert np.isnan(times["slow"][2:]).all() and (times["slow"][:2] > 0.03).all()
    ratios = timing.ratio_quartiles(np.array([2.0, 9.0, np.nan]), np.array([1.0, 3.0, 1.0]))
    assert ratios == [2.25, 2.5, 2.75]


def test_parts_add_up_to_the_layer():
    found = list(measurement.measure_parts(TINY, Pass.FORWARD, ["gather_cf1.0"], ONCE))
    assert [row["part"] for row in found] == list(measurement.PARTS)
    assert sum(row["share"] for row in found) == pytest.approx(1)
    assert all(row["variant"] == "gather_cf1.0" and row["tokens"] == 64 for row in found)


def test_an_interrupted_grid_goes_on(tmp_path):
    log = tmp_path / "rows.jsonl"
    assert rows.read(log) == []
    small = dataclasses.replace(
        plan.QUICK, grid=[TINY], names={Skew.UNIFORM: ["gather_cf1.0", "dropless"]}
    )
    everything = [(TINY, which, {Skew.UNIFORM: ["gather_cf1.0", "dropless"]}) for which in Pass]
    assert plan.missing_layers(small, set()) == everything
    case = rows.case_of(TINY, Skew.UNIFORM, Pass.FORWARD)
    done = [{"variant": "gather_cf1.0", **case}, {"variant": "dropless", **case, "left_out": "a"}]
    log.write_text("".join(map(rows.as_line, done)) + '{"variant": "gath')
    assert rows.read(log) == done
    keys = {rows.key_of(row) for row in done}
    assert plan.missing_layers(small, keys) == everything[1:]
    keys = {rows.key_of(done[0])}
    expected = [(TINY, Pass.FORWARD, {Skew.UNIFORM: ["dropless"]}), everything[1]]
    assert plan.missing_layers(small, keys) == expected


def test_the_grids_are_the_ones_promised():
    grid = {(s.tokens, s.width, s.experts, s.k) for s in plan.FULL.grid}
    assert len(grid) == len(plan.FULL.grid) == 48
    assert grid == {
        (t, d, e, k)
        for t in (2048, 8192)
        for d in (256, 512)
        for e in (8, 32, 64, 128)
        for k in (1, 2, 8)
    }
    assert all(shape.assignments % shape.experts == 0 for shape in plan.FULL.grid)
    assert list(map(str, plan.FULL.names)) == ["uniform", "zipf1.5", "one_hot"]
    assert list(map(str, Pass)) == ["forward", "forward_backward"]
    assert len(plan.QUICK.grid) == 4 and set(plan.QUICK.grid) <= set(plan.FULL.grid)
    assert all(shape.rows_per_expert >= report.ENOUGH_ROWS for shape in plan.QUICK.grid)
    assert all(shape.width == 512 for shape, _ in (*plan.QUICK.parts, *plan.FULL.parts))


def made_up(variant, ratio, experts=8, skew="uniform", **others):
    return {
        "variant": variant, "tokens": 2048, "width": 256, "experts": experts, "k": 2, "skew": skew,
        "mode": "forward_backward", "ratio_to_balanced": ratio, "temp_bytes": 5_000_000, **others,
    }  # fmt: skip


def test_tables_and_goals():
    found = [
        made_up("dense", 0.9),
        made_up("balanced", 1.0),
        made_up("gather_cf1.0", 1.11),
        made_up("dropless", 1.2),
        made_up("dropless", 1.4, width=512),
        made_up("ragged_dot", 12.0),
        made_up("dropless", 1.7, skew="zipf1.5"),
        made_up("dropless", 9.0, experts=64),  # Too few rows per expert for the goal.
        made_up("dropless", 1.0, tokens=128),  # Not for a goal either, because others have more.
        made_up("ragged_dot", 99.0, tokens=128),
        made_up("ragged_dot", 99.0, skew="zipf1.5"),
        {**made_up("ragged_dot", 0, experts=64), "left_out": "takes 3 TFLOP"},
        {**made_up("all_experts", 0), "left_out": "takes 9 TFLOP"},
        {**made_up("dropless", 0), "part": "router", "share": 0.125},
    ]
    for row in found[-3:]:
        del row["ratio_to_balanced"]
    text = report.layers_page(found)
    assert "| uniform, forward_backward, N/E >= 200 | 0.90 | 1.11 | 1.30 | 12.00 |" in text
    assert "| gather at capacity factor 1.0, uniform, N/E >= 200: time / balanced | <= 1.08 | 1.11 | missed |" in text  # fmt: skip
    assert "| dropless, uniform, N/E >= 200: time / balanced | <= 1.25 | 1.30 | missed |" in text
    assert "| dropless, Zipf 1.5, N/E >= 200: time / balanced | <= 1.5 | 1.70 | missed |" in text
    assert "| lax.ragged_dot's time / dropless's, 8 experts, uniform, N/E >= 200 | >= 8 | 10.0 | reached |" in text  # fmt: skip
    assert "64 experts, uniform, N/E >= 200 | >= 30 | not measured: ragged_dot takes 3 TFLOP |  |" in text  # fmt: skip
    assert "- all_experts, tokens 2048, width 256, experts 8, k 2, uniform, forward_backward: takes 9 TFLOP" in text  # fmt: skip
    assert "| 12.5% |" in text


def test_a_goal_without_enough_rows_says_which_it_has():
    found = [made_up("dropless", 2.0, experts=64), made_up("ragged_dot", 20.0, experts=64)]
    text = report.layers_page(found)
    assert "64 experts, uniform, N/E < 200 | >= 30 | 10.0 | missed |" in text
    assert "| dropless, Zipf 1.5, N/E >= 200: time / balanced | <= 1.5 | not measured |  |" in text


def test_rows_of_another_origin_are_set_aside(caplog):
    origin = {"device": "a", "jax": "1", "commit": "c"}
    found = [origin | {"k": 1}, *(origin | {key: "other"} for key in origin)]
    found.append(origin | {"commit": "c+changes"})
    with caplog.at_level("INFO", "moe_jax"):
        assert rows.of_origin(found, origin) == found[:1]
    assert "4 of 5 earlier rows are set aside" in caplog.text
    caplog.clear()
    assert rows.of_origin(found[:1], origin) == found[:1] and not caplog.text


def test_picture(tmp_path):
    found = [
        made_up(variant, ratio * spread, skew=skew, tokens=tokens)
        for variant, ratio in (
            ("dense", 0.9),
            ("balanced", 1),
            ("dropless", 1.2),
            ("ragged_dot", 9),
        )
        for skew, spread in (("uniform", 1), ("zipf1.5", 1.2))
        for tokens in (2048, 8192)
    ]
    figures.save_layer_benchmark(found, "title", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


SMALL_PRODUCT = products.ProductShape("made_up", rows=24, experts=3, width=8, mlp_width=16)


def test_products_of_every_operation_agree_with_a_loop():
    backends = [Backend.RAGGED_DOT, Backend.MEGABLOX]
    found = list(products.measure_products(SMALL_PRODUCT, Skew.ONE_HOT, backends, ONCE))
    by_backend = {
        backend: [row for row in found if row["backend"] == backend] for backend in backends
    }
    assert [row["operation"] for row in by_backend["ragged_dot"]] == ["forward", "dlhs", "drhs"]
    for row in by_backend["ragged_dot"]:
        assert row["relative_error"] < 0.01 and row["share_of_best"] == 1
        assert row["model"] == "made_up" and row["skew"] == "one_hot" and row["milliseconds"] > 0
    for row in by_backend["megablox"]:
        assert "megablox" in row["left_out"]
    text = report.products_page(found)
    assert "| made_up, one_hot, drhs |" in text and "- megablox: " in text


def test_a_wrong_product_is_not_the_best_and_a_silent_error_has_a_name(monkeypatch):
    right_by = products.operation_by

    def operation_by(backend, operation):
        right = right_by(Backend.RAGGED_DOT, operation)

        def silent(inputs):
            raise RuntimeError

        def slow(inputs):
            time.sleep(0.02)
            return right(inputs)

        return {
            Backend.AUTO: slow,
            Backend.RAGGED_DOT: lambda inputs: 1.5 * right(inputs),
            Backend.BLOCKS: lambda inputs: jnp.nan * right(inputs),
            Backend.MEGABLOX: silent,
        }[backend]

    monkeypatch.setattr(products, "operation_by", operation_by)
    backends = [Backend.AUTO, Backend.RAGGED_DOT, Backend.BLOCKS, Backend.MEGABLOX]
    found = list(products.measure_products(SMALL_PRODUCT, Skew.ONE_HOT, backends, ONCE))
    assert len(found) == 3 * len(backends)
    for silent, best, wrong, not_finite in (found[i : i + 4] for i in (0, 4, 8)):
        assert silent["backend"] == "megablox" and silent["left_out"] == "RuntimeError"
        assert best["backend"] == "auto" and best["share_of_best"] == 1
        assert wrong["relative_error"] == pytest.approx(0.5, rel=0.02)
        assert not_finite["relative_error"] is None
        assert wrong["share_of_best"] is not_finite["share_of_best"] is None
        assert wrong["milliseconds"] < best["milliseconds"]
    assert "NaN" not in rows.as_json(found)
    text = report.products_page(found)
    assert "(1.00)" in text and "(wrong: error 50" in text and "(wrong: not finite)" in text


@pytest.mark.parametrize("operation", products.Operation)
def test_a_wrong_product_is_noticed(operation):
    inputs = products.inputs_of(SMALL_PRODUCT, Skew.ONE_HOT)
    assert inputs.group_sizes.tolist() == [24, 0, 0]
    lhs, rhs, gradient = (
        np.asarray(a, np.float32) for a in (inputs.lhs, inputs.rhs, inputs.gradient)
    )
    right = {
        products.Operation.FORWARD: lhs @ rhs[0],
        products.Operation.DLHS: gradient @ rhs[0].T,
        products.Operation.DRHS: np.stack([lhs.T @ gradient, 0 * rhs[0], 0 * rhs[0]]),
    }[operation]
    assert products.relative_error(operation, inputs, right) < 1e-5
    assert products.relative_error(operation, inputs, right * 1.1) == pytest.approx(0.1, rel=1e-3)
    if operation == products.Operation.DRHS:
        right[1] = np.nan  # What a kernel leaves that does not write empty groups.
        assert not products.relative_error(operation, inputs, right) < 1


def test_a_nan_in_the_smallest_group_is_not_hidden_by_the_others():
    inputs = products.inputs_of(SMALL_PRODUCT, Skew.ZIPF)
    sizes = np.asarray(inputs.group_sizes)
    assert sizes.argmin() != sizes.argmax() and sizes.min() > 0
    group = np.repeat(np.arange(3), sizes)
    lhs, rhs = (np.asarray(a, np.float32) for a in (inputs.lhs, inputs.rhs))
    result = np.einsum("rd,rdf->rf", lhs, rhs[group])
    assert products.relative_error(products.Operation.FORWARD, inputs, result) < 1e-5
    for wrong in (sizes.argmin(), sizes.argmax()):
        broken = np.where((group == wrong)[:, None], np.nan, result)
        assert np.isnan(products.relative_error(products.Operation.FORWARD, inputs, broken))


def test_the_models_shapes_are_refused_without_an_accelerator():
    with pytest.raises(UserError, match=r"products is set, but there is no GPU.*--small"):
        products.shapes_for(small=False)
    small = products.shapes_for(small=True)
    assert [shape.model for shape in small] == [shape.model for shape in products.SHAPES]
    assert all(shape.flops < 1e9 for shape in small)


def test_a_mistyped_flag():
    done = script("bench_layer", "--quik")
    assert done.returncode == 2
    assert "quik" in done.stderr and "quick" in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_whole_steps_beside_a_bare_program(monkeypatch):
    """Both programs train: the same loss at the start, about log(256), and a lower one later."""
    losses = {}
    monkeypatch.setattr(
        step_benchmark, "interleaved", lambda calls, _: losses.update(calls) or TIMES
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for experts in (0, 4):
        tiny = DecoderShape(64, experts, layers=1, head_width=32, rows=2, length=32)
        found = list(step_benchmark.measure_steps(tiny, ONCE))
        left_out = [row for row in found if "left_out" in row]
        assert [row["program"] for row in left_out] == [
            step_benchmark.EAGER,
            step_benchmark.GROUPED,
        ][: 1 + bool(experts)]
        assert "parity" in left_out[0]["left_out"]
        for call in losses.values():
            first = float(call())
            assert (
                abs(first - np.log(264)) < 2.5
            )  # A tied table first expects the same token again.
            assert min(float(call()) for _ in range(20)) < first
        ours, bare = (row for row in found if "rounds" in row)
        assert (ours["program"], bare["program"]) == (step_benchmark.OURS, step_benchmark.BARE)
        assert (ours["milliseconds"], ours["ratio_to_bare"]) == (3000, 1.5)
        assert bare["tokens_per_second"] == 64 / 2
        assert "| width 64, " in report.steps_page(found)
        assert "3000 (1.50) | 2000 (1.00) |" in report.steps_page(found)


TIMES = {step_benchmark.OURS: np.array([3.0, 3.0]), step_benchmark.BARE: np.array([2.0, 2.0])}


def test_the_bare_program_computes_what_its_flops_say():
    shape = DecoderShape(64, 0, layers=2, head_width=32, rows=2, length=32)
    state, step = decoder.train_step(shape)
    lowered = step.lower(state, jnp.zeros((2, 33), jnp.int32))
    program = Program(lowered.compile().as_text())
    flops = sum(product.flops for product in program.matrix_products())
    assert flops == pytest.approx(shape.flops, rel=0.02)


# The script with a tiny shape in place of the four.
TINY_SCRIPT = """
import dataclasses, runpy, sys
from moe_jax.analysis.benchmark import plan
from moe_jax.analysis.benchmark.cases import Shape, Skew
tiny = Shape(tokens=64, width=8, experts=4, k=2)
plan.QUICK = dataclasses.replace(
    plan.QUICK, grid=[tiny], names={Skew.UNIFORM: ["gather_cf1.0"]}, parts=[]
)
sys.argv[0] = "experiments/bench_layer.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_script_writes_and_prints_rows_alone(tmp_path):
    environment = {
        **os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", TINY_SCRIPT, "--quick", "--format=json", f"--output={tmp_path}"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(row["variant"], row["mode"]) for row in found] == [
        (variant, mode)
        for mode in ("forward", "forward_backward")
        for variant in ("dense", "balanced", "gather_cf1.0")
    ]
    assert all(row.keys() >= KEYS | {"device", "jax", "commit"} for row in found)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"bench_layer_quick.{ending}" for ending in ("jsonl", "json", "md", "png")
    }
    assert rows.read(tmp_path / "bench_layer_quick.jsonl") == found
    assert "2/2" in done.stderr  # The progress bar.
