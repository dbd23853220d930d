"""A plan from its file to its results: files and a table."""

import sys
from math import inf
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from twotower_sim.capacity import Trial, front
from twotower_sim.html_page import check_html
from twotower_sim.plan_file import PlanFile
from twotower_sim.plan_page import write_plan_page
from twotower_sim.planner import Plan, Planner
from twotower_sim.result import Stopwatch, all_or_nothing, write_json
from twotower_sim.result_cache import ResultCache
from twotower_sim.tables import in_words, number, plain_estimate, shown
from twotower_sim.workers import Workers

FILES = ("plan.json", "candidates.csv", "trials.csv")
CANDIDATES, GIVEN_UP = 20, 12
"""How many of each a terminal shows."""


def plan_and_report(
    path: Path,
    overrides: list[str],
    out: Path | None,
    cache: ResultCache,
    workers: Workers,
    quiet: bool,
    html: Path | None = None,
) -> None:
    """Find the least costly deployment for the plan at ``path``; results go to ``out`` (default out/<name>), and a page
    to ``html``. Raises InputError."""
    if html:
        check_html("--html")
    watch = Stopwatch()
    planner = Planner(path, overrides, cache, workers, Console(stderr=True, quiet=quiet))
    out = out or Path("out") / planner.asked.name
    with all_or_nothing() as stage:
        *files, run_file = (stage(out / name) for name in (*FILES, "run.json"))
        html_file = stage(html) if html else None
        plan = planner.solve()
        told = write_plan(files, plan)
        if html_file:
            write_plan_page(html_file, told, plan.experiment, ["twotower-sim", *sys.argv[1:]])
        write_json(run_file, watch.circumstances())
    if not quiet:
        _print(plan, Console())
        print(f"Results     {out}/{', '.join(FILES)}, run.json" + (f"; {html}" if html else ""))


def write_plan(files: list[Path], plan: Plan) -> dict[str, Any]:
    """To FILES, under whatever names; gives what the first of them says."""
    told = report(plan)
    write_json(files[0], told)
    files[1].write_text(plan.candidates.csv(), encoding="utf-8")
    files[2].write_text(plan.trials.csv(), encoding="utf-8")
    return told


def report(plan: Plan) -> dict[str, Any]:
    """The truth of a plan: the same bytes wherever and however often it runs."""
    answer, shown = plan.answer, plan.shown
    bears, breaks = plan.load or (None, None)
    return {
        "plan": plan.asked.model_dump(by_alias=True),
        "answer": plan.sentence,
        "met": answer.best is not None,
        "best": _plain(answer.best),
        "closest": _plain(answer.closest),
        "one_replica_fewer": _plain(plan.one_fewer),
        "load": None if bears is None else {"bears": bears, "breaks": None if breaks == inf else breaks},
        "front": [_plain(of) for of in front([of for of in answer.trials if of.meets])],
        "cheapest": [_plain(of) for of in plan.cheapest],
        "candidates": [_plain(of) for of in plan.fewest],
        "trials": [_plain(of) for of in plan.tried],
        "dearer": answer.dearer,
        "given_up": answer.given_up,
        "provenance": shown.summaries[0]["provenance"] if shown and shown.summaries else {},
        "summary": shown.summaries[0] if shown and shown.summaries else None,
        "warnings": plan.warnings,
    }


def _plain(of: Trial | None) -> dict[str, Any] | None:
    if of is None:
        return None
    candidate = of.shape.candidate
    return {
        "candidate": candidate.name,
        "gpu": candidate.group[0],
        "decoding": candidate.group[1],
        "choices": dict(candidate.overrides),
        "replicas": of.shape.replicas,
        "gpus": of.gpus,
        "usd_per_hour": of.cost,
        "quality": candidate.quality,
        "saturation": of.verdicts,
        "settled": of.settled,
        "meets": of.meets,
        "objectives": {name: plain_estimate(estimate) for name, estimate in of.figures.items()},
    }


# ---------------------------------------------------------------------- terminal


def _print(plan: Plan, console: Console) -> None:
    asked, answer = plan.asked, plan.answer
    if answer.fewest:
        console.print(_table(plan), markup=False)

    def say(what: str, text: str) -> None:
        console.print(f"{what:12}{text}", highlight=False, markup=False, soft_wrap=True)

    say("Answer", plan.sentence)
    bounds = [f"{of.figure} {'>=' if of.least else '<='} {number(of.bound)}" for of in asked.bounds]
    bounds += [f"quality >= {asked.quality_floor:.1%}"] if asked.quality_floor else []
    say("Asked", ", ".join(bounds))
    if plan.one_fewer:
        say("One fewer", _why_not(asked, plan.one_fewer))
    if plan.load:
        bears, breaks = plan.load
        say(
            "Margin",
            f"it bears {bears:.2f} times the load, "
            + ("the largest tried, or that settles" if breaks == inf else f"breaks at {breaks:.2f}"),
        )
    elif answer.best and asked.margin and not plan.can_scale:
        say("Margin", "not found: no one key of this workload sets its rate")
    if answer.closest:
        say("Closest", _why_not(asked, answer.closest))
    if answer.dearer:
        say("Dearer", f"{len(answer.dearer)} candidates, than others on the same GPUs in the same way (candidates.csv)")
    for name, why in list(answer.given_up.items())[:GIVEN_UP]:
        say("Given up", f"{name}: {why}")
    if (more := len(answer.given_up) - GIVEN_UP) > 0:
        say("", f"and {more} more (candidates.csv)")
    for warning in plan.warnings:
        say("Warning", warning)


def _table(plan: Plan) -> Table:
    title = f"twotower-sim plan | {plan.asked.name}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Fewest replicas of", overflow="fold")
    for name in ("Replicas", "GPUs", "$/h", *map(in_words, plan.asked.objectives)):
        table.add_column(name, justify="right", overflow="fold")
    rows = plan.fewest if len(plan.fewest) <= CANDIDATES else plan.cheapest
    if more := len(plan.fewest) - len(rows):
        table.caption = f"The cheapest on each GPU type with each way of decoding; {more} more in candidates.csv"
    for of in rows:
        figures = [shown(of.figures.get(name)) for name in plan.asked.objectives]
        table.add_row(of.shape.candidate.name, str(of.shape.replicas), str(of.gpus), f"{of.cost:.2f}", *figures)
    return table


def _why_not(asked: PlanFile, of: Trial) -> str:
    if not of.stable:
        return f"{of.deployment} is {of.verdict}; its percentiles say nothing"
    if of.meets:
        return f"{of.deployment} meets all objectives in a load that had not settled; a longer one may take more"
    missed = [bound.figure for bound in asked.bounds if bound.ratio(of.figures[bound.figure]) > 1]
    return f"{of.deployment}: " + ", ".join(f"{name} {shown(of.figures[name])}" for name in missed)
