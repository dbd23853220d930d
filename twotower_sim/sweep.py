"""A study from its file to its results."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twotower_sim.console import progress_bar
from twotower_sim.errors import InputError
from twotower_sim.experiments import run_all
from twotower_sim.figures import Figures, check_name, check_names, figure, figures_of
from twotower_sim.interval import Estimate, estimate
from twotower_sim.result import all_or_nothing, circumstances, write_json
from twotower_sim.result_cache import ResultCache
from twotower_sim.saturation import BACKLOGGED, OVERLOADED, STABLE
from twotower_sim.study import Point, Study, load_study, plain
from twotower_sim.tables import csv_text, first_alike, in_words, plain_estimate, shown
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


def sweep(
    path: Path, overrides: list[str], out: Path | None, cache: ResultCache, workers: Workers, quiet: bool
) -> Sweep:
    """Run the study at ``path`` and print it; results go to ``out`` (default out/<name>) all at once, when they are
    complete. Raises InputError."""
    started, clock = datetime.now(UTC), time.perf_counter()
    study, points = load_study(path, overrides)
    out = out or Path("out") / study.name
    with all_or_nothing() as stage:
        files = [stage(out / name) for name in ("points.csv", "summary.csv", "sweep.json", "run.json")]
        done = run_study(path, study, points, cache, workers, Console(stderr=True, quiet=quiet))
        files[0].write_text(_points_csv(done), encoding="utf-8")
        files[1].write_text(_summary_csv(done), encoding="utf-8")
        write_json(files[2], _report(done))
        spent = {"simulated": done.simulated, "wall_s": time.perf_counter() - clock}
        write_json(files[3], circumstances(started) | spent)
    if not quiet:
        _print(done, Console())
        print(f"Results     {out}/points.csv, summary.csv, sweep.json, run.json")
    return done


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


# ---------------------------------------------------------------------- files


def _points_csv(of: Sweep) -> str:
    study = of.study
    table = [
        [point.number, *_cells(study, point), i if row.seed is not None else None, row.seed]
        + [row.figures.get(name) for name in study.metrics]
        + [row.verdict, row.error]
        for point, rows, _ in of.table
        for i, row in enumerate(rows, 1)
    ]
    return csv_text(["point", *study.keys, "replication", "seed", *study.metrics, "saturation", "error"], table)


def _summary_csv(of: Sweep) -> str:
    table = [
        [point.number, *_cells(of.study, point), name]
        + ([0, None, None, None, None] if at is None else [at.n, at.mean, at.std, at.low, at.high])
        for point, _, estimates in of.table
        for name, at in estimates.items()
    ]
    return csv_text(["point", *of.study.keys, "metric", "n", "mean", "std", "low", "high"], table)


def _cells(study: Study, point: Point) -> list[str | None]:
    """Values of the keys that vary; None where a point leaves one as it is."""
    return [plain(point.values[key]) if key in point.values else None for key in study.keys]


def _report(of: Sweep) -> dict[str, Any]:
    """The truth of a sweep: the same bytes wherever and however often it runs."""
    sources: dict[tuple[str, str], list[int]] = defaultdict(list)
    warnings: dict[str, list[int]] = defaultdict(list)
    for point, rows, _ in of.table:
        for source in dict.fromkeys(source for row in rows for source in row.provenance.items()):
            sources[source].append(point.number)
        for warning in dict.fromkeys(warning for row in rows for warning in row.warnings):
            warnings[warning].append(point.number)
    return {
        "study": of.study.model_dump(by_alias=True),
        "points": [
            {
                "point": point.number,
                "values": point.values,
                "metrics": {name: plain_estimate(estimate) for name, estimate in estimates.items()},
            }
            for point, _, estimates in of.table
        ],
        "provenance": [{"part": part, "source": source, "points": at} for (part, source), at in sources.items()],
        "warnings": [{"warning": warning, "points": at} for warning, at in warnings.items()],
        "unstable": [
            {"point": point.number, "seed": row.seed, "saturation": row.verdict}
            for point, rows, _ in of.table
            for row in rows
            if row.verdict not in ("", STABLE)
        ],
        "failed": [
            {"point": point.number, "seed": row.seed, "error": row.error}
            for point, rows, _ in of.table
            for row in rows
            if row.error
        ],
    }


# ---------------------------------------------------------------------- terminal


def _print(of: Sweep, console: Console) -> None:
    study = of.study
    title = f"twotower-sim sweep | {study.name}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right")
    for name in study.keys:
        table.add_column(in_words(name), overflow="fold")
    for name in study.metrics:
        table.add_column(in_words(name), justify="right", overflow="fold")
    for point, _, estimates in of.table:
        cells = [cell or "" for cell in _cells(study, point)]
        table.add_row(str(point.number), *map(Text, cells), *(shown(estimate) for estimate in estimates.values()))
    console.print(table)
    if study.replications > 1:
        console.print(f"Mean and 95 % interval (Student's t) over {study.replications} replications", highlight=False)
    for warning in first_alike(warning for rows in of.rows for row in rows for warning in row.warnings):
        console.print(f"Warning     {warning}", highlight=False, markup=False, soft_wrap=True)
    for point, rows, _ in of.table:
        if said := unstable([row.verdict for row in rows if row.verdict]):
            console.print(f"Unstable    point {point.number}: {said}", highlight=False, markup=False, soft_wrap=True)
        for error in dict.fromkeys(row.error for row in rows if row.error):
            console.print(f"Failed      point {point.number}: {error}", highlight=False, markup=False, soft_wrap=True)


def unstable(verdicts: list[str]) -> str:
    """What to say of replications whose load is more than the deployment bears; "" where there are none."""
    found = [f"{name} in {verdicts.count(name)}" for name in (BACKLOGGED, OVERLOADED) if name in verdicts]
    if not found:
        return ""
    return f"{', '.join(found)} of {len(verdicts)} runs, whose latencies would be others if they went on"
