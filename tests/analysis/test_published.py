"""Every published number is counted and compared; what differs is explained with both numbers."""

import collections
import importlib
import json
import pathlib
import re
import sys

import pytest

from moe_jax.analysis.published import compare
from moe_jax.published import Published, Quantity
from tests.configs.every_config import CONFIGS, TITLES
from tests.scripts import script

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "experiments"))
paper_tables = importlib.import_module("paper_tables")


@pytest.mark.parametrize(
    ("printed", "value", "tolerance"),
    [("7.4B", 7.4e9, 5e7), ("36.5M", 36.5e6, 5e4), ("1.2T", 1.2e12, 5e10), ("16527360", 16527360, 0.5)],
)  # fmt: skip
def test_printed_numbers_carry_their_rounding(printed, value, tolerance):
    number = Published(Quantity.PARAMETERS, printed, "Table 1")
    assert number.value == pytest.approx(value, rel=1e-12)
    assert number.tolerance == pytest.approx(tolerance, rel=1e-12)


@pytest.fixture(scope="module")
def counted():
    models = list(paper_tables.published_models())
    return [(model, paper_tables.checked_numbers(model)) for model in models]


def test_at_least_ninety_numbers_and_each_is_met_or_explained(counted):
    rows = [row for _, of_model in counted for row in of_model]
    verdicts = collections.Counter(map(paper_tables.verdict, rows))
    assert len(rows) >= 90
    assert verdicts["differs"] == 0, [row for row in rows if paper_tables.verdict(row) == "differs"]
    assert verdicts["ok"] >= 0.75 * len(rows)
    for row in rows:
        if not row.ok:  # The note has our number, and it is not out of date.
            numbers = re.findall(r"\d[\d.,]*[KMGBT]", row.note.partition(":")[2])
            values = [Published(Quantity.PARAMETERS, n, "") for n in numbers]
            near = [abs(n.value - row.computed) <= 3.1 * n.unit for n in values]
            assert any(near), row


@pytest.mark.parametrize("paper", ["vmoe", "soft_moe", "clark_2022", "shazeer_2017"])
def test_parameters_are_the_printed_digits(counted, paper):
    rows = [row for _, rows in counted for row in rows if row.paper == paper]
    # Shazeer's other totals have embeddings, whose vocabulary is not printed.
    kinds = {"parameters", "parameters of blocks"}
    if paper == "shazeer_2017":
        kinds = {"parameters without embeddings"}
    parameters = [row for row in rows if row.quantity in kinds]
    assert len(parameters) >= 9
    assert all(row.ok for row in parameters)
    numbers = [n for model, _ in counted if model.paper == paper for n in model.row.published]
    assert all(n.relative_tolerance == 0 for n in numbers)
    if paper == "clark_2022":
        assert all(row.computed == row.published for row in parameters)


def test_every_config_is_valid_and_says_what_it_is():
    assert len(CONFIGS) >= 180
    for name, build in CONFIGS.items():
        build().validate()
        assert TITLES[name].endswith("."), name


def test_a_wrong_number_is_caught(counted):
    model, _ = counted[0]
    wrong = (Published(Quantity.PARAMETERS, "1.00M", "nowhere"),)
    config = model.row.build()
    (row,) = compare(model.paper, model.model, config.model, config.data, wrong)
    assert not row.ok
    assert paper_tables.verdict(row) == "differs"


def test_the_page_is_what_the_script_writes(counted):
    assert (ROOT / "docs" / "published_models.md").read_text() == paper_tables.page(counted)


def test_the_script_prints_json_of_one_paper():
    result = script("paper_tables", "--paper=olmoe", "--format=json")
    rows = json.loads(result.stdout)
    assert [row["quantity"] for row in rows] == ["parameters", "activated parameters"]
    assert set(rows[0]) == {
        "paper", "model", "quantity", "published", "computed", "relative_error", "tolerance", "ok",
        "note",
    }  # fmt: skip


def test_an_unknown_paper_is_answered_with_the_known_ones():
    result = script("paper_tables", "--paper=glamm")
    assert result.returncode == 2
    assert "--paper is 'glamm'; it must be one of" in result.stderr
    assert "glam" in result.stderr
