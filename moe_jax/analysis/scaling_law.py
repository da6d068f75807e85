"""The scaling law of routed language models (Clark et al., 2022, Equation 1), and its fit.

    log L = a log N + b log Ê + c log N log Ê + d
    1/Ê = 1 / (E - 1 + 1 / (1/E_start - 1/E_max)) + 1/E_max

Logarithms have base 10. N is the dense parameter count, which one token sees, E the number of
experts, L the validation loss in nats per token. Ê saturates: it starts at E_start for E = 1 and
never exceeds E_max. With E_start = 1 and E_max infinite it is E, and the law is bilinear.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy import optimize

_STARTS = ((0.5, 8.0), (2.0, 8.0), (2.0, 12.0))
_BOUNDS = ((0.0, 5.0), (5.5, 16.0))
"""Lowest and highest log2 of E_start and E_max. Some resampled data show no saturation at all."""


@dataclasses.dataclass(frozen=True)
class Models:
    """Trained models.

    Attributes:
      N: dense parameter counts [n].
      E: numbers of experts [n]; 1 for dense models.
      loss: validation losses [n] in nats per token.
    """

    N: np.ndarray
    E: np.ndarray
    loss: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Models":
        """Those at indices [m], or where a mask [n] is true."""
        return Models(self.N[chosen], self.E[chosen], self.loss[chosen])


@dataclasses.dataclass(frozen=True)
class Law:
    """Coefficients, in the letters of the paper."""

    a: float
    b: float
    c: float
    d: float
    E_start: float = 1.0
    E_max: float = math.inf

    def loss(self, N: np.ndarray | float, E: np.ndarray | float) -> np.ndarray:
        """Of dense parameter counts and numbers of experts; they broadcast."""
        terms = _terms(np.asarray(N), saturated(np.asarray(E), self.E_start, self.E_max))
        return 10 ** (terms @ [self.a, self.b, self.c, self.d])

    def cutoff(self) -> float:
        """The N at which routing no longer lowers the loss; infinite where it always does."""
        return 10 ** (-self.b / self.c) if self.c > 0 else math.inf

    def error(self, models: Models) -> float:
        """Root mean square error of log10 of the loss."""
        difference = np.log10(self.loss(models.N, models.E)) - np.log10(models.loss)
        return float(np.sqrt(np.mean(difference**2)))


def saturated(E: np.ndarray, E_start: float, E_max: float) -> np.ndarray:
    """Ê of each number of experts."""
    return 1 / (1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max)


def fit_bilinear(models: Models) -> Law:
    """The law without saturation, by least squares of log10 of the loss."""
    return _fit_linear(models, 1.0, math.inf)


def fit_saturating(models: Models) -> Law:
    """The law, by least squares of log10 of the loss, the best of several starts.

    The law is linear in a, b, c and d, so that only E_start and E_max are searched.
    """

    def residuals(logs: np.ndarray) -> np.ndarray:
        law = _fit_linear(models, *(2**logs))
        return np.log10(law.loss(models.N, models.E)) - np.log10(models.loss)

    bounds = tuple(zip(*_BOUNDS, strict=True))
    found = [
        optimize.least_squares(residuals, start, bounds=bounds, x_scale=(0.5, 1.0))
        for start in _STARTS
    ]
    best = min(found, key=lambda result: result.cost)
    return _fit_linear(models, *(2**best.x))


def bootstrap(
    models: Models, fit: Callable[[Models], Law], samples: int, rng: np.random.Generator
) -> list[Law]:
    """Fits to models that are drawn from the given ones, as many and with replacement."""
    size = models.N.size
    return [fit(models[rng.integers(size, size=size)]) for _ in range(samples)]


def slope(models: Models) -> float:
    """Of a straight line through log10 L against log10 E of models of one size."""
    return float(np.polyfit(np.log10(models.E), np.log10(models.loss), deg=1)[0])


def _fit_linear(models: Models, E_start: float, E_max: float) -> Law:
    terms = _terms(models.N, saturated(models.E, E_start, E_max))
    a, b, c, d = np.linalg.lstsq(terms, np.log10(models.loss), rcond=None)[0].tolist()
    return Law(a, b, c, d, float(E_start), float(E_max))


def _terms(N: np.ndarray, E: np.ndarray) -> np.ndarray:
    """What a, b, c and d are multiplied by [..., 4]."""
    n, e = np.broadcast_arrays(np.log10(N), np.log10(E))
    return np.stack([n, e, n * e, np.ones_like(n)], axis=-1)
