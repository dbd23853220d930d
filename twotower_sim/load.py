"""The requests that a scenario's workload stands for, and the class of each."""

from functools import partial
from pathlib import Path

import numpy as np

from twotower_sim import workload
from twotower_sim.arrivals import arrivals
from twotower_sim.draws import seed_of, uniform
from twotower_sim.errors import InputError
from twotower_sim.fingerprint import draw, load_fingerprint
from twotower_sim.mix import mix
from twotower_sim.readers.columns import Columns
from twotower_sim.requests import Requests
from twotower_sim.scenario import Scenario
from twotower_sim.scenario_workload import (
    ClosedLoopWorkload,
    FingerprintWorkload,
    MixWorkload,
    OpenWorkload,
    SyntheticWorkload,
    TraceWorkload,
)


def load_requests(scenario: Scenario, base: Path) -> tuple[Requests, np.ndarray, list[str]]:
    """Requests, the class of each, and what there is to say of them."""
    load = scenario.workload
    if isinstance(load, MixWorkload):
        return _mix(scenario, load, base)
    requests, notes = _workload(scenario, load, base)
    return requests, classes_of(scenario, len(requests)), notes


def _mix(scenario: Scenario, load: MixWorkload, base: Path) -> tuple[Requests, np.ndarray, list[str]]:
    parts, classes, notes, names = {}, [], [], 0
    for name, part in load.parts.items():
        own = scenario.model_copy(update={"workload": part.workload, "seed": seed_of(scenario.seed, name)})
        try:
            parts[name], of_part, said = load_requests(own, base)
        except InputError as error:
            raise InputError(f"workload.parts.{name}: {error}") from None
        classes.append(of_part + names)
        notes += [f"{name}: {note}" for note in said]
        names += len(part.classes)
    mixed = mix(parts, load.shares, load.rate_rps, load.requests)
    of_request = np.zeros(len(mixed.requests), np.int64)
    for index, of_part in enumerate(classes):
        mine = mixed.part == index
        of_request[mine] = of_part[: mine.sum()]
    return mixed.requests, of_request, notes + mixed.notes


def _workload(scenario: Scenario, load: OpenWorkload | ClosedLoopWorkload, base: Path) -> tuple[Requests, list[str]]:
    seed = scenario.seed
    if isinstance(load, TraceWorkload):
        options = load.model_dump(exclude={"kind", "path", "classes", "session_starts", "columns", "time_unit"})
        if load.columns:
            options["format"] = Columns(**load.columns.model_dump(), time_unit=load.time_unit)
        starts = partial(arrivals, seed=seed, **load.session_starts.model_dump()) if load.session_starts else None
        block_tokens = scenario.memory.kv_block_tokens
        trace = workload.trace(base / load.path, **options, starts=starts, block_tokens=block_tokens, seed=seed)
        return trace.requests, [f"trace: {note}" for note in trace.notes]
    if isinstance(load, FingerprintWorkload):
        found = load_fingerprint(load.fingerprint, base)
        return draw(found, load.requests, load.rate_scale, seed), [
            f"fingerprint: {note}" for note in found.source.notes
        ]
    lengths = [
        workload.lengths(count=load.requests, seed=seed, stream=stream, **length.model_dump())
        for stream, length in (("input", load.input_tokens), ("output", load.output_tokens))
    ]
    if isinstance(load, SyntheticWorkload):
        arrival_ns = arrivals(load.requests, seed, **load.arrivals.model_dump())
    else:
        arrival_ns = np.zeros(load.requests, np.int64)
    input_tokens, output_tokens = lengths
    return Requests(arrival_ns, input_tokens, output_tokens), []


def classes_of(scenario: Scenario, requests: int) -> np.ndarray:
    """Index of each request's class, drawn by the shares of ``workload.classes``; 0 without classes. Raises InputError
    for a mix, whose parts say which classes their own requests have."""
    if isinstance(scenario.workload, MixWorkload):
        raise InputError("workload.kind: found mix; requests that come from elsewhere are of no part of it")
    shares = list((scenario.workload.classes or {"": 1.0}).values())
    edges = np.cumsum(shares)[:-1]
    return np.searchsorted(edges, uniform(scenario.seed, "class", np.arange(requests)), side="right")
