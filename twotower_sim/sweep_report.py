"""A sweep from its file to its results: files and a table."""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twotower_sim.findings import Findings
from twotower_sim.html_page import check_html
from twotower_sim.result import Stopwatch, all_or_nothing, write_json
from twotower_sim.result_cache import ResultCache
from twotower_sim.saturation import STABLE
from twotower_sim.study import load_study
from twotower_sim.sweep import Sweep, run_study, unstable
from twotower_sim.sweep_page import write_sweep_page
from twotower_sim.tables import first_alike, in_words, plain_estimate, shown
from twotower_sim.workers import Workers

FILES = ("points.csv", "summary.csv", "sweep.json")


def sweep_and_report(
    path: Path,
    overrides: list[str],
    out: Path | None,
    cache: ResultCache,
    workers: Workers,
    quiet: bool,
    html: Path | None = None,
) -> None:
    """Run the study at ``path`` and print it; results go to ``out`` (default out/<name>), and a page to ``html``, all
    at once, when they are complete. Raises InputError."""
    if html:
        check_html("--html")
    watch = Stopwatch()
    study, points = load_study(path, overrides)
    out = out or Path("out") / study.name
    with all_or_nothing() as stage:
        *files, run_file = (stage(out / name) for name in (*FILES, "run.json"))
        html_file = stage(html) if html else None
        done = run_study(path, study, points, cache, workers, Console(stderr=True, quiet=quiet))
        told = write_sweep(files, done)
        if html_file:
            write_sweep_page(html_file, told, points, ["twotower-sim", *sys.argv[1:]])
        write_json(run_file, watch.circumstances(simulated=done.simulated))
    if not quiet:
        _print(done, told["answer"], Console())
        print(f"Results     {out}/{', '.join(FILES)}, run.json" + (f"; {html}" if html else ""))


def write_sweep(files: list[Path], done: Sweep) -> dict[str, Any]:
    """To FILES, under whatever names; gives what the last of them says."""
    files[0].write_text(done.runs.csv(), encoding="utf-8")
    files[1].write_text(done.summary.csv(), encoding="utf-8")
    told = report(done)
    write_json(files[2], told)
    return told


def report(of: Sweep) -> dict[str, Any]:
    """The truth of a sweep: the same bytes wherever and however often it runs.

    ``answer``: in a sentence; ``shown``: the point that it names, and its scenario; ``best``: of each metric;
    ``fronts``: numbers of points that nothing beats in what is paid, what is felt and quality. Of a point, ``stable``:
    whether it bears its load in every run; ``quality``: share of the autoregressive model's, None where unpublished.
    """
    found = Findings(of)
    stable = set(found.stable)
    sources: dict[tuple[str, str], list[int]] = defaultdict(list)
    warnings: dict[str, list[int]] = defaultdict(list)
    for point, rows, _ in of.table:
        for source in dict.fromkeys(source for row in rows for source in row.provenance.items()):
            sources[source].append(point.number)
        for warning in dict.fromkeys(warning for row in rows for warning in row.warnings):
            warnings[warning].append(point.number)
    return {
        "study": of.study.model_dump(by_alias=True),
        "answer": found.sentence,
        "shown": found.shown
        and {"point": found.shown.number, "scenario": found.shown.runs[0].resolved.model_dump(by_alias=True)},
        "best": [
            {
                "metric": best.metric,
                "point": of.points[best.point].number,
                "not_told_apart": [of.points[i].number for i in best.alike],
            }
            for best in found.bests
        ],
        "fronts": found.fronts,
        "points": [
            {
                "point": point.number,
                "values": point.values,
                "stable": i in stable,
                "quality": quality,
                "metrics": {name: plain_estimate(estimate) for name, estimate in estimates.items()},
            }
            for i, ((point, _, estimates), quality) in enumerate(zip(of.table, found.qualities, strict=True))
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


def _print(of: Sweep, answer: str, console: Console) -> None:
    study = of.study
    title = f"twotower-sim sweep | {study.name}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right")
    for name in study.keys:
        table.add_column(in_words(name), overflow="fold")
    for name in study.metrics:
        table.add_column(in_words(name), justify="right", overflow="fold")
    for point, _, estimates in of.table:
        cells = [Text("" if cell is None else str(cell)) for cell in of.cells(point)]
        table.add_row(str(point.number), *cells, *(shown(estimate) for estimate in estimates.values()))
    console.print(table)
    console.print(f"Answer      {answer}", highlight=False, markup=False, soft_wrap=True)
    if study.replications > 1:
        console.print(f"Mean and 95 % interval (Student's t) over {study.replications} replications", highlight=False)
    for warning in first_alike(warning for rows in of.rows for row in rows for warning in row.warnings):
        console.print(f"Warning     {warning}", highlight=False, markup=False, soft_wrap=True)
    for point, rows, _ in of.table:
        if said := unstable([row.verdict for row in rows if row.verdict]):
            console.print(f"Unstable    point {point.number}: {said}", highlight=False, markup=False, soft_wrap=True)
        for error in dict.fromkeys(row.error for row in rows if row.error):
            console.print(f"Failed      point {point.number}: {error}", highlight=False, markup=False, soft_wrap=True)
