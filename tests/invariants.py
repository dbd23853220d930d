"""The invariants of a run, by number, as stated in DESIGN.md. ``check`` takes any finished run."""

import numpy as np
import pytest

from twotower_sim.kv_cache import PrefixCache
from twotower_sim.metrics import visible_blocks
from twotower_sim.rounds import RoundEngine
from twotower_sim.tandem import Tandem
from twotower_sim.visible import Ticks

NO_PASS = ("idle", "waiting", "host", "host and transfer")


def check(run, results) -> None:
    conservation(results)
    causality(results.columns)
    if run.luck:
        blocks_are_whole(run)
    memory_is_given_back(run)
    no_replica_idles(run, results.columns)
    gpu_hours_add_up(run, results)


def conservation(results) -> None:
    """1. Arrived = completed + rejected + failed + still queued + still running."""
    c = results.counts
    assert c["arrived"] == c["completed"] + c["rejected"] + c["failed"] + c["queued"] + c["running"]
    assert c["queued"] == c["running"] == 0  # every load here ends


def causality(c) -> None:
    """2. Arrival <= admission <= first token <= second token <= finish."""
    done = c.finish_ns >= 0
    assert (c.arrival_ns[done] <= c.admit_ns[done]).all()
    assert (c.admit_ns[done] < c.first_ns[done]).all()
    assert (c.first_ns[done] <= c.finish_ns[done]).all()
    second = c.second_ns >= 0
    assert (c.first_ns[second] < c.second_ns[second]).all()
    assert (c.second_ns[second] <= c.finish_ns[second]).all()


def blocks_are_whole(run) -> None:
    """2 and 3. Every block of a finished request completes once and in order; its commits obey the decoding rule."""
    decoding = run.scenario.decoding
    ticks = Ticks([engine.tick_end_ns for engine in run.engines])
    finished = np.frombuffer(run.records.finish_ns, np.int64) >= 0
    expected = run.luck.plans.blocks_of * finished
    seen = np.zeros(len(run.requests), np.int64)
    for chunk in visible_blocks(run, run.records.segments(), ticks):
        seen += np.bincount(chunk.request, minlength=len(seen))
        same = chunk.request[1:] == chunk.request[:-1]
        assert (np.diff(chunk.block)[same] == 1).all()
        assert (np.diff(chunk.visible_ns)[same] > 0).all()
        assert (chunk.ready_ns < chunk.visible_ns).all()
    assert (seen == expected).all()
    for request in range(0, len(run.requests), max(1, len(run.requests) // 20)):
        for sizes in run.luck.plans.sizes(request):
            obeys_the_rule(sizes, decoding.block_size, decoding.steps_per_block)


def obeys_the_rule(sizes: list[int], block_size: int, steps_per_block: int) -> None:
    """3. A block's commits sum to S; every step commits at least one and at least what the steps left demand."""
    assert sum(sizes) == block_size
    assert len(sizes) <= steps_per_block
    masked = block_size
    for k, committed in enumerate(sizes):
        assert committed >= max(1, -(-masked // (steps_per_block - k)))
        masked -= committed


def memory_is_given_back(run) -> None:
    """4. Nothing is held after finish; peaks stay inside the pools."""
    for engine in run.engines:
        assert engine.outstanding_requests == engine.outstanding_tokens == 0
        if run.fast:
            assert engine.kv_used == engine.context == engine.decoding == engine.queued_tokens == 0
            assert not any(engine._rings.passes)
            assert not any(engine._rings.growth)
        for cache in caches(engine):
            assert cache.used == 0
            if isinstance(cache, PrefixCache):
                cache.check()
        assert engine.kv_peak <= max(side.kv_blocks for side in run.memory.sides)
        assert engine.seats_peak <= run.memory.state_slots


def caches(engine) -> list:
    if isinstance(engine, Tandem):
        return [server.cache for server in (*engine.contexts, *engine.denoisers)]
    return [engine.cache] if isinstance(engine, RoundEngine) else []


def no_replica_idles(run, c) -> None:
    """8. A replica is busy exactly while some request of its own has arrived and not finished. (Servers in tandem idle
    between blocks; they are held against a naive replica.)"""
    for engine in [] if run.scenario.tandem else run.engines:
        mine = (c.replica == engine.index) & (c.finish_ns >= 0)
        order = np.argsort(c.arrival_ns[mine], kind="stable")
        arrival, finish = c.arrival_ns[mine][order], c.finish_ns[mine][order]
        covered = np.maximum.accumulate(finish)
        before = np.concatenate(([0], covered[:-1]))
        outstanding = np.maximum(covered - np.maximum(arrival, before), 0).sum()
        assert outstanding == engine.busy_ns


def gpu_hours_add_up(run, results) -> None:
    """11. GPU hours computing, waiting and idle are all hours of all GPUs, and say what the shares of time say."""
    cost, use = results.cost, results.utilisation
    parts = [cost[f"gpu_hours_{of}"] for of in ("computing", "waiting", "idle")]
    assert min(parts) >= 0
    assert sum(parts) == cost["gpu_hours"] == pytest.approx(run.gpus * use["duration_s"] / 3600)
    computing, waiting = (part / sum(parts) for part in parts[:2])
    assert computing + waiting == pytest.approx(use["busy"])
    passes = {
        side: sum(share for kind, share in shares.items() if kind not in NO_PASS)
        for side, shares in use["share_of_time"].items()
    }
    context, denoiser = run.scenario.deployment.degrees
    m, n = run.scenario.tandem or (1, 1)
    if run.scenario.split and "gpus" not in passes:
        expected = (m * context * passes["context"] + n * denoiser * passes["denoiser"]) / (m * context + n * denoiser)
        assert computing == pytest.approx(expected, abs=1e-6)
