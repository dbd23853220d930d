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


def ratio_interval(base: Sequence[float], values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of mean(values) / mean(base), of pairs, by Fieller's theorem: all factors by which ``base`` may
    be multiplied so that ``values`` are not told apart from it. None with one pair, and where ``base`` is not told
    apart from 0."""
    n, x, y = len(base), fmean(base), fmean(values)
    if n == 1:
        return None
    noise = _t(n) ** 2 / n
    a, b, c = (
        u * v - noise * sum((p - u) * (q - v) for p, q in zip(us, vs, strict=True)) / (n - 1)
        for (u, us), (v, vs) in (((x, base), (x, base)), ((x, base), (y, values)), ((y, values), (y, values)))
    )
    if a <= 0:
        return None
    half = sqrt(max(b * b - a * c, 0.0))
    return (b - half) / a, (b + half) / a


def estimate(values: Sequence[float]) -> Estimate:
    """Of at least one value; of differences of pairs it is the paired t interval."""
    n, mean = len(values), fmean(values)
    if n == 1:
        return Estimate(n, mean, None, None)
    std = stdev(values)
    return Estimate(n, mean, std, _t(n) * std / sqrt(n))


def _t(n: int) -> float:
    """How many standard errors of a mean of ``n`` values the interval reaches to each side."""
    from scipy.special import stdtrit  # scipy takes a while to import

    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
