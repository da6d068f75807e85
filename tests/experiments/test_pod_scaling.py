"""experiments/pod_scaling.py: its layouts, that it goes on where it stopped, and what it draws."""

import dataclasses
import json
import math

import numpy as np
import pytest
from etils import epath
from matplotlib.figure import Figure

from experiments import pod_scaling
from experiments.pod_scaling import SIZES, STUDIES, Study
from moe_jax.analysis import pod_figures
from moe_jax.configuration import encode
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.hardware import topology
from moe_jax.pods.report import GIB, CollectiveSum, DeviceMemory
from moe_jax.reproduction.claim import read_config
from moe_jax.training.rows import PodLayout, pods_of
from tests.pods.reports import MEMORY, TERMS, report
from tests.scripts import ROOT, script

COMPILER = "libtpu 1.2"


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """A name for the compiler that need not be installed."""
    monkeypatch.setattr(pod_scaling, "compiler_version", lambda platform: COMPILER)


@pytest.mark.parametrize("devices", SIZES)
@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_size_has_a_valid_layout(study, devices):
    layout = study.layout(devices)
    assert layout.mesh.size == topology(layout.topology).devices == devices
    config = read_config(str(ROOT / study.config))
    layout.apply(config).validate()


@pytest.mark.parametrize(
    ("devices", "machine", "data", "expert"),
    [
        (8, "v3:2x2", 1, 8),
        (64, "v3:4x8", 1, 64),
        (2048, "v3:32x32", 1, 2048),
        (4096, "2*v3:32x32", 2, 2048),
    ],
)
def test_gshard_has_an_expert_and_2048_tokens_for_each_device(devices, machine, data, expert):
    layout = pod_scaling.gshard(devices)
    assert topology(layout.topology) == topology(machine)
    assert (layout.mesh.data, layout.mesh.expert, layout.mesh.model) == (data, expert, 1)
    config = layout.apply(read_config(str(ROOT / STUDIES["gshard"].config)))
    for stack in (config.model.encoder, config.model.decoder):
        assert stack.num_experts == devices
        assert stack.moe.group_size == 2048
    assert config.data.batch_size * 128 == 2048 * devices


@pytest.mark.parametrize(
    ("devices", "machine", "data", "expert", "model", "microbatches"),
    [
        (8, "v5p:2x2x2", 1, 8, 1, 1920),
        (64, "v5p:4x4x4", 1, 64, 1, 240),
        (128, "v5p:4x4x8", 2, 64, 1, 120),
        (1024, "v5p:8x8x16", 16, 64, 1, 15),
        # 15,360 rows are 15 for each of 1,024 devices and 7.5 for each of 2,048.
        (2048, "v5p:8x16x16", 16, 64, 2, 15),
        (4096, "v5p:16x16x16", 16, 64, 4, 15),
    ],
)
def test_deepseek_keeps_its_batch(devices, machine, data, expert, model, microbatches):
    layout = pod_scaling.deepseek_v3(devices)
    assert topology(layout.topology) == topology(machine)
    assert dataclasses.astuple(layout.mesh)[:3] == (data, expert, model)
    assert layout.changes["microbatches"] == microbatches
    assert microbatches * data * expert == 15_360


@pytest.mark.parametrize(("name", "devices"), [("gshard", 2048), ("deepseek_v3", 1024)])
def test_the_published_machine_has_the_layout_of_the_config_file(name, devices):
    """So that its report serves both."""
    study = STUDIES[name]
    ours, theirs = study.layout(devices), pods_of(str(ROOT / study.config))[0]
    assert topology(ours.topology) == topology(theirs.topology)
    config = read_config(str(ROOT / study.config))
    assert encode(ours.apply(config)) == encode(theirs.apply(config))


def test_other_sizes_are_an_error():
    assert pod_scaling.sizes(["64", "8", "64"]) == [8, 64]
    with pytest.raises(
        UserError, match=r"--devices has '12'; it takes numbers among 8, 16, .*4096"
    ):
        pod_scaling.sizes(["8", "12"])


TINY = Study(
    "tiny", "A tiny model", "configs/quickstart.py", lambda n: PodLayout("v5e:2x2", MeshConfig(n)),
    sizes=(8, 16),
)  # fmt: skip


def test_a_finished_point_is_not_compiled_again(tmp_path, monkeypatch):
    compiled = []

    def compile_step(config, machine, *, name, changes):
        compiled.append(config.mesh.data)
        return report(devices=config.mesh.data, hardware=machine.name, config=name)

    monkeypatch.setattr(pod_scaling, "compile_step", compile_step)
    for devices in (8, 16, 8):
        pod_scaling.compile_point(TINY, devices, epath.Path(tmp_path))
    assert compiled == [8, 16]
    found = pod_scaling.reports_of(TINY, epath.Path(tmp_path))
    assert [one.devices for one in found] == [8, 16]
    assert found[0].config == "configs/quickstart.py"


def test_the_report_of_a_giant_is_taken_for_the_same_step_alone(tmp_path, monkeypatch):
    kept = report(
        config=TINY.config, topology="v5e:2x2", hardware="tpu-v5e-4", changes={},
        mesh={"data": 4, "expert": 1, "model": 1},
    )  # fmt: skip
    monkeypatch.setattr(pod_scaling.budgets, "RESULTS", tmp_path)
    kept.write(epath.Path(pod_scaling.budgets.budget_file(TINY.config, COMPILER)))
    machine = "v5e:2x2"
    assert pod_scaling.of_giant(TINY, PodLayout(machine, MeshConfig(4))) == kept
    assert pod_scaling.of_giant(TINY, PodLayout("v5e:2x4", MeshConfig(4))) is None
    assert pod_scaling.of_giant(TINY, PodLayout(machine, MeshConfig(2, 2))) is None
    changed = PodLayout(machine, MeshConfig(4), {"microbatches": 2})
    assert pod_scaling.of_giant(TINY, changed) is None
    assert pod_scaling.of_giant(STUDIES["gshard"], PodLayout(machine, MeshConfig(4))) is None


def exchange(seconds, size=GIB):
    return CollectiveSum("all-to-all", ("expert",), 4, size, seconds, exact=True)


def curve():
    """8 devices are too few, 16 are bound by compute, 32 by the interconnect."""
    state = DeviceMemory(
        arguments=500 * GIB, parameters=300 * GIB, optimizer_state=200 * GIB, outputs=505 * GIB,
        aliased=500 * GIB, temporaries=200 * GIB, program=110 * GIB, capacity=400 * GIB,
    )  # fmt: skip
    return [
        report(
            devices=8, fits=False, refusal="too large", hbm=state, collectives=(), roofline=None
        ),
        report(devices=16, collectives=(exchange(0.1),)),
        report(
            devices=32,
            collectives=(exchange(0.8, 3 * GIB),),
            roofline=dataclasses.replace(
                TERMS, interconnect=0.8, binding="interconnect", step_seconds=0.8, mfu=0.3,
                mfu_without_overlap=0.175,
            ),
        ),
    ]  # fmt: skip


def test_sentences_say_where_the_curve_bends_and_why():
    refused, changed, fell = pod_scaling.bends(curve())
    # 500 of arguments and 5 outputs of their own, 200 temporaries, 110 of program.
    assert refused == (
        "On 8 devices it does not fit: it needs 815.0 GiB of the 400.0 that a device has, and 500.0 of "
        "it is the state."
    )
    assert "From 16 to 32 devices the bound changes from compute to interconnect" in changed
    assert "MFU goes from 60.0% to 30.0%" in changed
    assert "all-to-all over expert takes most of all collectives, 3.0 GiB and 0.8 s" in changed
    assert "falls most from 16 to 32 devices, to 50% of what it was" in fell


def test_a_step_whose_state_fits_is_refused_for_another_reason():
    (sentence,) = pod_scaling.bends([report(fits=False, refusal="no", roofline=None)])
    assert sentence.endswith("most of it is temporaries (activations, gradients and buffers).")


def test_a_step_that_was_never_compiled_needs_at_least_its_state():
    memory = dataclasses.replace(MEMORY, arguments=500 * GIB, temporaries=None, capacity=400 * GIB)
    (sentence,) = pod_scaling.bends([report(fits=False, roofline=None, hbm=memory)])
    assert sentence == (
        "On 8 devices it does not fit: it needs at least 500.0 GiB of the 400.0 that a device has, "
        "before gradients and activations."
    )


def test_a_level_curve_has_no_bend():
    assert pod_scaling.bends([report(devices=8), report(devices=16)]) == []


def test_the_table_marks_what_does_not_fit():
    header, rule, refused, *fitting = pod_scaling.table(curve())
    assert len({line.count("|") for line in (header, rule, refused, *fitting)}) == 1
    assert "does not fit in 400.0 GiB" in refused
    assert "| 3.0 | 0.8 | interconnect | 30.0% | 17.5% | 1,000 |" in fitting[1]
    assert fitting[0].startswith("| 16 | tpu-v5p-16 | data 2 x expert 4 | 2 |")


def points_of(axes, **wanted):
    """The lines of a panel whose properties are these."""
    return [
        line for line in axes.get_lines()
        if all(getattr(line, f"get_{name}")() == value for name, value in wanted.items())
    ]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws reports and gives the figure."""
    figures = []

    def figure(**settings):
        figures.append(Figure(**settings))
        return figures[-1]

    def draw(save, reports):
        path = tmp_path / "picture.png"
        save([json.loads(json.dumps(one.as_json())) for one in reports], "A title", path)
        assert path.read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    monkeypatch.setattr(pod_figures, "Figure", figure)
    return draw


def test_steps_that_do_not_fit_are_hollow_and_have_no_collectives(drawn):
    memory, collectives, terms, efficiency = drawn(pod_figures.save_scaling, curve()).axes
    hollow = [x for x in points_of(memory, markerfacecolor="white") if len(x.get_xdata())]
    assert [list(line.get_xdata()) for line in hollow] == [[8]] * 3
    full = [line for line in points_of(memory, marker="o") if line not in hollow]
    assert [list(line.get_xdata()) for line in full if len(line.get_xdata())] == [[16, 32]] * 3
    (sent,) = points_of(collectives, label="all-to-all")
    np.testing.assert_allclose(sent.get_xydata(), [(16, 1), (32, 3)])
    assert len(efficiency.get_lines()) == 2
    # Bars of compute, memory and interconnect; nothing goes over the network.
    assert [bars.get_label() for bars in terms.containers] == ["compute", "memory", "interconnect"]


def test_terms_are_device_time_for_a_token(drawn):
    terms = drawn(pod_figures.save_scaling, curve()).axes[2]
    compute = [bar.get_height() for bar in terms.containers[0]]
    # 0.4 s of 16 and of 32 devices for 1,600 tokens.
    np.testing.assert_allclose(compute, [4000, 8000])
    (longest,) = points_of(terms, label="longest")
    np.testing.assert_allclose(longest.get_ydata(), [4000, 16000])


def test_a_study_of_which_nothing_fits_is_drawn(drawn):
    memory, collectives, *_ = drawn(pod_figures.save_scaling, curve()[:1]).axes
    assert not collectives.get_lines()
    assert memory.get_legend() is not None


def test_budgets_are_bars_of_shares(drawn):
    left, right = drawn(pod_figures.save_budgets, curve()).axes
    parameters, optimizer, temporaries = left.containers
    # Of 400: parameters 300 and 60, temporaries 200.
    np.testing.assert_allclose([bar.get_width() for bar in parameters], [75, 15, 15])
    np.testing.assert_allclose([bar.get_width() for bar in temporaries], [50, 50, 50])
    interconnect = right.containers[2]
    np.testing.assert_allclose([bar.get_width() for bar in interconnect], [0, 25, 100])
    assert [text.get_text() for text in right.texts] == [" MFU 60%", " MFU 30%"]
    assert left.get_yticklabels()[0].get_text() == "paper/model\ntpu-v5p-16"
    assert math.isclose(optimizer[0].get_x(), 75)


def test_points_that_are_there_are_drawn_without_compiling(tmp_path):
    """As a user runs it; all that --devices asks for is there already."""
    for one in curve():
        path = tmp_path / f"gshard_{one.devices}.json"
        path.write_text(json.dumps(one.as_json()))
    done = script(
        "pod_scaling", "--model=gshard", "--devices=8,16,32", f"--workdir={tmp_path}"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr
    page = (tmp_path / "scaling.md").read_text()
    assert page in done.stdout and str(tmp_path) in done.stdout
    assert "## GShard" in page and "## DeepSeek" not in page and "![curves](gshard.png)" in page
    assert (tmp_path / "gshard.png").read_bytes().startswith(b"\x89PNG")
