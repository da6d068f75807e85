"""What measurements say of a claim: reproduced, not resolved or contradicted.

A verdict is computed from samples, one value for each seed, by a rule that is fixed before the runs.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence

import numpy as np


class Verdict(enum.StrEnum):
    """REPRODUCED: the effect is there; CONTRADICTED: its opposite is.

    NOT_RESOLVED: the runs cannot tell.
    """

    REPRODUCED = "reproduced"
    NOT_RESOLVED = "not resolved"
    CONTRADICTED = "contradicted"


STANDARD_ERRORS = 2.0
"""A difference counts if it exceeds so many of its standard errors."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One statement of a claim with what was measured of it.

    Attributes:
      statement: what the paper says, such as "8 experts have a lower loss than the dense twin".
      paper: its figures and where they stand, such as "-1.505 -> -1.427 (Switch, Table 7)".
      ours: the same in our figures.
      verdict: see `Verdict`.
      needs: for "not resolved", what would resolve it; empty otherwise.
      decisive: whether the claim's verdict depends on it. Not so where the literature is divided, or
        the paper itself calls the effect small.
    """

    statement: str
    paper: str
    ours: str
    verdict: Verdict
    needs: str = ""
    decisive: bool = True


def compare(
    statement: str,
    paper: str,
    larger: Sequence[float],
    smaller: Sequence[float],
    *,
    unit: str = "",
    over: str = "seeds",
    margin: float = 0.0,
    decisive: bool = True,
) -> Finding:
    """Judges "the first is larger than the second" by the means over seeds.

    The difference of the means counts if it exceeds twice its standard error, and the margin. Seeds
    are taken as independent, although they share data: a paired test would be sharper, but three
    seeds are too few to trust how they are correlated. Their differences are shown all the same.

    Args:
      statement, paper, decisive: see `Finding`.
      larger: value of each seed of what the claim says is larger. A value that is infinite, such as
        the loss of a run that diverged, is larger than all finite ones.
      smaller: of what it says is smaller; one value for a constant.
      unit: of the values, for the text.
      over: what the values of a sample are of, for the text; only seeds are in the same order in both.
      margin: least difference that the claim means.

    Raises:
      ValueError: a sample is empty, or a value is NaN.
    """
    first, second = (np.asarray(sample, np.float64) for sample in (larger, smaller))
    if not first.size or not second.size or np.isnan(first).any() or np.isnan(second).any():
        raise ValueError(f"{statement}: samples are {larger} and {smaller}; each needs numbers.")
    shown = f"{describe(first, over)} against {describe(second, over)} {unit}".rstrip()
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        verdict = _by_rank(first, second)
        needs = "runs that do not diverge" if verdict == Verdict.NOT_RESOLVED else ""
        return Finding(statement, paper, shown, verdict, needs, decisive)
    difference = float(first.mean() - second.mean())
    error = math.hypot(standard_error(first), standard_error(second))
    threshold = max(STANDARD_ERRORS * error, margin)
    shown += f": difference {difference:.3g} ± {error:.2g}"
    if over == "seeds" and first.size == second.size > 1:
        shown += f" (by seed {', '.join(f'{each:.3g}' for each in first - second)})"
    if abs(difference) > threshold:
        verdict = Verdict.REPRODUCED if difference > 0 else Verdict.CONTRADICTED
        return Finding(statement, paper, shown, verdict, decisive=decisive)
    needs = _needs(difference, first, second, margin, over)
    return Finding(statement, paper, shown, Verdict.NOT_RESOLVED, needs, decisive)


def agree(
    statement: str, paper: str, printed: float, estimate: float, error: float, rounding: float
) -> Finding:
    """Judges "the estimate is the printed number".

    Contradicted if they differ by more than twice the standard error and what the print rounds off;
    not resolved if an estimate of such an error would agree with 0 as well.

    Args:
      statement, paper: see `Finding`.
      printed: the paper's number.
      estimate: ours.
      error: its standard error.
      rounding: half a unit of the last printed digit.
    """
    reach = STANDARD_ERRORS * error + rounding
    shown = f"{estimate:.4g} ± {error:.2g}"
    if abs(estimate - printed) > reach:
        return Finding(statement, paper, shown, Verdict.CONTRADICTED)
    if abs(printed) <= STANDARD_ERRORS * error:
        return Finding(statement, paper, shown, Verdict.NOT_RESOLVED, "more data")
    return Finding(statement, paper, shown, Verdict.REPRODUCED)


def overall(findings: Sequence[Finding]) -> Verdict:
    """Of a claim by its decisive findings: contradicted if one is, reproduced if all are."""
    verdicts = {finding.verdict for finding in findings if finding.decisive}
    if Verdict.CONTRADICTED in verdicts:
        return Verdict.CONTRADICTED
    return Verdict.REPRODUCED if verdicts == {Verdict.REPRODUCED} else Verdict.NOT_RESOLVED


def standard_error(sample: np.ndarray) -> float:
    """Of the mean; 0 for a constant, which is one value."""
    return float(sample.std(ddof=1) / math.sqrt(sample.size)) if sample.size > 1 else 0.0


def describe(sample: Sequence[float] | np.ndarray, over: str = "seeds") -> str:
    """'1.836 ± 0.009 (3 seeds)': mean and standard error; a constant is its value."""
    values = np.asarray(sample, np.float64)
    finite = values[np.isfinite(values)]
    if finite.size < values.size:
        others = f", the others {describe(finite, over)}" if finite.size else ""
        return f"{values.size - finite.size} of {values.size} {over} diverged{others}"
    if values.size == 1:
        return f"{values[0]:.4g}"
    return f"{values.mean():.4g} ± {standard_error(values):.2g} ({values.size} {over})"


def _by_rank(first: np.ndarray, second: np.ndarray) -> Verdict:
    """Where some values are infinite, only samples that do not overlap are told apart."""
    if first.min() > second.max():
        return Verdict.REPRODUCED
    return Verdict.CONTRADICTED if first.max() < second.min() else Verdict.NOT_RESOLVED


def _needs(
    difference: float, first: np.ndarray, second: np.ndarray, margin: float, over: str
) -> str:
    """How many values in a sample would resolve a difference as large as the measured one."""
    size = abs(difference)
    if not first.std() and not second.std() and not size:
        return "a setting in which they differ: all values are the same"
    if size <= margin:
        return f"a difference above {margin:g}, which the claim means; more {over} show none"
    deviation = math.hypot(*(x.std(ddof=1) if x.size > 1 else 0.0 for x in (first, second)))
    values = math.ceil((STANDARD_ERRORS * deviation / size) ** 2) if size else math.inf
    against = " (it is against the claim)" if difference < 0 else ""
    number = "more than 1,000" if values > 1000 else f"about {values}"
    return f"{number} {over} for a difference of this size{against}"
