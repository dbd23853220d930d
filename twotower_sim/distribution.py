"""Samples into AIPerf's summary of a metric: avg, min, max, std and percentiles."""

from math import sqrt
from typing import Any

import numpy as np

PERCENTILES = (50, 75, 90, 95, 99)
EXACT_SAMPLES = 1 << 18
"""Up to this many samples percentiles are exact; beyond, samples within 0.1 % of each other are counted as one."""
_BIN_BITS = 42
"""Low bits of a float64 that a bin ignores: 2^10 bins an octave, at most 0.1 % wide."""


class Distribution:
    """Collects weighted samples >= 0 and summarises them in bounded memory."""

    def __init__(self) -> None:
        self._kept: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._held = self._count = 0
        self._sum = self._squares = 0.0
        self._min, self._max = np.inf, -np.inf

    def add(self, samples: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Samples (n,) with integer weights (n,), 1 where not given."""
        samples = np.asarray(samples, float)
        if weights is None:
            count, total, squares = len(samples), samples.sum(), (samples * samples).sum()
        else:
            samples, weights = samples[weights > 0], weights[weights > 0]
            weighted = samples * weights
            count, total, squares = int(weights.sum()), weighted.sum(), (weighted * samples).sum()
        if not count:
            return
        self._count += count
        self._sum += float(total)
        self._squares += float(squares)
        self._min, self._max = min(self._min, float(samples.min())), max(self._max, float(samples.max()))
        self._keep(samples, weights)
        if self._held > EXACT_SAMPLES:
            self._fold()

    def _keep(self, samples: np.ndarray, weights: np.ndarray | None) -> None:
        self._kept.append((samples, weights))
        self._held += len(samples)

    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        weights = [np.ones(len(samples), np.int64) if w is None else w for samples, w in self._kept]
        return np.concatenate([samples for samples, _ in self._kept]), np.concatenate(weights)

    def _fold(self) -> None:
        """Replace the samples of a bin by its centre, which falls into the same bin again."""
        samples, weights = self._all()
        bins = samples.view(np.int64) >> _BIN_BITS  # the bits of floats >= 0 are in the floats' order
        low = int(bins.min())
        counts = np.bincount(bins - low, weights).astype(np.int64)
        filled = np.flatnonzero(counts)
        centres = ((filled + low) << _BIN_BITS) + (1 << _BIN_BITS - 1)
        self._kept, self._held = [], 0
        self._keep(centres.view(np.float64), counts[filled])

    def summary(self, unit: str) -> dict[str, Any]:
        """``{unit, count, avg, min, max, std, p50, …}``; null without samples; ``std`` divides by their count."""
        keys = ["avg", "min", "max", "std", *(f"p{p}" for p in PERCENTILES)]
        if not self._count:
            return {"unit": unit, "count": 0} | dict.fromkeys(keys)
        avg = self._sum / self._count
        std = sqrt(max(self._squares / self._count - avg * avg, 0.0))  # below 0 by rounding only
        values = [avg, self._min, self._max, std, *self._percentiles()]
        return {"unit": unit, "count": self._count} | dict(zip(keys, values, strict=True))

    def _percentiles(self) -> list[float]:
        """Linear interpolation between order statistics, as numpy's default."""
        samples, weights = self._all()
        order = np.argsort(samples)
        samples, below = samples[order], np.cumsum(weights[order])
        at = (self._count - 1) * np.array(PERCENTILES) / 100
        low, high = (samples[np.searchsorted(below, side(at), side="right")] for side in (np.floor, np.ceil))
        return np.clip(low + (high - low) * (at - np.floor(at)), self._min, self._max).tolist()


def scalar(value: float | None, unit: str) -> dict[str, Any]:
    """A figure of the whole run in the same shape; it has no distribution."""
    return {"unit": unit, "avg": value} | dict.fromkeys(["min", "max", "std", *(f"p{p}" for p in PERCENTILES)])


def of(samples: np.ndarray, unit: str) -> dict[str, Any]:
    """Summary of samples that are all there."""
    distribution = Distribution()
    for low in range(0, len(samples), EXACT_SAMPLES):
        distribution.add(samples[low : low + EXACT_SAMPLES])
    return distribution.summary(unit)
