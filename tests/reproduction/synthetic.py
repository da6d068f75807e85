"""Results that no run made, to see what claims say of them."""

from collections.abc import Callable

from moe_jax.reproduction.claim import Claim, Profile, Side
from moe_jax.reproduction.results import FinishedRun, Results, SideResult


def synthetic_results(
    claim: Claim, run: Callable[[Side, int], FinishedRun], profile: Profile = Profile.CPU
) -> Results:
    """Of all sides; `run` gives the run of a side and seed."""
    sides = {}
    for side in claim.sides(profile):
        rate = side.learning_rates[0]
        sides[side.name] = SideResult(
            side=side,
            config=side.config(rate, side.seeds[0]),
            learning_rate=rate,
            validation=dict.fromkeys(side.learning_rates, 1.0),
            runs=[run(side, seed) for seed in side.seeds],
            seconds=600.0,
            parameters=1000,
            algorithmic_flops=1e12,
            executed_flops=2e12,
        )
    return Results(profile, sides)
