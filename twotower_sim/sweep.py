"""A study that is run: the figures of every replication of every point."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from twotower_sim.console import progress_bar
from twotower_sim.errors import InputError
from twotower_sim.experiments import run_all
from twotower_sim.figures import Figures, check_name, check_names, figure, figures_of
from twotower_sim.interval import Estimate, estimate
from twotower_sim.result_cache import ResultCache
from twotower_sim.saturation import BACKLOGGED, OVERLOADED
from twotower_sim.study import Point, Study, plain
from twotower_sim.tables import Sheet
from twotower_sim.workers import Workers

ETA_S = 3600


@dataclass
class Replication:
    """What is kept of a run: the figures that are asked for, or ``error``, why there are none."""

    seed: int | None
    figures: Figures
    provenance: dict[str, str]
    warnings: list[str]
    error: str = ""
    verdict: str = ""  # on saturation


@dataclass(frozen=True)
class Sweep:
    """A study that was run: of every point its replications."""

    study: Study
    points: list[Point]
    rows: list[list[Replication]]
    simulated: int  # runs that were not in the cache

    @cached_property
    def estimates(self) -> list[dict[str, Estimate | None]]:
        """Of every point each metric over the replications that have it."""
        return [{name: _estimate(name, of) for name in self.study.metrics} for of in self.rows]

    @property
    def table(self) -> list[tuple[Point, list[Replication], dict[str, Estimate | None]]]:
        return list(zip(self.points, self.rows, self.estimates, strict=True))

    @property
    def runs(self) -> Sheet:
        """A row a replication: its point, values of what varies, seed, figures, verdict on its load, or error."""
        header = ["point", *self.study.keys, "replication", "seed", *self.study.metrics, "saturation", "error"]
        rows = [
            [point.number, *self.cells(point), i if row.seed is not None else None, row.seed]
            + [row.figures.get(name) for name in self.study.metrics]
            + [row.verdict, row.error]
            for point, rows, _ in self.table
            for i, row in enumerate(rows, 1)
        ]
        return Sheet(header, rows)

    @property
    def summary(self) -> Sheet:
        """A row a metric of a point: mean, standard deviation and 95 % interval over its replications."""
        header = ["point", *self.study.keys, "metric", "n", "mean", "std", "low", "high"]
        rows = [
            [point.number, *self.cells(point), name]
            + ([0, None, None, None, None] if at is None else [at.n, at.mean, at.std, at.low, at.high])
            for point, _, estimates in self.table
            for name, at in estimates.items()
        ]
        return Sheet(header, rows)

    def cells(self, point: Point) -> list[str | int | float | None]:
        """Values of the keys that vary, in words but for numbers; None where a point leaves one as it is."""
        return [_cell(point.values[key]) if key in point.values else None for key in self.study.keys]


def _cell(value: Any) -> str | int | float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else plain(value)


def run_study(
    path: Path, study: Study, points: list[Point], cache: ResultCache, workers: Workers, errors: Console
) -> Sweep:
    """Every point of the study at ``path``. One that cannot be run is said and leaves the others alone. Raises
    InputError where none can be run, and for metrics that there are not."""
    for name in study.metrics:
        _say_where(path, check_name, name)
    rows = [[Replication(run.scenario.seed, {}, {}, []) for run in point.runs] for point in points]
    places = [(point, i) for point in points for i in range(len(point.runs))]
    known: Figures = {}
    simulated = 0
    with progress_bar(errors, None, f"simulating {study.name}", ETA_S) as bar:

        def progress(done: int, of: int) -> None:
            nonlocal simulated
            simulated = of
            bar(done, of)

        for index, outcome in run_all([point.runs[i] for point, i in places], cache, workers, progress):
            point, i = places[index]
            row = rows[point.number - 1][i]
            row.error = outcome.error
            if outcome.summary is None:
                continue
            figures = figures_of(outcome.summary)
            if not known:
                _say_where(path, check_names, study.metrics, figures, False)
            known |= figures
            row.figures = {name: figure(figures, name) for name in study.metrics}
            row.provenance, row.warnings = outcome.summary["provenance"], outcome.summary["warnings"]
            row.verdict = outcome.summary["saturation"]["verdict"]
    for point, of in zip(points, rows, strict=True):
        if point.error:
            of.append(Replication(None, {}, {}, [], point.error))
    if not known:
        raise InputError("\n".join(dict.fromkeys(row.error for of in rows for row in of)))
    _say_where(path, check_names, study.metrics, known, True)
    return Sweep(study, points, rows, simulated)


def _say_where(path: Path, check: Callable[..., None], *of: Any) -> None:
    try:
        check(*of)
    except InputError as error:
        raise InputError(f"{path}: metrics: {error}") from None


def _estimate(name: str, rows: list[Replication]) -> Estimate | None:
    values = [value for row in rows if (value := row.figures.get(name)) is not None]
    return estimate(values) if values else None


def unstable(verdicts: list[str]) -> str:
    """What to say of replications whose load is more than the deployment bears; "" where there are none."""
    found = [f"{name} in {verdicts.count(name)}" for name in (BACKLOGGED, OVERLOADED) if name in verdicts]
    if not found:
        return ""
    return f"{', '.join(found)} of {len(verdicts)} runs, whose latencies would be others if they went on"
