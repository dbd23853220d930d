"""The least costly deployment that meets objectives: of every candidate the fewest replicas, by doubling and bisection.

More replicas never make a figure worse, so that where ``n`` meet the objectives ``n + 1`` do; that is all that is taken
for granted. A run that is not stable meets nothing: its percentiles would be others if it went on.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

from twotower_sim.figures import figure, figures_of
from twotower_sim.interval import Estimate, estimate
from twotower_sim.saturation import STABLE


class Objective(NamedTuple):
    """``figure``: dotted, as in a summary; at most ``bound``, or at least where ``least``."""

    figure: str
    bound: float
    least: bool = False

    def ratio(self, of: Estimate | None) -> float:
        """How far the bad end of an interval is from the bound: up to 1 meets it."""
        if of is None:
            return inf
        value = of.mean + (of.half or 0.0) * (-1 if self.least else 1)
        if self.least:
            return self.bound / value if value > 0 else inf
        return value / self.bound


@dataclass(frozen=True)
class Candidate:
    """A choice of everything but the number of replicas."""

    name: str
    overrides: Mapping[str, Any]
    gpus: int  # of a replica
    usd_per_hour: float  # of a replica
    quality: float | None  # share of the autoregressive model's, where it is published
    group: tuple[str, ...] = ()  # within which only the cheapest matters

    def cost(self, replicas: int) -> float:
        return replicas * self.usd_per_hour


class Shape(NamedTuple):
    """What is tried: a candidate, how many of it, and how much of the load."""

    candidate: Candidate
    replicas: int
    load: float = 1.0


@dataclass(frozen=True)
class Trial:
    """What came of it. ``figures``: of each objective, over replications; ``verdicts``: on stability, of each;
    ``ratio``: the worst of the objectives at the bad end of their intervals, of which up to 1 meets all; ``error``: why
    there is none of these."""

    shape: Shape
    figures: dict[str, Estimate | None]
    verdicts: list[str]
    ratio: float
    error: str = ""
    summaries: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def stable(self) -> bool:
        return bool(self.verdicts) and all(verdict == STABLE for verdict in self.verdicts)

    @property
    def meets(self) -> bool:
        return self.stable and self.ratio <= 1

    @property
    def cost(self) -> float:
        return self.shape.candidate.cost(self.shape.replicas)


Try = Callable[[list[Shape]], Iterable[list[dict[str, Any]] | str]]
"""Runs shapes, side by side if it can: the summaries of all replications of each, or why there are none."""


@dataclass
class Answer:
    """``best`` None: nothing meets the objectives, and ``closest`` comes nearest. ``fewest``: of every candidate that
    was not given up; ``given_up``: why the others were."""

    best: Trial | None
    closest: Trial | None
    fewest: list[Trial]
    given_up: dict[str, str]
    trials: list[Trial]


def find(candidates: Sequence[Candidate], objectives: Sequence[Objective], most_gpus: int, run: Try) -> Answer:
    """All candidates advance together, a trial each, so that their trials can run side by side; one that cannot be
    cheaper than what is known to do of its group is given up."""
    named = {of.name: of for of in candidates}
    given_up = {
        of.name: f"one replica has {of.gpus} GPUs; {most_gpus} allowed" for of in candidates if of.gpus > most_gpus
    }
    searches = {of.name: _fewest(most_gpus // of.gpus) for of in candidates if of.gpus <= most_gpus}
    asked = {name: next(search) for name, search in searches.items()}
    trials: dict[tuple[str, int], Trial] = {}
    best: dict[tuple[str, ...], Trial] = {}
    found: list[Trial] = []
    while asked:
        shapes = [Shape(named[name], replicas) for name, replicas in asked.items()]
        for shape, outcome in zip(shapes, run(shapes), strict=True):
            trial, group = judge(shape, outcome, objectives), shape.candidate.group
            trials[shape.candidate.name, shape.replicas] = trial
            if trial.meets and (group not in best or _order(trial) < _order(best[group])):
                best[group] = trial
        for name, replicas in list(asked.items()):
            del asked[name]
            trial, known = trials[name, replicas], best.get(named[name].group)
            least = 1 + max((n for key, n in trials if key == name and not trials[key, n].meets), default=0)
            try:
                following = searches[name].send(trial.meets)
            except StopIteration as end:
                if end.value is None:
                    given_up[name] = trial.error or f"{most_gpus} GPUs do not meet the objectives"
                else:
                    found.append(trials[name, end.value])
                continue
            if trial.error:
                given_up[name] = trial.error
            elif known and known.shape.candidate is not named[name] and named[name].cost(least) > known.cost:
                given_up[name] = f"{least} replicas or more cost more than {known.shape.candidate.name}"
            else:
                asked[name] = following
    cheapest = min(best.values(), key=_order, default=None)
    closest = None if best else min(trials.values(), key=lambda of: (not of.stable, of.ratio, of.cost), default=None)
    return Answer(cheapest, closest, found, given_up, list(trials.values()))


def _order(of: Trial) -> tuple[float, float]:
    return of.cost, of.ratio


def _fewest(most: int) -> Generator[int, bool, int | None]:
    """Asks whether so many replicas do; returns the fewest that do, or None."""
    low, high = 0, 1  # low do not
    while not (yield high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if (yield middle):
            high = middle
        else:
            low = middle
    return high


def judge(shape: Shape, found: list[dict[str, Any]] | str, objectives: Sequence[Objective]) -> Trial:
    if isinstance(found, str):
        return Trial(shape, {}, [], inf, found)
    figures: dict[str, Estimate | None] = {}
    worst = 0.0
    runs = [figures_of(summary) for summary in found]
    for objective in objectives:
        values = [value for of in runs if (value := figure(of, objective.figure)) is not None]
        of = figures[objective.figure] = estimate(values) if len(values) == len(runs) else None
        worst = max(worst, objective.ratio(of))
    verdicts = [summary["saturation"]["verdict"] for summary in found]
    return Trial(shape, figures, verdicts, worst, "", found)


def breaking_load(
    best: Trial, objectives: Sequence[Objective], run: Try, most: float = 8.0, within: float = 0.02
) -> tuple[float, float]:
    """(load that the deployment still bears, load at which it fails), as multiples of the one asked for; within that
    share of each other, or (most, inf)."""
    low, high = 1.0, 1.0
    while high < most:
        high = min(high * 1.25, most)
        if not _bears(best, high, objectives, run):
            break
        low = high
    else:
        return most, inf
    while high / low > 1 + within:
        middle = (low * high) ** 0.5
        if _bears(best, middle, objectives, run):
            low = middle
        else:
            high = middle
    return low, high


def _bears(best: Trial, load: float, objectives: Sequence[Objective], run: Try) -> bool:
    shape = best.shape._replace(load=load)
    (found,) = run([shape])
    return judge(shape, found, objectives).meets


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Those than which no other is at least as good in cost, in distance from the bounds and in quality, and better in
    one."""

    def key(of: Trial) -> tuple[float, float, float]:
        return of.cost, of.ratio, -(of.shape.candidate.quality or 0.0)

    def beaten(of: Trial) -> bool:
        return any(
            all(a <= b for a, b in zip(key(other), key(of), strict=True)) and key(other) != key(of) for other in trials
        )

    return sorted((of for of in trials if not beaten(of)), key=key)
