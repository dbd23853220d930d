"""A comparison from its scenarios to its results: files and a table."""

import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from twotower_sim.compare import Compared, Comparison, compare_sides, load_sides
from twotower_sim.compare_page import write_compare_page
from twotower_sim.html_page import check_html
from twotower_sim.luck import quality_of
from twotower_sim.result import Stopwatch, all_or_nothing, write_json
from twotower_sim.result_cache import ResultCache
from twotower_sim.tables import first_alike, in_words, number, plain_estimate, shown
from twotower_sim.workers import Workers


def compare_and_report(
    paths: list[Path],
    overrides: list[str],
    replications: int,
    metrics: list[str],
    out: Path | None,
    cache: ResultCache,
    workers: Workers,
    quiet: bool,
    html: Path | None = None,
) -> None:
    """Run the scenarios at ``paths``, each at the seeds of the first; results go to ``out``, and a page to ``html``.
    Raises InputError."""
    if html:
        check_html("--html")
    watch = Stopwatch()
    sides = load_sides(paths, overrides)
    out = out or Path("out") / f"compare-{'-'.join(side.name for side in sides)}"[:100]
    with all_or_nothing() as stage:
        files = [stage(out / name) for name in ("compare.json", "run.json")]
        html_file = stage(html) if html else None
        compared = compare_sides(sides, replications, metrics, cache, workers, Console(stderr=True, quiet=quiet))
        told = report(compared)
        write_json(files[0], told)
        if html_file:
            runs = {side.name: side.runs[0] for side in sides}
            write_compare_page(html_file, told, runs, ["twotower-sim", *sys.argv[1:]])
        write_json(files[1], watch.circumstances(simulated=compared.simulated))
    if not quiet:
        _print(compared, Console())
        print(f"Results     {out}/compare.json, run.json" + (f"; {html}" if html else ""))


def report(of: Compared) -> dict[str, Any]:
    """The truth of a comparison: the same bytes wherever and however often it runs.

    ``answer``: in a sentence; ``saturation``: the verdict on each run. Of a metric, ``comparable``: whether it does not
    depend on how long runs are; ``verdict``: better, worse or not told apart from the first scenario's.
    """
    seed = of.sides[0].scenario.seed
    return {
        "replications": of.replications,
        "seeds": [(seed + i) % (1 << 64) for i in range(of.replications)],
        "metrics": of.metrics,
        "answer": of.sentence,
        "scenarios": [
            {
                "name": side.name,
                "saturation": side.verdicts,
                "metrics": {
                    name: None if found is None else _plain(found) | {"comparable": of.comparable(side, name)}
                    for name, found in zip(of.metrics, of.by_side[side.name], strict=True)
                },
                "quality": quality_of(side.scenario),
                "provenance": side.provenance,
                "warnings": side.warnings,
                "scenario": side.runs[0].resolved.model_dump(by_alias=True),
            }
            for side in of.sides
        ],
    }


def _plain(of: Comparison) -> dict[str, Any]:
    difference: dict[str, Any] = {
        "difference": plain_estimate(of.difference),
        "ratio": of.ratio,
        "ratio_interval": of.ratio_interval,
        "interval_contains_0": None,
        "verdict": of.verdict,
    }
    if of.shows is not None:
        difference["interval_contains_0"] = not of.shows
    return {"of": plain_estimate(of.of)} | ({} if of.difference is None else difference)


def _print(of: Compared, console: Console) -> None:
    sides = of.sides
    title = f"twotower-sim compare | differences to {sides[0].name}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Metric", overflow="fold")
    table.add_column(sides[0].name, justify="right", overflow="fold")
    for side in sides[1:]:
        table.add_column(side.name, justify="right", overflow="fold")
        table.add_column("Difference", justify="right", overflow="fold")
        table.add_column("Ratio", justify="right")
    for i, name in enumerate(of.metrics):
        base = of.by_side[sides[0].name][i]
        cells = [in_words(name), "" if base is None else number(base.of.mean)]
        for side in sides[1:]:
            cells += _cells(of.by_side[side.name][i])
        table.add_row(*cells)
    console.print(table)
    console.print(f"Answer      {of.sentence}", highlight=False, markup=False, soft_wrap=True)
    if of.replications > 1:
        console.print(
            f"95 % intervals (paired t) over {of.replications} replications; in brackets where they contain 0",
            highlight=False,
        )
    else:
        console.print("One replication: no intervals (--replications)", highlight=False)
    for side in sides:
        for warning in first_alike(side.warnings):
            console.print(f"Warning     {side.name}: {warning}", highlight=False, markup=False, soft_wrap=True)


def _cells(of: Comparison | None) -> list[str]:
    if of is None:
        return ["", "", ""]
    difference = shown(of.difference)
    ratio = "" if of.ratio is None else f"{of.ratio:.3f}"
    return [number(of.of.mean), f"({difference})" if of.shows is False else difference, ratio]
