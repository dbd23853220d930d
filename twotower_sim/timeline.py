"""A run as a Chrome/Perfetto trace (load it at ui.perfetto.dev): rounds and passes, batch and memory, requests.

Trace Event Format: times in microseconds; one process a replica, with a track a tower and counters; a request is
an asynchronous span on its replica with its queue, prefill and blocks inside.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twotower_sim.latency import OTHER_PASS, PASS_NAMES
from twotower_sim.metrics import Results, visible_blocks
from twotower_sim.records import NOT_YET
from twotower_sim.replica import Round
from twotower_sim.simulation import Run
from twotower_sim.visible import Ticks

Event = dict[str, Any]
CONTEXT = 1  # the first track; then the denoiser tower's, or those of further servers


class Timeline:
    """Hears of every round while a run is simulated, and writes the trace afterwards."""

    def __init__(self, run: Run) -> None:
        self._rounds: list[tuple[int, Round]] = []
        self._kind = run.scenario.decoding.kind

    def observe(self, replica: int, round_: Round) -> None:
        self._rounds.append((replica, round_))

    def write(self, path: Path, run: Run, results: Results) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            for index, event in enumerate(self._events(run, results)):
                file.write((",\n" if index else "") + json.dumps(event))
            file.write("\n]}\n")

    def _events(self, run: Run, results: Results) -> Iterator[Event]:
        for engine in run.engines:
            yield _named("process_name", engine.index, 0, f"replica {engine.index}")
            for track, name in enumerate(self._tracks(run), CONTEXT):
                yield _named("thread_name", engine.index, track, name)
        for replica, round_ in self._rounds:
            yield from self._round(replica, round_, run)
        yield from _requests(run, results)
        if run.luck:
            yield from _blocks(run)

    def _tracks(self, run: Run) -> list[str]:
        if run.scenario.tandem:
            m, n = run.scenario.tandem
            return [f"context server {i}" for i in range(m)] + [f"denoiser server {i}" for i in range(n)]
        other = {"denoise": ["denoiser tower"], "draft": ["drafter"]}
        return ["context tower", *other.get(OTHER_PASS.get(self._kind, ""), [])]

    def _round(self, replica: int, round_: Round, run: Run) -> Iterator[Event]:
        start_us, (tokens, _, _, prompts) = round_.start_ns / 1e3, round_.prefill
        beside = run.latency.side_by_side and not round_.in_turn
        other_us, context_us = round_.denoiser_s * 1e6, round_.context_s * 1e6
        context_at, other_at = start_us + (not beside and other_us), start_us
        if round_.in_turn:
            context_at, other_at = start_us, start_us + context_us
        if other_us:
            track = CONTEXT + (round_.server or 1)
            yield _slice(OTHER_PASS[self._kind], replica, track, other_at, other_us, sequences=round_.decoding)
        if context_us:
            extends = self._kind == "two_tower"
            shared = round_.extending if extends else round_.decoding + round_.extending
            name = PASS_NAMES[self._kind][(shared > 0) + 2 * (tokens > 0)]
            args = {"sequences": shared, "prompts": prompts, "prompt_tokens": tokens}
            yield _slice(name, replica, CONTEXT + round_.server, context_at, context_us, **args)
        sequences = {"decoding": round_.decoding, "extending": round_.extending, "waiting": round_.waiting}
        yield {"ph": "C", "name": "sequences", "pid": replica, "ts": start_us, "args": sequences}
        yield {"ph": "C", "name": "KV blocks", "pid": replica, "ts": start_us, "args": {"used": round_.kv_blocks}}


def _named(kind: str, replica: int, track: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": replica, "tid": track, "args": {"name": name}}


def _slice(name: str, replica: int, track: int, start_us: float, length_us: float, **args: int) -> Event:
    return {"ph": "X", "name": name, "pid": replica, "tid": track, "ts": start_us, "dur": length_us, "args": args}


def _span(name: str, replica: int, request: int, start_ns: int, end_ns: int, **args: Any) -> Iterator[Event]:
    common = {"cat": "request", "id": request, "pid": replica, "tid": 0, "name": name}
    yield common | {"ph": "b", "ts": start_ns / 1e3, "args": args}
    yield common | {"ph": "e", "ts": end_ns / 1e3}


def _requests(run: Run, results: Results) -> Iterator[Event]:
    columns, prefilled_ns = results.columns, run.records.prefilled_ns
    for request in range(len(run.requests)):
        if columns.finish_ns[request] == NOT_YET:
            continue
        arrival, admit, finish = (int(c[request]) for c in (columns.arrival_ns, columns.admit_ns, columns.finish_ns))
        replica = int(columns.replica[request])
        tokens = {"input": int(columns.input_tokens[request]), "output": int(columns.output_tokens[request])}
        yield from _span(f"request {request}", replica, request, arrival, finish, **tokens)
        yield from _span("queue", replica, request, arrival, admit)
        yield from _span("prefill", replica, request, admit, prefilled_ns[request])


def _blocks(run: Run) -> Iterator[Event]:
    assert run.luck is not None
    ticks = Ticks([engine.tick_end_ns for engine in run.engines])
    for chunk in visible_blocks(run, run.records.segments(), ticks):
        columns = (chunk.request, chunk.block, chunk.ready_ns, chunk.visible_ns)
        sizes: list[list[int]] = []
        for request, block, ready_ns, visible_ns in zip(*(c.tolist() for c in columns), strict=True):
            if block == 0:
                sizes = run.luck.plans.sizes(request)
            replica = run.records.replica[request]
            commits = {} if run.luck.queue else {"commits": sizes[block]}  # which depend on the load
            yield from _span(f"block {block}", replica, request, ready_ns, visible_ns, **commits)
