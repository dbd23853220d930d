"""Charts of runs that were watched while they were simulated: latencies, what happened when, what the GPUs did."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from twotower_sim.charts import Chart, Curve, Limit, bars, distribution, histogram, over_time
from twotower_sim.console import TITLES
from twotower_sim.experiments import Experiment
from twotower_sim.metrics import Results, evaluate
from twotower_sim.occupancy import mean_level
from twotower_sim.records import NOT_YET
from twotower_sim.simulation import Run, prepare, simulate
from twotower_sim.usage import Usage

SIDES = {"gpus": "of all GPUs", "context": "of the context tower's GPUs", "denoiser": "of the denoiser tower's GPUs"}
LEVELS = {
    "Load": ("arrivals a second", ["arrivals"]),
    "Requests": ("requests", ["in the batches", "waiting"]),
    "GPUs and KV cache": ("share", ["computing", "KV blocks in use"]),
}
"""Charts over time: their unit, and what they show."""


@dataclass(frozen=True)
class Watched:
    """A run, what came of it, and how busy it was."""

    run: Run
    results: Results
    usage: Usage


def watch(experiment: Experiment) -> Watched:
    """The run, simulated here, as charts need more than its summary. Raises InputError."""
    usage = Usage()
    run = simulate(prepare(experiment.scenario, experiment.base), usage.observe)
    return Watched(run, evaluate(run), usage)


def charts_of(of: Watched) -> dict[str, list[Chart]]:
    """Of one run, by the part of a page where they stand."""
    return charts_beside({"": of}) | {"work": list(work(of))}


def charts_beside(runs: Mapping[str, Watched]) -> dict[str, list[Chart]]:
    """Latencies and levels of runs, by name, over each other."""
    return {"latency": list(_latencies(runs)), "time": list(_time_lines(runs))}


def work(of: Watched) -> Iterator[Chart]:
    by_steps = {int(steps): count for steps, count in of.results.blocks["by_steps"].items()}
    if chart := histogram("Steps of a block", "denoise steps", "blocks", by_steps):
        yield chart
    for side, kinds in of.results.utilisation["share_of_time"].items():
        yield bars("Where the time went", SIDES[side], "share of time", list(kinds.items()), share=True)


def _latencies(runs: Mapping[str, Watched]) -> Iterator[Chart]:
    samples = {name: _samples_ms(of) for name, of in runs.items()}
    for latency in ("time_to_first_token", "inter_token_latency", "request_latency"):
        limits = list(dict.fromkeys(limit for of in runs.values() for limit in _limits(of.run, f"{latency}_ms")))
        curves = {name: of[latency] for name, of in samples.items()}
        if chart := distribution(TITLES[latency].removesuffix(" (ms)"), "ms", curves, limits):
            yield chart


def _samples_ms(of: Watched) -> dict[str, np.ndarray]:
    """Of the measured requests that were served."""
    c = of.results.columns
    served = c.measured & (c.finish_ns != NOT_YET)
    first_ms, whole_ms = ((at - c.arrival_ns)[served] / 1e6 for at in (c.first_ns, c.finish_ns))
    output = c.output_tokens[served]
    more = output > 1
    each_ms = (whole_ms - first_ms)[more] / (output[more] - 1)
    return {"time_to_first_token": first_ms, "inter_token_latency": each_ms, "request_latency": whole_ms}


def _limits(run: Run, objective: str) -> list[Limit]:
    """Objectives of all requests, or of the classes that have one."""
    slos = run.scenario.slos
    names = run.scenario.workload.class_names
    bounds = [getattr(slo, objective) for slo in slos]
    if len(set(bounds)) == 1:
        return [] if bounds[0] is None else [("objective", bounds[0])]
    return [(f"objective of {name}", at) for name, at in zip(names, bounds, strict=True) if at is not None]


def _time_lines(runs: Mapping[str, Watched]) -> Iterator[Chart]:
    levels = {name: _levels(of) for name, of in runs.items()}
    for title, (unit, told) in LEVELS.items():
        share = unit == "share"
        if len(runs) == 1:
            ((name, of),) = levels.items()
            tandem = share and runs[name].run.scenario.tandem
            curves = {what: of[what] for what in told}
            yield over_time("Servers and KV cache" if tandem else title, unit, curves, share)
            continue
        for what in told:
            beside = f"{title}: {what}" if len(told) > 1 else title
            yield over_time(beside, unit, {name: of[what] for name, of in levels.items()}, share)


def _levels(of: Watched) -> dict[str, Curve]:
    c = of.results.columns
    done = c.finish_ns != NOT_YET
    edges_ns, rounds, blocks = of.usage.bins(int(c.finish_ns.max()))
    arrival_ns, admit_ns, finish_ns = (at[done] for at in (c.arrival_ns, c.admit_ns, c.finish_ns))
    edges_s, one = edges_ns / 1e9, np.ones(len(arrival_ns))
    servers, room = _servers(of.run)
    levels = {
        "arrivals": np.histogram(c.arrival_ns, edges_ns)[0] / np.diff(edges_s),
        "in the batches": np.maximum(mean_level(edges_ns, admit_ns, finish_ns, one), 0),
        "waiting": np.maximum(mean_level(edges_ns, arrival_ns, admit_ns, one), 0),
        "computing": np.minimum(rounds / servers, 1),
        "KV blocks in use": np.minimum(blocks / room, 1),
    }
    return {name: (edges_s, values) for name, values in levels.items()}


def _servers(run: Run) -> tuple[int, float]:
    """How many compute at a time, and KV blocks of one."""
    replicas = run.scenario.deployment.replicas
    if not run.scenario.tandem:
        return replicas, run.memory.kv_blocks
    of = run.scenario.tandem
    rooms = [servers * side.kv_blocks for servers, side in zip(of, run.memory.sides, strict=True)]
    return replicas * sum(of), sum(rooms) / sum(of)
