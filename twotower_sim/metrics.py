"""From records to figures: AIPerf's metrics, and those of block diffusion. Definitions as AIPerf's metrics reference.

Times are in milliseconds, per request unless stated otherwise:

- time_to_first_token: arrival until the first tokens are visible (two towers: the first block);
- time_to_second_token: from then until the next visible moment; absent for requests that have none;
- inter_token_latency: (request_latency - time_to_first_token) / (output tokens - 1); absent for one token;
- request_latency: arrival until the last token is visible;
- queue_time: arrival until first admitted;
- commit_gap: between two visible moments of a request (per gap);
- block_latency: from when a block can start until it is visible, its waiting for a round included (per block);
- nfe_per_block: denoiser forwards of a block (per block); tokens_per_nfe: output tokens / denoiser forwards.

Rates of the whole run are over its duration, from the first arrival to the last finish; good_request_fraction is of
all requests that arrived. The first block of a two-tower answer brings up to 16 tokens at once, by which its
inter_token_latency divides as if they had come one by one (an answer of one block has 0): beside autoregressive
decoding, look at commit_gap and request_latency too.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from twotower_sim.distribution import Distribution, of, scalar
from twotower_sim.errors import InputError
from twotower_sim.latency import PASS_NAMES
from twotower_sim.records import NOT_YET
from twotower_sim.scenario import Slo
from twotower_sim.simulation import Run, extrapolated_share
from twotower_sim.visible import Ticks, block_times, second_tokens, token_gaps


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


@dataclass(frozen=True)
class Results:
    columns: Columns
    metrics: dict[str, dict[str, Any]]
    counts: dict[str, int]
    blocks: dict[str, Any]
    utilisation: dict[str, Any]
    memory: dict[str, Any]
    cost: dict[str, Any]


def evaluate(run: Run) -> Results:
    """All results of a finished run."""
    segments = run.records.segments()
    ticks = Ticks([engine.tick_end_ns for engine in run.engines])
    evaluate_tokens = _two_tower if run.plans else _autoregressive
    columns, per_block, blocks = evaluate_tokens(run, segments, ticks)
    done = columns.finish_ns != NOT_YET
    duration_s = float(columns.finish_ns[done].max() - columns.arrival_ns[done].min()) / 1e9
    if not duration_s:
        raise InputError("the run took no time: every cost in the scenario's latency is zero")
    return Results(
        columns,
        _metrics(run, columns, done, duration_s, per_block),
        _counts(run, done),
        blocks,
        _utilisation(run, segments, duration_s),
        _memory(run),
        _cost(run, columns, done, duration_s),
    )


def _two_tower(run: Run, segments: np.ndarray, ticks: Ticks):
    """Columns, per-block distributions and the summary of blocks."""
    assert run.plans is not None
    first_ns, second_ns = np.full((2, len(run.requests)), NOT_YET)
    nfe, blocks = np.zeros(len(run.requests), np.int64), run.plans.blocks_of.copy()
    blocks[run.rejected] = 0
    gaps, latencies, steps = Distribution(), Distribution(), Distribution()
    histogram = np.zeros(1, np.int64)
    for chunk in block_times(segments, ticks, run.plans):
        request, visible_ns = chunk.request, chunk.visible_ns
        follows = request[1:] == request[:-1]
        gaps.add(np.diff(visible_ns)[follows] / 1e6)
        latencies.add((visible_ns - chunk.ready_ns) / 1e6)
        steps.add(chunk.steps)
        counted = np.bincount(chunk.steps)
        histogram = np.pad(histogram, (0, max(0, len(counted) - len(histogram))))
        histogram[: len(counted)] += counted
        for index, column in ((0, first_ns), (1, second_ns)):
            at = chunk.block == index
            column[request[at]] = visible_ns[at]
        nfe[chunk.low : chunk.low + len(chunk.nfe)] = chunk.nfe
    columns = _columns(run, first_ns, second_ns, nfe, blocks)
    per_block = {
        "commit_gap": gaps.summary("ms"),
        "block_latency": latencies.summary("ms"),
        "nfe_per_block": steps.summary("forwards"),
    }
    by_steps = {str(k): int(count) for k, count in enumerate(histogram) if count}
    return columns, per_block, {"completed": int(histogram.sum()), "by_steps": by_steps}


def _autoregressive(run: Run, segments: np.ndarray, ticks: Ticks):
    gaps, none, number = Distribution(), Distribution(), len(run.requests)
    for gap_ns, sharing in token_gaps(segments, ticks):
        gaps.add(gap_ns / 1e6, sharing)
    prefilled_ns = np.frombuffer(run.records.prefilled_ns, np.int64)
    second_ns = second_tokens(segments, ticks, number)
    columns = _columns(run, prefilled_ns, second_ns, *np.zeros((2, number), np.int64))
    per_block = {
        "commit_gap": gaps.summary("ms"),
        "block_latency": none.summary("ms"),
        "nfe_per_block": none.summary("forwards"),
    }
    return columns, per_block, {"completed": 0, "by_steps": {}}


def _columns(run: Run, first_ns, second_ns, nfe, blocks) -> Columns:
    records = run.records
    arrival_ns, admit_ns, finish_ns = (
        np.frombuffer(column, np.int64) for column in (records.arrival_ns, records.admit_ns, records.finish_ns)
    )
    return Columns(
        arrival_ns, admit_ns, first_ns, second_ns, finish_ns,
        run.requests.input_tokens, run.requests.output_tokens,
        np.frombuffer(records.replica, np.int16), nfe, blocks, np.frombuffer(records.preemptions, np.int32),
    )  # fmt: skip


def _metrics(run: Run, columns: Columns, done: np.ndarray, duration_s: float, per_block: dict) -> dict[str, Any]:
    c, slo = columns, run.scenario.slo
    ttft_ms = (c.first_ns - c.arrival_ns)[done] / 1e6
    latency_ms = (c.finish_ns - c.arrival_ns)[done] / 1e6
    output, nfe = c.output_tokens[done], c.nfe[done]
    second = c.second_ns[done] != NOT_YET
    ttst_ms = (c.second_ns - c.first_ns)[done] / 1e6
    itl_ms = np.full(len(output), np.nan)
    np.divide(latency_ms - ttft_ms, output - 1, out=itl_ms, where=output > 1)
    streamed = itl_ms > 0  # else all tokens came at once
    tokens = int(output.sum())
    good = _good(slo, ttft_ms, np.where(second, ttst_ms, np.nan), itl_ms, latency_ms)
    per_forward = output[nfe > 0] / nfe[nfe > 0] if run.plans else np.zeros(0)
    return {
        "time_to_first_token": of(ttft_ms, "ms"),
        "time_to_second_token": of(ttst_ms[second], "ms"),
        "inter_token_latency": of(itl_ms[output > 1], "ms"),
        "request_latency": of(latency_ms, "ms"),
        "queue_time": of((c.admit_ns - c.arrival_ns)[done] / 1e6, "ms"),
        **per_block,
        "tokens_per_nfe": of(per_forward, "tokens/forward"),
        "input_sequence_length": of(c.input_tokens[done], "tokens"),
        "output_sequence_length": of(output, "tokens"),
        "output_token_throughput_per_user": of(1e3 / itl_ms[streamed], "tokens/sec/user"),
        "output_token_throughput": scalar(tokens / duration_s, "tokens/sec"),
        "output_token_throughput_per_gpu": scalar(tokens / duration_s / run.gpus, "tokens/sec/gpu"),
        "request_throughput": scalar(len(output) / duration_s, "requests/sec"),
        "goodput": scalar(None if good is None else int(good.sum()) / duration_s, "requests/sec"),
        "good_request_fraction": scalar(None if good is None else int(good.sum()) / len(done), "ratio"),
    }


def _good(slo: Slo, ttft_ms, ttst_ms, itl_ms, latency_ms) -> np.ndarray | None:
    """Requests that meet every objective, as AIPerf counts: one on what a request does not have is not met. None: no
    objectives."""
    bounds = [
        (ttft_ms, slo.time_to_first_token_ms),
        (ttst_ms, slo.time_to_second_token_ms),
        (itl_ms, slo.inter_token_latency_ms),
        (latency_ms, slo.request_latency_ms),
    ]
    asked = [values <= bound for values, bound in bounds if bound is not None]
    return np.logical_and.reduce(asked) if asked else None


def _counts(run: Run, done: np.ndarray) -> dict[str, int]:
    running = sum(len(engine.running) for engine in run.engines)
    queued = sum(len(engine.queue) for engine in run.engines)
    return {
        "arrived": len(run.requests),
        "completed": int(done.sum()),
        "rejected": len(run.rejected),
        "failed": 0,
        "queued": queued,
        "running": running,
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
        "share_of_time": _shares(run, duration_s * len(run.engines)),
        "extrapolated_share": extrapolated_share(run),
        "replicas": replicas,
    }


def _shares(run: Run, total_s: float) -> dict[str, dict[str, float]]:
    """Share of time per kind of pass, of the GPUs of each tower where the towers compute side by side."""
    engines = run.engines
    busy_s = sum(engine.busy_ns for engine in engines) / 1e9
    denoise = {"denoise": sum(engine.denoiser_s for engine in engines)} if run.plans else {}
    names = PASS_NAMES[run.scenario.decoding.kind]
    context = {names[kind]: sum(engine.context_s[kind] for engine in engines) for kind in (1, 2, 3)}

    def shares(passes: dict[str, float], rest: str) -> dict[str, float]:
        spent_s = sum(passes.values())
        shrink = (
            busy_s / spent_s if spent_s > busy_s else 1.0
        )  # rounds last whole nanoseconds, which may be less than their passes
        parts = {name: shrink * seconds for name, seconds in passes.items()}
        parts |= {rest: busy_s - shrink * spent_s, "idle": total_s - busy_s}
        return {name: round(seconds / total_s, 9) + 0.0 for name, seconds in parts.items()}  # no -0.0

    if run.latency.side_by_side and run.plans:
        return {"denoiser": shares(denoise, "waiting"), "context": shares(context, "waiting")}
    return {"gpus": shares(denoise | context, "host")}


def _memory(run: Run) -> dict[str, Any]:
    plan = run.memory
    return {
        "gpus": {
            side.role: {
                "capacity_bytes": side.capacity,
                "weights_bytes": side.weights,
                "workspace_bytes": side.workspace,
                "kv_cache_bytes": plan.kv_blocks * plan.kv_block_bytes,
                "state_bytes": plan.state_slots * plan.state_bytes,
            }
            for side in plan.sides
        },
        "kv_blocks": plan.kv_blocks,
        "kv_blocks_peak": max(engine.kv_peak for engine in run.engines),
        "state_slots": plan.state_slots,
        "state_slots_peak": max(engine.seats_peak for engine in run.engines),
    }


def _cost(run: Run, columns: Columns, done: np.ndarray, duration_s: float) -> dict[str, Any]:
    """GPU hours over the run's duration, at the GPU file's price and power."""
    gpu_hours = run.gpus * duration_s / 3600
    price, power_w = run.gpu.price_usd_per_hour, run.gpu.power_w
    usd = None if price is None else gpu_hours * price
    millions = columns.output_tokens[done].sum() / 1e6
    return {
        "gpu_hours": gpu_hours,
        "usd": usd,
        "usd_per_million_output_tokens": None if usd is None else float(usd / millions),
        "energy_kwh_at_full_power": None if power_w is None else gpu_hours * power_w / 1e3,
    }
