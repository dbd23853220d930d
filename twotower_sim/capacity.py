"""The least costly deployment that meets objectives: of every candidate the fewest replicas, by doubling and bisection.

More replicas never make a figure worse, so that where ``n`` meet the objectives ``n + 1`` do; that is all that is taken
for granted. A run that is not stable meets nothing: its percentiles would be others if it went on.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

from twotower_sim.errors import InputError
from twotower_sim.figures import figure, figures_of
from twotower_sim.front import front as front_of
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
    def settled(self) -> bool:
        """Whether every run was long enough for its verdict to be relied on, as far as is known."""
        return all(summary["saturation"]["settled"] is not False for summary in self.summaries)

    @property
    def meets(self) -> bool:
        return self.stable and self.ratio <= 1

    @property
    def cost(self) -> float:
        return self.shape.candidate.cost(self.shape.replicas)

    @property
    def price(self) -> str:
        return f"{self.gpus} GPU{'s' * (self.gpus > 1)}, ${self.cost:.2f} an hour"

    @property
    def gpus(self) -> int:
        return self.shape.replicas * self.shape.candidate.gpus

    @property
    def verdict(self) -> str:
        return "/".join(dict.fromkeys(self.verdicts)) or f"not possible: {self.error}"

    @property
    def deployment(self) -> str:
        return f"{self.shape.replicas} x ({self.shape.candidate.name})"


Try = Callable[[list[Shape]], Iterable[list[dict[str, Any]] | str]]
"""Runs shapes, side by side if it can: the summaries of all replications of each, or why there are none."""


@dataclass(frozen=True)
class Answer:
    """``best`` None: nothing meets the objectives, and ``closest`` comes nearest; or the cheapest that does is
    ``closest``, since its load had not settled: a longer one may take more. ``fewest``: of every candidate that
    meets them; ``dearer``: of those that were given up since others of their group cost less, which; ``given_up``: why
    the rest does not."""

    best: Trial | None
    closest: Trial | None
    fewest: list[Trial]
    dearer: dict[str, str]
    given_up: dict[str, str]
    trials: list[Trial]


def find(candidates: Sequence[Candidate], objectives: Sequence[Objective], most_gpus: int, run: Try) -> Answer:
    """The answer where all candidates are known."""
    search = Search(objectives, most_gpus, run)
    search.add(candidates)
    return search.answer


class Search:
    """Finds the fewest replicas of candidates that come in batches, and remembers.

    All candidates of a batch advance together, a trial each, so that their trials can run side by side. One that can no
    longer be as cheap as another of its group that meets the objectives, at no lower quality, is given up; where such a
    one is known from an earlier batch, the first trial is the most replicas that do not cost more.
    """

    def __init__(self, objectives: Sequence[Objective], most_gpus: int, run: Try) -> None:
        self._objectives, self._most, self._run = objectives, most_gpus, run
        self._trials: dict[tuple[str, int], Trial] = {}
        self._fewest: dict[str, Trial] = {}
        self._dearer: dict[str, str] = {}
        self._given_up: dict[str, str] = {}

    def add(self, candidates: Sequence[Candidate]) -> None:
        searches: dict[str, tuple[Candidate, Generator[int, bool, int | None]]] = {}
        asked: dict[str, int] = {}
        for of in candidates:
            if any(of.name in known for known in (self._fewest, self._dearer, self._given_up, asked)):
                continue
            if of.gpus > self._most:
                self._given_up[of.name] = f"one replica has {of.gpus} GPUs; {self._most} allowed"
                continue
            searches[of.name] = of, _fewest(self._most // of.gpus, self._affordable(of))
            asked[of.name] = next(searches[of.name][1])
        while asked:
            shapes = [Shape(searches[name][0], replicas) for name, replicas in asked.items()]
            for shape, outcome in zip(shapes, self._run(shapes), strict=True):
                self._trials[shape.candidate.name, shape.replicas] = judge(shape, outcome, self._objectives)
            asked = {
                name: following
                for name, replicas in asked.items()
                if (following := self._following(*searches[name], self._trials[name, replicas])) is not None
            }

    def _following(self, of: Candidate, search: Generator[int, bool, int | None], trial: Trial) -> int | None:
        """How many replicas to try next; None where the fewest are found, or the candidate is given up."""
        try:
            following = search.send(trial.meets)
        except StopIteration as end:
            if end.value is None:
                self._given_up[of.name] = trial.error or f"{self._most} GPUs do not meet the objectives"
            else:
                self._fewest[of.name] = self._trials[of.name, end.value]
            return None
        least = self.least(of)
        if trial.error:
            self._given_up[of.name] = trial.error
        elif (known := self._best_beside(of)) and of.cost(least) > known.cost:
            self._dearer[of.name] = f"{least} replicas or more cost more than {known.deployment}"
        else:
            return following
        return None

    def _best_beside(self, of: Candidate) -> Trial | None:
        """The cheapest that is known to do, of the others of its group whose quality is as good."""
        others = (
            trial
            for trial in self._trials.values()
            if trial.meets
            and trial.shape.candidate.group == of.group
            and trial.shape.candidate.name != of.name
            and (trial.shape.candidate.quality or 0.0) >= (of.quality or 0.0)
        )
        return min(others, key=_order, default=None)

    def _affordable(self, of: Candidate) -> int:
        """The most replicas that cost no more than what is known to do; 1 where nothing is."""
        known = self._best_beside(of)
        return max(int(known.cost / of.usd_per_hour * (1 + 1e-9)), 1) if known and of.usd_per_hour else 1

    def least(self, of: Candidate) -> int:
        """Replicas below which it is known not to do."""
        return 1 + max(
            (n for name, n in self._trials if name == of.name and not self._trials[name, n].meets), default=0
        )

    def most_tried(self, of: Candidate) -> Trial | None:
        """The trial of the most replicas."""
        mine = (trial for trial in self._trials.values() if trial.shape.candidate.name == of.name)
        return max(mine, key=lambda trial: trial.shape.replicas, default=None)

    def fewest(self, of: Candidate) -> Trial | None:
        return self._fewest.get(of.name)

    @property
    def answer(self) -> Answer:
        trials = list(self._trials.values())
        best = min((of for of in trials if of.meets), key=_order, default=None)
        closest = None if best else min(trials, key=lambda of: (not of.stable, of.ratio, of.cost), default=None)
        if best and not best.settled:
            best, closest = None, best
        return Answer(best, closest, list(self._fewest.values()), dict(self._dearer), dict(self._given_up), trials)


def _order(of: Trial) -> tuple[float, float]:
    return of.cost, of.ratio


def _fewest(most: int, first: int = 1) -> Generator[int, bool, int | None]:
    """Asks whether so many replicas do, ``first`` at first; returns the fewest that do, or None."""
    low, high = 0, min(first, most)  # low do not
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
    share of each other, or further apart where the load between them is too short to settle; (load, inf) where it is
    the most that was tried, or that settles."""
    low, high = 1.0, 1.0
    while high < most:
        high = min(high * 1.25, most)
        bears = _bears(best, high, objectives, run)
        if bears is None:
            return low, inf
        if not bears:
            break
        low = high
    else:
        return most, inf
    while high / low > 1 + within:
        middle = (low * high) ** 0.5
        bears = _bears(best, middle, objectives, run)
        if bears is None:
            return low, high
        low, high = (middle, high) if bears else (low, middle)
    return low, high


def _bears(best: Trial, load: float, objectives: Sequence[Objective], run: Try) -> bool | None:
    """None where the load is too short to tell."""
    shape = best.shape._replace(load=load)
    (found,) = run([shape])
    if isinstance(found, str):  # what ran before does not now
        raise InputError(f"{best.deployment}: {found}")
    trial = judge(shape, found, objectives)
    return None if trial.meets and not trial.settled else trial.meets


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Those than which no other is at least as good in cost, in distance from the bounds and in quality, and better in
    one."""

    def key(of: Trial) -> tuple[float, float, float]:
        return of.cost, of.ratio, -(of.shape.candidate.quality or 0.0)

    return [trials[i] for i in front_of([key(of) for of in trials])]
