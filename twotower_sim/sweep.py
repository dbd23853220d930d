"""A study from its file to its results."""

import csv
import io
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from twotower_sim.console import progress_bar
from twotower_sim.errors import InputError
from twotower_sim.experiments import run_all
from twotower_sim.figures import Figures, check_name, check_names, figure, figures_of
from twotower_sim.interval import Estimate, estimate
from twotower_sim.result import all_or_nothing, circumstances, write_json
from twotower_sim.result_cache import ResultCache
from twotower_sim.study import Point, Study, load_study, plain
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


def sweep(
    path: Path, overrides: list[str], out: Path | None, cache: ResultCache, workers: Workers, quiet: bool
) -> None:
    """Run the study at ``path``; results go to ``out`` (default out/<name>) all at once, when they are complete. A
    point that cannot be run is said and leaves the others alone. Raises InputError where none can be run."""
    started, clock = datetime.now(UTC), time.perf_counter()
    study, points = load_study(path, overrides)
    for name in study.metrics:
        try:
            check_name(name)
        except InputError as error:
            raise InputError(f"{path}: metrics: {error}") from None
    out = out or Path("out") / study.name
    with all_or_nothing() as stage:
        files = [stage(out / name) for name in ("points.csv", "summary.csv", "sweep.json", "run.json")]
        rows, simulated = _run(path, study, points, cache, workers, Console(stderr=True, quiet=quiet))
        if all(row.error for of in rows for row in of):
            raise InputError("\n".join(dict.fromkeys(row.error for of in rows for row in of)))
        results = [_estimates(study, of) for of in rows]
        files[0].write_text(_points_csv(study, points, rows), encoding="utf-8")
        files[1].write_text(_summary_csv(study, points, results), encoding="utf-8")
        write_json(files[2], _report(study, points, rows, results))
        spent = {"simulated": simulated, "wall_s": time.perf_counter() - clock}
        write_json(files[3], circumstances(started) | spent)
    if not quiet:
        _print(study, points, rows, results, Console())
        print(f"Results     {out}/points.csv, summary.csv, sweep.json, run.json")


def _run(
    path: Path, study: Study, points: list[Point], cache: ResultCache, workers: Workers, errors: Console
) -> tuple[list[list[Replication]], int]:
    """Of every point its replications, and how many runs were not in the cache."""
    rows = [[Replication(run.scenario.seed, {}, {}, []) for run in point.runs] for point in points]
    runs = [(point, i) for point in points for i in range(len(point.runs))]
    known: Figures = {}
    simulated = 0
    with progress_bar(errors, None, f"simulating {study.name}", ETA_S) as bar:

        def progress(done: int, of: int) -> None:
            nonlocal simulated
            simulated = of
            bar(done, of)

        experiments = [point.runs[i] for point, i in runs]
        for index, outcome in run_all(experiments, cache, workers, progress):
            point, i = runs[index]
            row = rows[point.number - 1][i]
            row.error = outcome.error
            if outcome.summary is None:
                continue
            figures = figures_of(outcome.summary)
            if not known:
                _check_names(path, study, figures, whole=False)
            known |= figures
            row.figures = {name: figure(figures, name) for name in study.metrics}
            row.provenance, row.warnings = outcome.summary["provenance"], outcome.summary["warnings"]
    if known:
        _check_names(path, study, known, whole=True)
    for point, of in zip(points, rows, strict=True):
        if point.error:
            of.append(Replication(None, {}, {}, [], point.error))
    return rows, simulated


def _check_names(path: Path, study: Study, known: Figures, whole: bool) -> None:
    try:
        check_names(study.metrics, known, whole)
    except InputError as error:
        raise InputError(f"{path}: metrics: {error}") from None


def _estimates(study: Study, rows: list[Replication]) -> dict[str, Estimate | None]:
    """Of each metric over the replications that have it."""
    found: dict[str, Estimate | None] = {}
    for name in study.metrics:
        values = [value for row in rows if (value := row.figures.get(name)) is not None]
        found[name] = estimate(values) if values else None
    return found


# ---------------------------------------------------------------------- files


def _points_csv(study: Study, points: list[Point], rows: list[list[Replication]]) -> str:
    table = [
        [point.number, *_cells(study, point), i if row.seed is not None else None, row.seed]
        + [row.figures.get(name) for name in study.metrics]
        + [row.error]
        for point, of in zip(points, rows, strict=True)
        for i, row in enumerate(of, 1)
    ]
    return csv_text(["point", *study.keys, "replication", "seed", *study.metrics, "error"], table)


def _summary_csv(study: Study, points: list[Point], results: list[dict[str, Estimate | None]]) -> str:
    table = [
        [point.number, *_cells(study, point), name]
        + ([0, None, None, None, None] if of is None else [of.n, of.mean, of.std, of.low, of.high])
        for point, estimates in zip(points, results, strict=True)
        for name, of in estimates.items()
    ]
    return csv_text(["point", *study.keys, "metric", "n", "mean", "std", "low", "high"], table)


def _cells(study: Study, point: Point) -> list[str | None]:
    """Values of the keys that vary; None where a point leaves one as it is."""
    return [plain(point.values[key]) if key in point.values else None for key in study.keys]


def csv_text(header: list[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def plain_estimate(of: Estimate | None) -> dict[str, Any] | None:
    return None if of is None else {"n": of.n, "mean": of.mean, "std": of.std, "low": of.low, "high": of.high}


def _report(
    study: Study, points: list[Point], rows: list[list[Replication]], results: list[dict[str, Estimate | None]]
) -> dict[str, Any]:
    """The truth of a sweep: the same bytes wherever and however often it runs."""
    sources: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    warnings: dict[str, list[int]] = defaultdict(list)
    for point, of in zip(points, rows, strict=True):
        for part, source in dict.fromkeys((part, source) for row in of for part, source in row.provenance.items()):
            sources[part][source].append(point.number)
        for warning in dict.fromkeys(warning for row in of for warning in row.warnings):
            warnings[warning].append(point.number)
    return {
        "study": study.model_dump(by_alias=True),
        "points": [
            {
                "point": point.number,
                "values": point.values,
                "metrics": {name: plain_estimate(estimate) for name, estimate in estimates.items()},
            }
            for point, estimates in zip(points, results, strict=True)
        ],
        "provenance": [
            {"part": part, "source": source, "points": of}
            for part, found in sources.items()
            for source, of in found.items()
        ],
        "warnings": [{"warning": warning, "points": of} for warning, of in warnings.items()],
        "failed": [
            {"point": point.number, "seed": row.seed, "error": row.error}
            for point, of in zip(points, rows, strict=True)
            for row in of
            if row.error
        ],
    }


# ---------------------------------------------------------------------- terminal


def _print(
    study: Study,
    points: list[Point],
    rows: list[list[Replication]],
    results: list[dict[str, Estimate | None]],
    console: Console,
) -> None:
    title = f"twotower-sim sweep | {study.name}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right")
    for name in study.keys:
        table.add_column(in_words(name), overflow="fold")
    for name in study.metrics:
        table.add_column(in_words(name), justify="right", overflow="fold")
    for point, estimates in zip(points, results, strict=True):
        cells = [cell or "" for cell in _cells(study, point)]
        table.add_row(str(point.number), *cells, *(shown(of) for of in estimates.values()))
    console.print(table, markup=False)
    if study.replications > 1:
        console.print(f"Mean and 95 % interval (Student's t) over {study.replications} replications", highlight=False)
    for warning in first_alike(warning for of in rows for row in of for warning in row.warnings):
        console.print(f"Warning     {warning}", highlight=False, markup=False, soft_wrap=True)
    for point, of in zip(points, rows, strict=True):
        for error in dict.fromkeys(row.error for row in of if row.error):
            console.print(f"Failed      point {point.number}: {error}", highlight=False, markup=False, soft_wrap=True)


def first_alike(texts: Iterable[str]) -> list[str]:
    """The first of those that differ in numbers alone."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(re.sub(r"\d[\d,.]*", "0", text), text)
    return list(found.values())


def shown(of: Estimate | None) -> str:
    if of is None:
        return ""
    return number(of.mean) if of.half is None else f"{number(of.mean)} ± {number(of.half)}"


def in_words(name: str) -> str:
    """A dotted name as a heading that can be broken over lines."""
    return name.replace("_", " ").replace(".", " ")


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
