"""Claim 8: what it says of planted laws, and how it reads the authors' file."""

import gzip
import hashlib

import numpy as np
import pytest
from absl.testing import flagsaver
from matplotlib.figure import Figure

from experiments.claims import scaling_law
from moe_jax.analysis.scaling_law import Law
from moe_jax.errors import UserError
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from tests.reproduction.synthetic import synthetic_results

COLUMNS = (
    "hyper_id,step,loss_validation,num_experts,k,router_type,seed,routing_frequency,"
    "dense_parameter_count"
)
FIRST_LOSS = 10.0


def table_of(laws, noise=0.003):
    """A CSV like the authors': the losses of each router's law, noise in log10 L.

    Each model is there twice, with opposite noise, so that the fit is the law and has an error.
    """
    rng = np.random.default_rng(0)
    dense = [("Dense", laws["S-Base"], 1)]
    routed = [(router, law, 2**i) for router, law in laws.items() for i in range(1, 10)]
    lines = [COLUMNS]
    for router, law, E in dense + routed:
        for N in scaling_law.SIZES.values():
            error = rng.normal(scale=noise)
            for sign in (1, -1):
                loss = float(law.loss(N, E)) * 10 ** (sign * error)
                name = f"{router}-{N}-{E}-{sign}"
                lines.append(f"{name},249000,{loss},{E},1,{router},42,0.5,{N}.0")
                lines.append(f"{name},0,{FIRST_LOSS},{E},1,{router},42,0.5,{N}.0")
                lines.append(f"{name}-seed,249000,{FIRST_LOSS},{E},1,{router},7,0.5,{N}.0")
                lines.append(f"{name}-k,249000,{FIRST_LOSS},{E},2,{router},42,0.5,{N}.0")
                lines.append(f"{name}-all,249000,{FIRST_LOSS},{E},1,{router},42,1.0,{N}.0")
    return "\n".join(lines)


def reversed_law(law):
    return Law(law.a, -law.b, -law.c, law.d - 0.1, law.E_start, law.E_max)


def without_experts(law):
    return Law(law.a, 0.0, 0.0, law.d)


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Makes a CSV of laws the authors' file."""
    monkeypatch.setattr(scaling_law, "SAMPLES", 30)

    def write(laws, name):
        content = table_of(laws).encode()
        monkeypatch.setattr(scaling_law, "SHA256", hashlib.sha256(content).hexdigest())
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return flagsaver.as_parsed(clark_curves=str(path))

    return write


@pytest.fixture(scope="module")
def results():
    def run(side, seed):
        return FinishedRun(seed, 8e-3, [], {"test": {"eval/loss": 2.0 + 0.01 * seed}}, None, 1.0)

    return synthetic_results(scaling_law.CLAIM, run)


def verdict(results):
    return overall(scaling_law.findings(results))


def test_table_3s_law_is_found(use, results, monkeypatch):
    # One law for all, because they share dense models.
    law = dict.fromkeys(scaling_law.ROUTERS, scaling_law.TABLE_3["S-Base"])
    monkeypatch.setattr(scaling_law, "TABLE_3", law)
    with use(law, "curves.csv.gz"):
        assert verdict(results) == Verdict.REPRODUCED


def test_the_opposite_law_contradicts(use, results):
    laws = {router: reversed_law(law) for router, law in scaling_law.TABLE_3.items()}
    with use(laws, "reversed.csv"):
        assert {x.verdict for x in scaling_law.findings(results)} == {Verdict.CONTRADICTED}


def test_experts_without_effect_are_not_reproduced(use, results):
    laws = {router: without_experts(law) for router, law in scaling_law.TABLE_3.items()}
    with use(laws, "null.csv"):
        assert verdict(results) != Verdict.REPRODUCED


def test_the_last_losses_of_the_right_models_are_read():
    models = scaling_law.models_of(table_of(scaling_law.TABLE_3))
    assert set(models) == set(scaling_law.ROUTERS)
    for found in models.values():
        assert found.N.size == 2 * 6 * 10
        assert sorted(set(found.E)) == [2**i for i in range(10)]
        assert found.loss.max() < FIRST_LOSS


@pytest.mark.parametrize("name", ["curves.csv", "curves.csv.gz"])
def test_another_file_is_refused(tmp_path, name):
    content = table_of(scaling_law.TABLE_3).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with flagsaver.as_parsed(clark_curves=str(path)), pytest.raises(UserError, match="github"):
        scaling_law.clark_models()


def test_a_broken_file_is_refused(tmp_path):
    path = tmp_path / "curves.csv.gz"
    path.write_bytes(gzip.compress(b"abc" * 100)[:-5])
    with flagsaver.as_parsed(clark_curves=str(path)), pytest.raises(UserError, match="be read"):
        scaling_law.clark_models()


def test_without_the_file_a_sentence_says_where_it_is(tmp_path, results):
    with flagsaver.as_parsed(clark_curves=str(tmp_path / "missing.csv")):
        (finding,) = scaling_law.findings(results)
        assert finding.verdict == Verdict.NOT_RESOLVED
        assert scaling_law.URL in finding.needs
        check_table(scaling_law.table(results), rows=3)
        check_picture(results, tmp_path)


def test_table_and_picture(use, results, tmp_path):
    with use(scaling_law.TABLE_3, "shown.csv"):
        check_table(scaling_law.table(results), rows=9)
        check_picture(results, tmp_path)


def check_table(table, rows):
    assert len(table.rows) == rows
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert all(cell for row in table.rows for cell in row)


def check_picture(results, folder):
    figure = Figure(layout="constrained")
    scaling_law.draw(results, figure)
    figure.savefig(folder / "figure.png")
    assert (folder / "figure.png").stat().st_size > 0
