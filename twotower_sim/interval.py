"""Means over replications and how sure they are: 95 % intervals by Student's t distribution."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """Of the mean of what ``n`` values were drawn from. One value has no ``std`` and no ``half``."""

    n: int
    mean: float
    std: float | None
    half: float | None  # of the interval's width

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.mean + self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Of at least one value; of differences of pairs it is the paired t interval."""
    n, mean = len(values), fmean(values)
    if n == 1:
        return Estimate(n, mean, None, None)
    from scipy.special import stdtrit  # scipy takes a while to import

    std = stdev(values)
    return Estimate(n, mean, std, float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * std / sqrt(n))
