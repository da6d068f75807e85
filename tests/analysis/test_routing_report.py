import json
import warnings

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from moe_jax.analysis import routing_report
from moe_jax.errors import UserError

LABELS = ["code", "law", "prose"]


def summary(family, experts=4, length=100):
    """What `study.summarize` returns, with numbers that are easy to find in a picture."""
    share = np.full(experts, 1 / experts)
    common = {
        "load": (2 * share).tolist(),
        "importance": share.tolist(),
        "load_cv": 0.25,
        "max_violation_global": 0.5,
        "dead_experts": 1.0,
        "by_label": [share.tolist()] * 3,
        "label_information": 0.125,
    }
    if family == "soft":
        return common | {"largest_dispatch": 0.75, "largest_combine": 0.625}
    common |= {
        "dropped": 0.2,
        "dropped_by_position": [0.0] * (length // 2) + [0.4] * (length // 2),
        "wanted_by_position": [10] * length,
        "experts_per_token": [0.1, 0.3, 0.6] + [0.0] * (experts - 2),
        "repeat_first": 0.3,
    }
    if family == "expert choice":
        return common | pairs(experts)
    gates = np.zeros((2, 20))
    gates[:, 3] = 1
    return common | pairs(experts) | {"gates": gates.tolist(), "largest_gate": 1.0}


def pairs(experts):
    together = np.full((experts, experts), 0.1) + 0.9 * np.eye(experts)
    return {"coactivation": together.tolist(), "repeat_any": 0.7}


@pytest.fixture
def drawn(monkeypatch):
    """Draws and returns the figure: what a reader sees, as matplotlib's objects, without a file."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))

    def draw(numbers):
        routing_report.save(numbers, LABELS, "a title", "not written")
        return figures[-1]

    return draw


@pytest.mark.parametrize("routed", [True, False], ids=["routed", "nothing routed"])
def test_picture_is_written(routed, tmp_path):
    one = summary("token choice")
    if not routed:
        one = {name: np.zeros_like(value).tolist() for name, value in one.items()}
        one["largest_gate"] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routing_report.save({1: one}, LABELS, "a title", tmp_path / "routing.png")
    height, width, _ = image.imread(tmp_path / "routing.png").shape
    assert width > 4 * height  # Five panels in one row.


def panels(figure):
    """Title -> axes of what is visible, colour bars left out."""
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def panel(figure, words):
    (found,) = (axes for title, axes in panels(figure).items() if words in title)
    return found


def test_every_layer_has_its_row_of_panels(drawn):
    figure = drawn({1: summary("token choice"), 3: summary("token choice")})
    titles = panels(figure)
    assert len(titles) == 10
    for block in (1, 3):
        assert f"Block {block}: load, CV 0.25, MaxVio 0.50, 1 dead" in titles
        assert f"Block {block}: 20.0% dropped" in titles
        assert f"Block {block}: experts by label, 0.125 nats" in titles
        assert f"Block {block}: next token repeats the first expert 30.0%" in titles
        assert f"Block {block}: next token shares an expert 70.0%" in titles
    assert figure.get_suptitle() == "a title"


def test_bars_show_shares_beside_the_fair_one(drawn):
    axes = panel(drawn({1: summary("token choice")}), "load")
    assert [bar.get_height() for bar in axes.patches] == [25] * 4  # Of load 0.5 each, K = 2.
    fair = next(line for line in axes.get_lines() if line.get_label() == "fair share")
    assert set(fair.get_ydata()) == {25}


def test_drops_are_averaged_over_windows_of_positions(drawn):
    one = summary("token choice", length=128)
    one["wanted_by_position"][1] = 30  # Three of four choices of the first window, none dropped...
    one["dropped_by_position"][0] = 1.0  # ... and the other one is.
    one["wanted_by_position"][-2:] = [0, 0]  # Nothing was ever there.
    line = panel(drawn({1: one}), "dropped").get_lines()[0]
    assert len(line.get_xdata()) == 63
    assert line.get_xdata()[0] == 0.5
    np.testing.assert_allclose(line.get_ydata()[[0, 1, 62]], [25, 0, 40])


def test_heat_maps_name_the_labels_and_leave_out_the_diagonal(drawn):
    figure = drawn({1: summary("token choice")})
    by_label = panel(figure, "by label")
    assert [text.get_text() for text in by_label.get_yticklabels()] == LABELS
    assert by_label.images[0].get_clim() == (0, 75)  # Three times the fair share.
    together = panel(figure, "shares an expert").images[0].get_array()
    assert np.ma.getmaskarray(together)[np.eye(4, dtype=bool)].all()
    np.testing.assert_allclose(together.compressed(), 10)


def test_expert_choice_shows_experts_per_token_in_place_of_gates(drawn):
    axes = panel(drawn({1: summary("expert choice")}), "first expert")
    assert axes.get_xlabel() == "experts of a token"
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [10, 30, 60])
    axes = panel(drawn({1: summary("token choice")}), "first expert")
    assert "gate" in axes.get_xlabel()
    assert axes.get_xlim() == pytest.approx((0, 0.2))  # No gate is above.


def test_soft_moe_shows_only_what_it_has(drawn):
    titles = list(panels(drawn({2: summary("soft")})))
    assert len(titles) == 2
    assert "dispatch 0.75, combine 0.62" in titles[0]
    assert "by label" in titles[1]


def test_panels_that_one_layer_lacks_are_hidden_in_its_row_only(drawn):
    figure = drawn({1: summary("token choice"), 2: summary("soft")})
    assert sum("Block 1" in title for title in panels(figure)) == 5
    assert sum("Block 2" in title for title in panels(figure)) == 2
    assert sum(not axes.get_visible() for axes in figure.axes) == 3


def test_of_many_layers_the_first_middle_and_last_are_shown(drawn):
    numbers = {block: summary("soft") for block in range(1, 12, 2)}
    figure = drawn(numbers)
    blocks = [title.split(":")[0] for title in panels(figure) if "load" in title]
    assert blocks == ["Block 1", "Block 7", "Block 11"]
    assert figure.get_suptitle() == "a title (3 of 6 MoE layers)"
    four = drawn({block: numbers[block] for block in (1, 3, 5, 7)})
    assert sum("load" in title for title in panels(four)) == 4


def test_a_dense_model_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="0 MoE layers"):
        routing_report.save({}, LABELS, "a title", tmp_path / "routing.png")


def test_json_has_every_number_by_block_in_the_models_order(tmp_path):
    numbers = {"encoder/11": summary("soft"), "decoder/3": summary("token choice")}
    routing_report.write_json(numbers, LABELS, tmp_path / "routing.json")
    written = json.loads((tmp_path / "routing.json").read_text())
    assert written["labels"] == LABELS
    assert written["blocks"] == numbers
    assert list(written["blocks"]) == ["encoder/11", "decoder/3"]
