"""A run from its file to its results: files and a table."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from twotower_sim.console import print_summary, progress_bar
from twotower_sim.html_page import check_html
from twotower_sim.html_report import write_html
from twotower_sim.metrics import Columns, evaluate
from twotower_sim.replica import Round
from twotower_sim.result import Stopwatch, all_or_nothing, summary, write_json, write_requests
from twotower_sim.scenario import Change, load_scenario
from twotower_sim.simulation import Observer, prepare, simulate
from twotower_sim.timeline import Timeline
from twotower_sim.usage import Usage
from twotower_sim.yaml_file import Source, path_of

FILES = ("summary.json", "requests.csv.gz")


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
        *files, run_file = (stage(out / name) for name in (*FILES, "run.json"))
        trace, html_file = stage(timeline) if timeline else None, stage(html) if html else None
        with progress_bar(errors, len(run.requests), "simulating") as progress:
            simulate(run, _all_of([of.observe for of in (recorder, usage) if of]), progress)
        results = evaluate(run)
        figures = summary(run, results)
        write_run(files, figures, results.columns)
        if recorder and trace:
            recorder.write(trace, run, results)
        if usage and html_file:
            write_html(html_file, run, results, figures, usage, ["twotower-sim", *sys.argv[1:]])
        write_json(run_file, watch.circumstances())
    if not quiet:
        print_summary(figures, Console())
        also = "".join(f"; {of}" for of in (timeline, html) if of)
        print(f"Results     {out}/{', '.join(FILES)}, run.json{also}")


def write_run(files: list[Path], figures: dict[str, Any], columns: Columns) -> None:
    """The summary and the requests, to FILES, under whatever names."""
    write_json(files[0], figures)
    write_requests(files[1], columns)


def _all_of(observers: list[Observer]) -> Observer | None:
    """One that tells all; None of none, which is faster."""
    if len(observers) < 2:
        return observers[0] if observers else None

    def tell(replica: int, round_: Round) -> None:
        for observe in observers:
            observe(replica, round_)

    return tell


@dataclass(frozen=True)
class Resolved:
    """What a scenario comes to before it is run. ``gpus``: of all replicas; ``kv_blocks``, each of ``kv_block_tokens``,
    and ``mamba_states``: of one; ``scenario``: with all defaults, as plain data."""

    requests: int
    output_tokens: int
    gpus: int
    gpu: str
    replicas: int
    model: str
    kv_blocks: int
    kv_block_tokens: int
    mamba_states: int
    provenance: dict[str, str]
    warnings: list[str]
    scenario: dict[str, Any]


def resolved(source: Source, overrides: Sequence[Change]) -> Resolved:
    """Load a scenario and all it names. Raises InputError."""
    run = prepare(load_scenario(source, overrides), path_of(source).parent)
    return Resolved(
        requests=len(run.requests),
        output_tokens=int(run.requests.output_tokens.sum()),
        gpus=run.gpus,
        gpu=run.gpu.name,
        replicas=run.scenario.deployment.replicas,
        model=run.tower.name,
        kv_blocks=run.memory.kv_blocks,
        kv_block_tokens=run.scenario.memory.kv_block_tokens,
        mamba_states=run.memory.state_slots,
        provenance=run.provenance,
        warnings=run.warnings,
        scenario=run.scenario.model_dump(by_alias=True),
    )


def check_scenario(path: Path, overrides: list[str]) -> None:
    """Print what a scenario resolves to. Raises InputError."""
    of = resolved(path, overrides)
    print(f"{path}: fine")
    print(f"  {of.requests:,} requests, {of.output_tokens:,} output tokens")
    print(f"  {of.gpus} x {of.gpu}, {of.replicas} replica(s) of {of.model}")
    pools = f"{of.kv_blocks:,} KV blocks of {of.kv_block_tokens} tokens"
    print(f"  {pools} and {of.mamba_states:,} Mamba states a replica")
    for key, source in of.provenance.items():
        print(f"  {key}: {source}")
    for warning in of.warnings:
        print(f"  warning: {warning}")
