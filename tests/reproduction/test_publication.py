"""The committed reports: complete, within their time, and what the README says of them."""

import json
import pathlib
import shutil

import pytest

from moe_jax.errors import UserError
from moe_jax.reproduction import publication, report
from moe_jax.reproduction.verdicts import Finding, Verdict, overall

ROOT = pathlib.Path(__file__).parents[2]
CPU = ROOT / publication.FOLDER / "cpu"
CLAIMS = sorted(path.stem for path in (ROOT / "experiments/claims").glob("[!_]*.py"))


@pytest.fixture
def records():
    return {record["name"]: record for record in report.read_records(CPU)}


def test_every_claim_is_in_the_cpu_report(records):
    assert sorted(records) == CLAIMS
    assert all((CPU / f"{name}.png").stat().st_size > 10_000 for name in CLAIMS)


def test_the_report_is_made_of_the_json_files(tmp_path):
    copy = shutil.copytree(CPU, tmp_path / "cpu")
    report.write_reports(copy)
    for name in ("report.md", "report.html"):
        assert (copy / name).read_text() == (CPU / name).read_text(), name


@pytest.mark.parametrize("name", CLAIMS)
def test_verdicts_follow_from_the_findings(records, name):
    findings = [
        Finding(**{**finding, "verdict": Verdict(finding["verdict"])})
        for finding in records[name]["findings"]
    ]
    assert records[name]["verdict"] == overall(findings)


@pytest.mark.parametrize("name", CLAIMS)
def test_every_side_has_three_seeds_and_the_same_number_of_rates(records, name):
    sides = records[name]["sides"]
    assert all(len(side["seeds"]) >= 3 for side in sides)
    assert len({len(side["validation_loss_by_learning_rate"]) for side in sides}) <= 1


def test_a_claim_takes_at_most_45_minutes_and_all_take_at_most_4_hours(records):
    minutes = {name: report.minutes(record) for name, record in records.items()}
    assert max(minutes.values()) <= 45, minutes
    assert sum(minutes.values()) <= 4 * 60, minutes


def test_the_readme_has_the_verdicts():
    readme = (ROOT / "README.md").read_text()
    assert publication.with_verdicts(readme, ROOT) == readme


def project(root: pathlib.Path) -> pathlib.Path:
    """A project with a README that has markers, and no report."""
    readme = root / "README.md"
    readme.write_text("Before.\n<!-- verdicts -->\nOld.\n<!-- end of verdicts -->\nAfter.\n")
    return readme


def published_alone(name: str, title: str, folder: pathlib.Path) -> pathlib.Path:
    """A report of one claim: a committed one with another name and title."""
    folder.mkdir()
    record = json.loads((CPU / "capacity.json").read_text())
    (folder / f"{name}.json").write_text(json.dumps({**record, "name": name, "title": title}))
    shutil.copy(CPU / "capacity.png", folder / f"{name}.png")
    return folder


def test_a_report_of_one_claim_leaves_the_others(tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    readme = project(root)
    for name in ("first", "second"):
        output = published_alone(name, f"The {name}", tmp_path / name)
        folder = publication.publish(output, root)
    assert [record["name"] for record in report.read_records(folder)] == ["first", "second"]
    text = readme.read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n") and "Old." not in text
    assert text.count("[The first](docs/results/claims/cpu/report.md#the-first)") == 1
    assert text.count("[The second](docs/results/claims/cpu/report.md#the-second)") == 1


def test_a_folder_without_a_report_is_named(tmp_path):
    with pytest.raises(UserError, match=f"report={tmp_path} has no claim's JSON file"):
        publication.publish(tmp_path, tmp_path)


def test_findings_aside_are_counted_apart(records):
    table = report.verdict_table([records["priority"]])
    assert table.endswith("| 2 not resolved; aside: 1 reproduced |")
