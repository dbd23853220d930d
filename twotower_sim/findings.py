"""What a sweep found: which points bear their load, the best of these by each metric, and fronts between metrics."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from twotower_sim.figures import better, is_felt, is_paid
from twotower_sim.front import front
from twotower_sim.interval import estimate
from twotower_sim.luck import quality_of
from twotower_sim.saturation import STABLE
from twotower_sim.study import Point
from twotower_sim.sweep import Replication, Sweep
from twotower_sim.tables import heading, shown, value_in_words


class Best(NamedTuple):
    """The best point by a metric, and those that its replications do not tell apart from it; indices."""

    metric: str
    point: int
    alike: list[int]


class Findings:
    """Points that do not bear their load, in every replication, are the best of nothing."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self.qualities = [quality_of(point.runs[0].scenario) if point.runs else None for point in sweep.points]
        self.stable = [i for i, rows in enumerate(sweep.rows) if _is_stable(rows)]

    @cached_property
    def bests(self) -> list[Best]:
        found = (self._best(name) for name in self._sweep.study.metrics if better(name))
        return [of for of in found if of]

    @property
    def named(self) -> Best | None:
        """By what costs; else by the first metric."""
        return next((of for of in self.bests if of.metric.startswith("cost.")), next(iter(self.bests), None))

    @property
    def shown(self) -> Point | None:
        """The point that is looked at more closely: the one that the answer names, else the first that bears its load,
        else the first that ran."""
        ran = [i for i, rows in enumerate(self._sweep.rows) if rows[0].figures]
        found = [self.named.point] if self.named else [*self.stable, *ran]
        return self._sweep.points[found[0]] if found else None

    @property
    def sentence(self) -> str:
        """The answer in one."""
        points, named = self._sweep.points, self.named
        if not self.stable:
            return f"None of {len(points)} points bears its load."
        if len(self.stable) == 1:
            return f"Only {_said(points[self.stable[0]])} of {len(points)} bears its load."
        borne = f"{len(self.stable)} of {len(points)} points bear their load"
        if named is None:
            return f"{borne}."
        most = "most" if better(named.metric) > 0 else "least"
        value = f"{heading(named.metric)}, {shown(self._sweep.estimates[named.point][named.metric])}"
        return f"{borne}; of these {_said(points[named.point])} has the {most} {value}{_beside(named)}."

    @cached_property
    def fronts(self) -> list[dict[str, Any]]:
        """Of what is paid and what is felt, and quality: the numbers of the points that no other beats in all of it."""
        names = [name for name in self._sweep.study.metrics if better(name)]
        pairs = [(paid, felt) for paid in names if is_paid(paid) for felt in names if is_felt(felt)]
        return [{"paid": paid, "felt": felt, "points": self._front(paid, felt)} for paid, felt in pairs]

    def _front(self, *names: str) -> list[int]:
        there = [i for i in self.stable if all(self._sweep.estimates[i][name] for name in names)]
        keys = [(*(-better(name) * self._mean(i, name) for name in names), -(self.qualities[i] or 0.0)) for i in there]
        return [self._sweep.points[there[i]].number for i in front(keys)]

    def _best(self, name: str) -> Best | None:
        there = [i for i in self.stable if self._sweep.estimates[i][name]]
        if not there:
            return None
        best = max(there, key=lambda i: better(name) * self._mean(i, name))
        mine = self._values(best, name)
        return Best(name, best, [i for i in there if i != best and _alike(mine, self._values(i, name))])

    def _mean(self, index: int, name: str) -> float:
        found = self._sweep.estimates[index][name]
        assert found is not None
        return found.mean

    def _values(self, index: int, name: str) -> list[float | None]:
        return [row.figures.get(name) for row in self._sweep.rows[index]]


def _is_stable(rows: Sequence[Replication]) -> bool:
    return all(row.verdict == STABLE for row in rows)


def _alike(a: Sequence[float | None], b: Sequence[float | None]) -> bool:
    """Whether the 95 % interval of the difference, replications in pairs, contains 0."""
    pairs = [y - x for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs:
        return False
    of = estimate(pairs)
    return abs(of.mean) <= (of.half or 0.0)


def _said(point: Point) -> str:
    values = (f"{key.rpartition('.')[2]} {value_in_words(value)}" for key, value in point.values.items())
    return f"point {point.number} ({', '.join(values)})"


def _beside(of: Best) -> str:
    if not of.alike:
        return ""
    return f"; {len(of.alike)} other{'s are' if len(of.alike) > 1 else ' is'} not told apart from it"
