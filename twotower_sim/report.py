"""A run from its file to its results: what the command line does, and what a script may call."""

import sys
from pathlib import Path

from rich.console import Console

from twotower_sim.console import print_summary, progress_bar
from twotower_sim.html_page import check_html
from twotower_sim.html_report import write_html
from twotower_sim.metrics import evaluate
from twotower_sim.replica import Round
from twotower_sim.result import Stopwatch, all_or_nothing, summary, write_json, write_requests
from twotower_sim.scenario import load_scenario
from twotower_sim.simulation import Observer, prepare, simulate
from twotower_sim.timeline import Timeline
from twotower_sim.usage import Usage


def run_and_report(
    path: Path, overrides: list[str], out: Path | None, timeline: Path | None, html: Path | None, quiet: bool
) -> None:
    """Run the scenario at ``path``; results go to ``out`` (default out/<name>) all at once, when they are complete."""
    if html:
        check_html("--html")
    watch = Stopwatch()
    scenario = load_scenario(path, overrides)
    run = prepare(scenario, path.parent)
    out = out or Path("out") / scenario.name
    recorder, usage = Timeline(run) if timeline else None, Usage() if html else None
    errors = Console(stderr=True, quiet=quiet)
    with all_or_nothing() as stage:  # before the work: what cannot be written is said at once
        files = [stage(out / name) for name in ("summary.json", "requests.csv.gz", "run.json")]
        trace, html_file = stage(timeline) if timeline else None, stage(html) if html else None
        with progress_bar(errors, len(run.requests), "simulating") as progress:
            simulate(run, _all_of([of.observe for of in (recorder, usage) if of]), progress)
        results = evaluate(run)
        figures = summary(run, results)
        write_json(files[0], figures)
        write_requests(files[1], results.columns)
        if recorder and trace:
            recorder.write(trace, run, results)
        if usage and html_file:
            write_html(html_file, run, results, figures, usage, ["twotower-sim", *sys.argv[1:]])
        write_json(files[2], watch.circumstances())
    if not quiet:
        print_summary(figures, Console())
        print(
            f"Results     {out}/summary.json, requests.csv.gz, run.json"
            + "".join(f"; {of}" for of in (timeline, html) if of)
        )


def _all_of(observers: list[Observer]) -> Observer | None:
    """One that tells all; None of none, which is faster."""
    if len(observers) < 2:
        return observers[0] if observers else None

    def tell(replica: int, round_: Round) -> None:
        for observe in observers:
            observe(replica, round_)

    return tell


def check_scenario(path: Path, overrides: list[str]) -> None:
    """Load the scenario and all it names; print what it resolves to. Raises InputError."""
    run = prepare(load_scenario(path, overrides), path.parent)
    memory = run.memory
    print(f"{path}: fine")
    print(f"  {len(run.requests):,} requests, {int(run.requests.output_tokens.sum()):,} output tokens")
    print(f"  {run.gpus} x {run.gpu.name}, {run.scenario.deployment.replicas} replica(s) of {run.tower.name}")
    pools = f"{memory.kv_blocks:,} KV blocks of {run.scenario.memory.kv_block_tokens} tokens"
    print(f"  {pools} and {memory.state_slots:,} Mamba states a replica")
    for key, source in run.provenance.items():
        print(f"  {key}: {source}")
    for warning in run.warnings:
        print(f"  warning: {warning}")
