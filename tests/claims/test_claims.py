"""What holds for every claim, and the pattern in docs/claims.md."""

import importlib
import pathlib
import pickle
import re

import pytest

from moe_jax.reproduction.claim import Claim, Measurement, Profile
from moe_jax.reproduction.results import FinishedRun
from tests.reproduction.synthetic import synthetic_results

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "experiments/claims").glob("[!_]*.py"))


def claim_of(name: str) -> Claim:
    return importlib.import_module(f"experiments.claims.{name}").CLAIM


def measurements() -> list[Measurement]:
    """Of all sides of all claims, in both profiles."""
    sides = [
        side for name in NAMES for profile in Profile for side in claim_of(name).sides(profile)
    ]
    return [measurement for side in sides for measurement in side.measurements]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("profile", Profile)
def test_sides_are_valid_and_told_apart_and_have_three_seeds(name, profile):
    claim = claim_of(name)
    assert claim.name == name
    sides = claim.sides(profile)
    assert len({side.name for side in sides}) == len(sides)
    for side in sides:
        assert len(set(side.seeds)) == len(side.seeds) >= 3, side.name
        side.config(side.learning_rates[0], side.seeds[0]).validate()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("profile", Profile)
def test_all_sides_have_the_same_learning_rates_to_choose_from(name, profile):
    assert len({side.learning_rates for side in claim_of(name).sides(profile)}) <= 1


def test_a_measurement_of_one_name_is_one_measurement():
    """Runs are shared, and keep what is measured by its name."""
    by_name = {m.name: pickle.dumps(m.measure) for m in measurements()}
    assert all(by_name[m.name] == pickle.dumps(m.measure) for m in measurements())


def test_the_pattern_in_the_documentation_is_a_claim():
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/claims.md").read_text(), flags=re.DOTALL
    )
    names: dict = {"__name__": "documented"}
    exec(compile(block, "docs/claims.md", "exec"), names)
    claim = names["CLAIM"]
    for profile in Profile:
        for side in claim.sides(profile):
            side.config(side.learning_rates[0], 0).validate()

    def run(side, seed):
        loss = {"top-1": 1.8, "top-2": 1.7}[side.name] + 0.001 * seed
        return FinishedRun(seed, 1e-2, [], {"test": {"eval/loss": loss}}, None, 1.0)

    (finding,) = claim.findings(synthetic_results(claim, run))
    assert finding.verdict == "reproduced"
