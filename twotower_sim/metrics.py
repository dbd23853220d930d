"""From records to figures: AIPerf's metrics, and those of block diffusion. Definitions as AIPerf's metrics reference.

Times are in milliseconds, per request unless stated otherwise:

- time_to_first_token: arrival until the first tokens are visible (two towers: the first block);
- time_to_second_token: from then until the next visible moment; absent for requests that have none;
- inter_token_latency: (request_latency - time_to_first_token) / (output tokens - 1); absent for one token;
- request_latency: arrival until the last token is visible;
- queue_time: arrival until first admitted;
- commit_gap: between two visible moments of a request (per gap);
- block_latency: from when a block can start until it is visible, its waiting for a round included (per block);
- nfe_per_block: denoiser forwards of a block (per block); tokens_per_nfe: output tokens / denoiser forwards;
- acceptance_length: output tokens / verify passes (speculative decoding).

They are of the requests that arrived in the scenario's measurement window, as are classes, quality and the blocks by
steps. Counts are of all requests and say how many the window excluded; utilisation, memory, cost and idle forwards are
of the whole run. Rates are over the time from the first arrival to the last finish of the requests that are measured;
good_request_fraction is of all of them, rejected ones included.

The first block of a two-tower answer brings up to 16 tokens at once, by which its inter_token_latency divides as if
they had come one by one (an answer of one block has 0): beside autoregressive decoding, look at commit_gap and
request_latency too.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from twotower_sim.cost import cost_of, gpu_time
from twotower_sim.distribution import Distribution, of, scalar
from twotower_sim.errors import InputError
from twotower_sim.kv_cache import total
from twotower_sim.latency import OTHER_PASS, PASS_NAMES
from twotower_sim.luck import published_quality
from twotower_sim.records import NOT_YET
from twotower_sim.rounds import RoundEngine
from twotower_sim.saturation import STABLE, Saturation, judge_conversations, judge_open
from twotower_sim.scenario import BlockDiffusion, MockAr, Speculative, TwoTower
from twotower_sim.scenario_workload import ClosedLoopWorkload
from twotower_sim.simulation import Run, extrapolated_share
from twotower_sim.tandem import Tandem
from twotower_sim.visible import (
    BlockTimes,
    Ticks,
    after_first_tick,
    block_times,
    logged_times,
    second_tokens,
    token_gaps,
)


@dataclass(frozen=True)
class Columns:
    """Per-request results by request id; times in nanoseconds, -1 where there is none."""

    arrival_ns: np.ndarray
    admit_ns: np.ndarray
    first_ns: np.ndarray
    second_ns: np.ndarray
    finish_ns: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    replica: np.ndarray
    nfe: np.ndarray
    blocks: np.ndarray
    preemptions: np.ndarray
    measured: np.ndarray  # bool: it arrived in the measurement window


@dataclass(frozen=True)
class Results:
    columns: Columns
    metrics: dict[str, dict[str, Any]]
    counts: dict[str, int]
    blocks: dict[str, Any]
    utilisation: dict[str, Any]
    memory: dict[str, Any]
    cost: dict[str, Any]
    quality: dict[str, Any]
    classes: dict[str, Any]
    saturation: dict[str, Any]


def evaluate(run: Run) -> Results:
    """All results of a finished run. Raises InputError where nothing is measured."""
    segments, quality = run.records.segments(), {}
    ticks, measured = Ticks([engine.tick_end_ns for engine in run.engines]), _measured(run)
    if run.luck:
        columns, per_unit, blocks, quality = _blocks(run, measured, segments, ticks)
    elif isinstance(run.scenario.decoding, Speculative):
        columns, per_unit, blocks = _bursts(run, measured)
    else:
        columns, per_unit, blocks = _tokens(run, measured, segments, ticks)
    done = columns.finish_ns != NOT_YET
    duration_ns, times = _duration_ns(columns, done), _Times(columns, done & measured)
    good, output_tokens = _good(run, times), int(columns.output_tokens[done].sum())
    return Results(
        columns,
        _metrics(run, columns, times, good, per_unit),
        _counts(run, done, measured),
        blocks,
        _utilisation(run, segments, duration_ns / 1e9),
        _memory(run),
        cost_of(run.gpu, gpu_time(run, duration_ns), output_tokens),
        quality,
        _classes(run, columns, times, good),
        _saturation(run, columns, done),
    )


def _measured(run: Run) -> np.ndarray:
    """Which requests arrived in the measurement window (n,). Raises InputError where none of them finished."""
    window, records = run.scenario.measurement, run.records
    arrival_ns, finish_ns = (np.frombuffer(column, np.int64) for column in (records.arrival_ns, records.finish_ns))
    before, after = arrival_ns < window.warm_up_s * 1e9, arrival_ns >= window.end_s * 1e9
    measured = ~(before | after)
    if not (finish_ns[measured] != NOT_YET).any():
        raise InputError(
            f"measurement: nothing is measured: {before.sum()} requests arrived before warm_up_s "
            f"{window.warm_up_s:g}, {after.sum()} after the window, and {measured.sum()} in it, of which none finished"
        )
    return measured


def _duration_ns(columns: Columns, of: np.ndarray) -> int:
    """From the first arrival of some requests to their last finish."""
    duration_ns = int(columns.finish_ns[of].max() - columns.arrival_ns[of].min())
    if not duration_ns:
        raise InputError("the run took no time: every cost in the scenario's latency is zero")
    return duration_ns


def visible_blocks(run: Run, segments: np.ndarray, ticks: Ticks) -> Iterator[BlockTimes]:
    """When blocks (or bursts) of a finished run became visible, chunk by chunk, in order of request."""
    if run.fast:
        assert run.luck is not None
        return block_times(segments, ticks, run.luck.plans)
    return logged_times(run.records.units(), np.frombuffer(run.records.nfe, np.int64))


class _Units:
    """What blocks and bursts have in common: first and second visible moments of all requests; gaps, latencies and
    sizes of those that are measured."""

    def __init__(self, run: Run, measured: np.ndarray, chunks: Iterator[BlockTimes]) -> None:
        self.first_ns, self.second_ns = np.full((2, len(run.requests)), NOT_YET)
        self.nfe, self.count, self.steps = np.zeros((3, len(run.requests)), np.int64)
        self.gaps, self.latencies, self.sizes = Distribution(), Distribution(), Distribution()
        self.by_size: Counter[int] = Counter()
        every = measured.all()
        for chunk in chunks:
            self._note(chunk)
            self._add(chunk if every else chunk.of(measured))

    def _add(self, chunk: BlockTimes) -> None:
        request, visible_ns = chunk.request, chunk.visible_ns
        follows = request[1:] == request[:-1]
        self.gaps.add(np.diff(visible_ns)[follows] / 1e6)
        self.latencies.add((visible_ns - chunk.ready_ns) / 1e6)
        self.sizes.add(chunk.steps)
        self.by_size.update(dict(enumerate(np.bincount(chunk.steps).tolist())))

    def _note(self, chunk: BlockTimes) -> None:
        request = chunk.request
        for index, column in ((0, self.first_ns), (1, self.second_ns)):
            at = chunk.block == index
            column[request[at]] = chunk.visible_ns[at]
        part = slice(chunk.low, chunk.low + len(chunk.nfe))
        self.nfe[part] = chunk.nfe
        self.count[part] = np.bincount(request - chunk.low, minlength=len(chunk.nfe))
        self.steps[part] = np.bincount(request - chunk.low, chunk.steps, minlength=len(chunk.nfe))


def _blocks(run: Run, measured: np.ndarray, segments: np.ndarray, ticks: Ticks):
    """Columns, per-block distributions, and the summaries of blocks and of their quality."""
    units = _Units(run, measured, visible_blocks(run, segments, ticks))
    columns = _columns(run, measured, units.first_ns, units.second_ns, units.nfe, units.count)
    per_unit = {
        "commit_gap": units.gaps.summary("ms"),
        "block_latency": units.latencies.summary("ms"),
        "nfe_per_block": units.sizes.summary("forwards"),
    }
    by_steps = {str(steps): count for steps, count in sorted(units.by_size.items()) if count}
    idle = sum(engine.decoder.idle_forwards for engine in run.engines if isinstance(engine, RoundEngine))
    blocks = {"completed": units.by_size.total(), "by_steps": by_steps, "idle_forwards": idle}
    return columns, per_unit, blocks, _quality(run, measured, units)


def _bursts(run: Run, measured: np.ndarray):
    units = _Units(run, measured, logged_times(run.records.units(), np.zeros(len(run.requests), np.int64)))
    columns = _columns(run, measured, units.first_ns, units.second_ns, *np.zeros((2, len(run.requests)), np.int64))
    passed = measured & (units.count > 0)
    per_unit = _no_blocks(units.gaps) | {
        "acceptance_length": of(run.requests.output_tokens[passed] / units.count[passed], "tokens/pass")
    }
    return columns, per_unit, {"completed": 0, "by_steps": {}, "idle_forwards": 0}


def _tokens(run: Run, measured: np.ndarray, segments: np.ndarray, ticks: Ticks):
    gaps, number = Distribution(), len(run.requests)
    first_ns = np.frombuffer(run.records.prefilled_ns, np.int64)
    if isinstance(run.scenario.decoding, MockAr):
        segments = after_first_tick(segments, ticks)
        first_ns = np.full(number, NOT_YET)
        first_ns[segments[::-1, 0]] = segments[::-1, 5]  # the earliest is written last
    for gap_ns, sharing in token_gaps(segments[measured[segments[:, 0]]], ticks):
        gaps.add(gap_ns / 1e6, sharing)
    second_ns = second_tokens(segments, ticks, number)
    columns = _columns(run, measured, first_ns, second_ns, *np.zeros((2, number), np.int64))
    if isinstance(run.scenario.decoding, MockAr):
        columns = replace(columns, nfe=columns.output_tokens * (columns.finish_ns != NOT_YET))
    return columns, _no_blocks(gaps), {"completed": 0, "by_steps": {}, "idle_forwards": 0}


def _no_blocks(gaps: Distribution) -> dict[str, dict[str, Any]]:
    none = Distribution()
    return {
        "commit_gap": gaps.summary("ms"),
        "block_latency": none.summary("ms"),
        "nfe_per_block": none.summary("forwards"),
    }


def _columns(run: Run, measured, first_ns, second_ns, nfe, blocks) -> Columns:
    records = run.records
    arrival_ns, admit_ns, finish_ns = (
        np.frombuffer(column, np.int64) for column in (records.arrival_ns, records.admit_ns, records.finish_ns)
    )
    return Columns(
        arrival_ns, admit_ns, first_ns, second_ns, finish_ns,
        run.requests.input_tokens, run.requests.output_tokens,
        np.frombuffer(records.replica, np.int16), nfe, blocks, np.frombuffer(records.preemptions, np.int32), measured,
    )  # fmt: skip


class _Times:
    """Of requests that are done and measured, in milliseconds; NaN where a request has no such time."""

    def __init__(self, c: Columns, of: np.ndarray) -> None:
        self.of = of  # bool (n,)
        output, second = c.output_tokens[of], c.second_ns[of] != NOT_YET
        self.first_ms = (c.first_ns - c.arrival_ns)[of] / 1e6
        self.latency_ms = (c.finish_ns - c.arrival_ns)[of] / 1e6
        self.second_ms = np.where(second, (c.second_ns - c.first_ns)[of] / 1e6, np.nan)
        self.inter_ms = np.full(len(output), np.nan)
        np.divide(self.latency_ms - self.first_ms, output - 1, out=self.inter_ms, where=output > 1)


def _metrics(run: Run, c: Columns, times: _Times, good: np.ndarray | None, per_unit: dict) -> dict[str, Any]:
    done, duration_s = times.of, _duration_ns(c, times.of) / 1e9
    second_ms, inter_ms = times.second_ms, times.inter_ms
    output, nfe = c.output_tokens[done], c.nfe[done]
    streamed = inter_ms > 0  # else all tokens came at once
    tokens = int(output.sum())
    per_forward = output[nfe > 0] / nfe[nfe > 0]
    return {
        "time_to_first_token": of(times.first_ms, "ms"),
        "time_to_second_token": of(second_ms[~np.isnan(second_ms)], "ms"),
        "inter_token_latency": of(inter_ms[output > 1], "ms"),
        "request_latency": of(times.latency_ms, "ms"),
        "queue_time": of((c.admit_ns - c.arrival_ns)[done] / 1e6, "ms"),
        **per_unit,
        "tokens_per_nfe": of(per_forward, "tokens/forward"),
        "input_sequence_length": of(c.input_tokens[done], "tokens"),
        "output_sequence_length": of(output, "tokens"),
        "output_token_throughput_per_user": of(1e3 / inter_ms[streamed], "tokens/sec/user"),
        "output_token_throughput": scalar(tokens / duration_s, "tokens/sec"),
        "output_token_throughput_per_gpu": scalar(tokens / duration_s / run.gpus, "tokens/sec/gpu"),
        "request_throughput": scalar(len(output) / duration_s, "requests/sec"),
        "goodput": scalar(None if good is None else int(good.sum()) / duration_s, "requests/sec"),
        "good_request_fraction": _good_fraction(good, c.measured),
    }


def _good(run: Run, times: _Times) -> np.ndarray | None:
    """Which requests (n,) meet every objective that they have, as AIPerf counts: one on what a request does not have is
    not met. None: no request has any."""
    slos, classes = run.scenario.slos, run.classes[times.of]
    met, asked = np.ones(len(classes), bool), False
    for name, values in {
        "time_to_first_token_ms": times.first_ms,
        "time_to_second_token_ms": times.second_ms,
        "inter_token_latency_ms": times.inter_ms,
        "request_latency_ms": times.latency_ms,
    }.items():
        bounds = np.array([getattr(slo, name) for slo in slos], float)[classes]  # NaN: none
        met &= np.isnan(bounds) | (values <= bounds)
        asked |= not np.isnan(bounds).all()
    if not asked:
        return None
    good = np.zeros(len(times.of), bool)
    good[times.of] = met
    return good


def _good_fraction(good: np.ndarray | None, arrived: np.ndarray) -> dict[str, Any]:
    """Of requests that arrived."""
    return scalar(None if good is None else int(good[arrived].sum()) / int(arrived.sum()), "ratio")


def _counts(run: Run, done: np.ndarray, measured: np.ndarray) -> dict[str, int]:
    outstanding = sum(engine.outstanding_requests for engine in run.engines)
    running = sum(engine.running_requests for engine in run.engines)
    return {
        "arrived": len(run.requests),
        "completed": int(done.sum()),
        "rejected": len(run.rejected),
        "failed": 0,
        "queued": outstanding - running,
        "running": running,
        "excluded": int((~measured).sum()),
        "preemptions": sum(engine.preemptions for engine in run.engines),
        "rounds": sum(engine.rounds for engine in run.engines),
    }


def _utilisation(run: Run, segments: np.ndarray, duration_s: float) -> dict[str, Any]:
    """Shares of the run's duration; of decoding sequences, the average over time."""
    decoding_s = np.zeros(len(run.engines))
    for index, engine in enumerate(run.engines):
        mine = segments[(segments[:, 4] == index) & (segments[:, 3] > segments[:, 2])]
        ends_ns = np.frombuffer(engine.tick_end_ns, np.int64)
        decoding_s[index] = (ends_ns[mine[:, 3] - 1] - mine[:, 5]).sum() / 1e9
    replicas = [
        {
            "busy": engine.busy_ns / 1e9 / duration_s,
            "decoding_sequences": float(decoding_s[index] / duration_s),
            "rounds": engine.rounds,
            "preemptions": engine.preemptions,
            "requests": int((np.frombuffer(run.records.replica, np.int16) == index).sum()),
        }
        for index, engine in enumerate(run.engines)
    ]
    return {
        "duration_s": duration_s,
        "gpus": run.gpus,
        "busy": float(np.mean([replica["busy"] for replica in replicas])),
        "share_of_time": _tandem_shares(run, duration_s) if run.scenario.tandem else _shares(run, duration_s),
        "extrapolated_share": extrapolated_share(run),
        "replicas": replicas,
    }


def _shares(run: Run, duration_s: float) -> dict[str, dict[str, float]]:
    """Share of time per kind of pass, of the GPUs of each tower where the towers compute side by side."""
    engines, total_s = run.engines, duration_s * len(run.engines)
    busy_s = sum(engine.busy_ns for engine in engines) / 1e9
    first, context = _passes(run)
    if run.latency.side_by_side and first:
        return {
            "denoiser": _parts(first, busy_s, "waiting", total_s),
            "context": _parts(context, busy_s, "waiting", total_s),
        }
    return {"gpus": _parts(first | context, busy_s, "host", total_s)}


def _tandem_shares(run: Run, duration_s: float) -> dict[str, dict[str, float]]:
    """The same, of towers in tandem; a context server waits for its own transfers where they block it."""
    assert run.scenario.tandem is not None
    tandems = [engine for engine in run.engines if isinstance(engine, Tandem)]
    denoise, context = _passes(run)
    m, n = (servers * duration_s * len(tandems) for servers in run.scenario.tandem)
    denoiser_s = sum(engine.busy_denoiser_ns for engine in tandems) / 1e9
    context_s = sum(engine.busy_context_ns for engine in tandems) / 1e9
    return {
        "denoiser": _parts(denoise, denoiser_s, "host", n),
        "context": _parts(context, context_s, "host and transfer", m),
    }


def _passes(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by kind of pass: of the denoiser (or the drafter), and of the context tower."""
    kind, engines = run.scenario.decoding.kind, run.engines
    names = PASS_NAMES[kind]
    context = {names[of]: sum(engine.context_s[of] for engine in engines) for of in (1, 2, 3)}
    other = OTHER_PASS.get(kind)
    return {other: sum(engine.denoiser_s for engine in engines)} if other else {}, context


def _parts(passes: dict[str, float], busy_s: float, rest: str, total_s: float) -> dict[str, float]:
    spent_s = sum(passes.values())
    shrink = busy_s / spent_s if spent_s > busy_s else 1.0  # rounds last whole nanoseconds, their passes may not
    parts = {name: shrink * seconds for name, seconds in passes.items()}
    parts |= {rest: busy_s - shrink * spent_s, "idle": total_s - busy_s}
    return {name: round(seconds / total_s, 9) + 0.0 for name, seconds in parts.items()}  # no -0.0


def _memory(run: Run) -> dict[str, Any]:
    plan = run.memory
    caches = [cache for engine in run.engines for cache in engine.prefix_caches]
    return {
        "gpus": {
            side.role: {
                "capacity_bytes": side.capacity,
                "weights_bytes": side.weights,
                "workspace_bytes": side.workspace,
                "kv_cache_bytes": side.kv_blocks * side.kv_block_bytes,
                "state_bytes": side.state_slots * side.state_bytes,
            }
            for side in plan.sides
        },
        "kv_blocks": plan.kv_blocks,
        "kv_blocks_peak": max(engine.kv_peak for engine in run.engines),
        "state_slots": plan.state_slots,
        "state_slots_peak": max(engine.seats_peak for engine in run.engines),
        "prefix_cache": total(caches) if caches else None,
    }


def _quality(run: Run, measured: np.ndarray, units: _Units) -> dict[str, Any]:
    """For every gamma in use: its share of blocks, their denoise steps, and what is published of its quality."""
    luck, decoding = run.luck, run.scenario.decoding
    assert luck is not None
    assert isinstance(decoding, TwoTower | BlockDiffusion)
    if luck.queue:
        rows = run.records.units()
        rows = rows[measured[rows[:, 0]]]
        level, count, taken = rows[:, 5], np.ones(len(rows), np.int64), rows[:, 2]
    else:
        level, count, taken = (of[measured] for of in (luck.base, units.count, units.steps))
    blocks, steps = (np.bincount(level, of, minlength=len(luck.gammas)) for of in (count, taken))
    return {
        f"{gamma:g}": {
            "share_of_blocks": float(blocks[i] / blocks.sum()),
            "nfe_per_block": float(steps[i] / blocks[i]),
            "retained": published_quality(run.scenario.model, decoding, gamma),
        }
        for i, gamma in enumerate(luck.gammas)
        if blocks[i]
    }


def _classes(run: Run, c: Columns, times: _Times, good: np.ndarray | None) -> dict[str, Any]:
    """Latencies by class of request, where the workload has classes."""
    classes = {}
    for index, name in enumerate(run.scenario.workload.class_names):
        mine = run.classes == index
        done = mine[times.of]
        if not done.any():
            continue
        classes[name] = {
            "requests": int(done.sum()),
            "time_to_first_token": of(times.first_ms[done], "ms"),
            "request_latency": of(times.latency_ms[done], "ms"),
            "good_request_fraction": _good_fraction(good, mine & c.measured),
        }
    return classes


def _saturation(run: Run, c: Columns, done: np.ndarray) -> dict[str, Any]:
    if isinstance(run.scenario.workload, ClosedLoopWorkload):
        return Saturation(STABLE).plain()
    columns = c.arrival_ns[done], c.admit_ns[done], c.finish_ns[done], c.output_tokens[done], c.measured[done]
    after, sessions = run.requests.after, run.requests.sessions
    if after is None or sessions is None:
        return judge_open(*columns).plain()
    return judge_conversations(*columns, np.diff(after.first)[done] == 0, sessions[done]).plain()
