"""A distribution as points of its quantile function, straight between them: [probability, value], from 0 to 1."""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

FINE, COARSE = (0.008, 0.0005), (0.03, 0.003)
"""How far a table may be off: share of a value, and of the probability (nearer to the ends less)."""
Point = Annotated[tuple[float, float], Field(strict=False)]  # a list will do
Table = list[Point]


class Part(BaseModel):
    """Of a fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


def between(low: float, high: float) -> Callable[[Table], Table]:
    """A validator of tables with values inside these bounds."""

    def check(table: Table) -> Table:
        if len(table) < 2 or table[0][0] != 0 or table[-1][0] != 1:
            raise ValueError("expected [probability, value] from probability 0 to 1")
        for (p, x), (q, y) in pairwise(table):
            if p >= q or x > y:
                raise ValueError(
                    f"found {[p, x]} before {[q, y]}; expected rising probabilities, values that never fall"
                )
        if not low <= table[0][1] <= table[-1][1] <= high:
            raise ValueError(f"found values from {table[0][1]:g} to {table[-1][1]:g}; allowed: {low:g} to {high:g}")
        return table

    return check


def quantiles(values: np.ndarray, precision: tuple[float, float] = FINE) -> Table:
    """As few points as keep the quantile of every probability near that of a near probability (Douglas and Peucker's
    splitting at the worst point)."""
    tolerance, near = precision
    x = np.sort(values).astype(float)
    n, at = len(x), np.arange(len(x))
    slack = np.minimum(n * near, 0.1 * np.minimum(at, n - 1 - at)).astype(int)
    margin = tolerance * np.abs(x) + 1e-9
    low, high = (x - margin)[at - slack], (x + margin)[at + slack]
    p = at / max(n - 1, 1)
    kept, segments = {0, n - 1}, [(0, n - 1)]
    while segments:
        a, b = segments.pop()
        part = slice(a + 1, b)
        line = x[a] + (x[b] - x[a]) * (p[part] - p[a]) / (p[b] - p[a]) if b > a else x[:0]
        beyond = np.maximum(low[part] - line, line - high[part]) / (np.abs(x[part]) + 1)
        if len(beyond) and beyond.max() > 0:
            worst = a + 1 + int(beyond.argmax())
            kept.add(worst)
            segments += [(a, worst), (worst, b)]
    points = {round(float(p[i]), 5): float(f"{x[i]:.6g}") for i in sorted(kept)}
    return list((points | {1.0: float(f"{x[-1]:.6g}")}).items())


def at(table: Table, probability: np.ndarray) -> np.ndarray:
    """Quantiles, float64."""
    p, x = np.array(table).T
    return np.interp(probability, p, x)
