"""The page of a run: what was asked, the answer, figures, charts, sources, and the command that makes it again."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from twotower_sim import __version__
from twotower_sim.charts import Chart, Limit, distribution, histogram, over_time, shares
from twotower_sim.console import PARTS, TITLES
from twotower_sim.html_page import page
from twotower_sim.metrics import Columns, Results
from twotower_sim.occupancy import mean_level
from twotower_sim.records import NOT_YET
from twotower_sim.result import plain_json
from twotower_sim.simulation import Run
from twotower_sim.usage import Usage


def write_html(
    path: Path, run: Run, results: Results, figures: dict[str, Any], usage: Usage, command: list[str]
) -> None:
    """``figures``: the run's summary; ``command``: the words that made it."""
    data = plain_json(figures)
    charts = {
        "latency": list(_latencies(run, results.columns)),
        "time": list(_time_lines(run, results.columns, usage)),
        "work": list(_work(data)),
    }
    text = page(
        "run.html",
        data,
        charts,
        titles=TITLES,
        parts=PARTS,
        scenario=yaml.safe_dump(data["scenario"], sort_keys=False, allow_unicode=True),
        command=shlex.join(command),
        version=__version__,
    )
    path.write_text(text, encoding="utf-8")


def _latencies(run: Run, c: Columns) -> Iterator[Chart]:
    """Of the measured requests that were served."""
    served = c.measured & (c.finish_ns != NOT_YET)
    first_ms, whole_ms = ((of - c.arrival_ns)[served] / 1e6 for of in (c.first_ns, c.finish_ns))
    output = c.output_tokens[served]
    more = output > 1
    each_ms = (whole_ms - first_ms)[more] / (output[more] - 1)
    for name, samples in (
        ("time_to_first_token", first_ms),
        ("inter_token_latency", each_ms),
        ("request_latency", whole_ms),
    ):
        title = TITLES[name].removesuffix(" (ms)")
        if chart := distribution(title, "ms", samples, _limits(run, f"{name}_ms")):
            yield chart


def _limits(run: Run, objective: str) -> list[Limit]:
    """Objectives of all requests, or of the classes that have one."""
    slos = run.scenario.slos
    names = run.scenario.workload.class_names
    bounds = [getattr(slo, objective) for slo in slos]
    if len(set(bounds)) == 1:
        return [] if bounds[0] is None else [("objective", bounds[0])]
    return [(f"objective of {name}", at) for name, at in zip(names, bounds, strict=True) if at is not None]


def _time_lines(run: Run, c: Columns, usage: Usage) -> Iterator[Chart]:
    done = c.finish_ns != NOT_YET
    edges_ns, rounds, blocks = usage.bins(int(c.finish_ns.max()))
    arrival_ns, admit_ns, finish_ns = (of[done] for of in (c.arrival_ns, c.admit_ns, c.finish_ns))
    edges_s, one = edges_ns / 1e9, np.ones(len(arrival_ns))
    arrivals = np.histogram(c.arrival_ns, edges_ns)[0] / np.diff(edges_s)
    waiting = mean_level(edges_ns, arrival_ns, admit_ns, one)
    running = mean_level(edges_ns, admit_ns, finish_ns, one)
    servers, room = _servers(run)
    yield over_time("Load", "arrivals a second", edges_s, {"arrivals": arrivals})
    levels = {"in the batches": np.maximum(running, 0), "waiting": np.maximum(waiting, 0)}
    yield over_time("Requests", "requests", edges_s, levels)
    used = {"computing": np.minimum(rounds / servers, 1), "KV blocks in use": np.minimum(blocks / room, 1)}
    yield over_time("Servers" if run.scenario.tandem else "GPUs and KV cache", "share", edges_s, used, share=True)


def _servers(run: Run) -> tuple[int, float]:
    """How many compute at a time, and KV blocks of one."""
    replicas = run.scenario.deployment.replicas
    if not run.scenario.tandem:
        return replicas, run.memory.kv_blocks
    of = run.scenario.tandem
    rooms = [servers * side.kv_blocks for servers, side in zip(of, run.memory.sides, strict=True)]
    return replicas * sum(of), sum(rooms) / sum(of)


def _work(data: dict[str, Any]) -> Iterator[Chart]:
    by_steps = {int(steps): count for steps, count in data["blocks"]["by_steps"].items()}
    if chart := histogram("Steps of a block", "denoise steps", "blocks", by_steps):
        yield chart
    for name, of in data["utilisation"]["share_of_time"].items():
        yield shares("Where the time went", SIDES[name], list(of.items()))


SIDES = {"gpus": "of all GPUs", "context": "of the context tower's GPUs", "denoiser": "of the denoiser tower's GPUs"}
