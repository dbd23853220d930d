"""The verdict on a run's load: queues of known load, batches without a queue, loads that change."""

from collections import Counter
from heapq import heapify, heappop, heappush

import numpy as np
import pytest
from conftest import AFFINE, run_of, synthetic

from twotower_sim.occupancy import mean_level
from twotower_sim.saturation import doubts, judge_conversations, judge_open

SEEDS = range(100)
FULL = {"BACKLOGGED", "OVERLOADED"}


def queue(gaps: np.ndarray, service: float = 1.0, measured=None, work=None):
    """The verdict on a server that takes ``service`` seconds for each request, first come, first served."""
    arrival = np.cumsum(gaps)
    walk = np.concatenate([[0], np.cumsum(service - gaps[1:])])
    admit = arrival + walk - np.minimum.accumulate(walk)
    columns = ((of * 1e9).astype(np.int64) for of in (arrival, admit, admit + service))
    every = np.ones(len(gaps), bool)
    return judge_open(*columns, np.ones(len(gaps)) if work is None else work, every if measured is None else measured)


def poisson(load: float, seed: int, requests: int = 2000) -> np.ndarray:
    return np.random.default_rng(seed).exponential(1 / load, requests)


@pytest.mark.parametrize(
    ("load", "verdict"),
    [(0.5, "STABLE"), (0.8, "STABLE"), (0.9, "STABLE"), (1.1, "OVERLOADED"), (1.5, "OVERLOADED"), (5, "OVERLOADED")],
)
def test_a_tenth_away_from_capacity_the_verdict_is_no_matter_of_luck(load, verdict):
    assert Counter(queue(poisson(load, seed)).verdict for seed in SEEDS) == {verdict: len(SEEDS)}


@pytest.mark.parametrize(("load", "verdict"), [(0.95, "STABLE"), (1.05, "OVERLOADED")])
def test_nearer_it_is_mostly_right_and_with_more_requests_always(load, verdict):
    assert Counter(queue(poisson(load, seed)).verdict for seed in SEEDS)[verdict] > 0.7 * len(SEEDS)
    assert all(queue(poisson(load, seed, 30_000)).verdict == verdict for seed in range(20))


@pytest.mark.parametrize("load", [1.1, 1.5, 3])
def test_growths_are_what_theory_says(load):
    """Fluid limits: the queue grows by 1 - 1 / rho of what arrives, the wait by rho - 1 of the time, and so long does
    it take to drain."""
    judged = queue(poisson(load, 1, 50_000))
    assert judged.queue_growth == pytest.approx(1 - 1 / load, abs=0.01)
    assert judged.outstanding_growth == pytest.approx(1 - 1 / load, abs=0.01)
    assert judged.wait_growth == pytest.approx(
        0.9 * (load - 1), rel=0.1
    )  # from the middle of a tenth to that of another
    assert judged.drain_s == pytest.approx((load - 1) * judged.window_s, rel=0.1)


def test_steady_arrivals_just_below_capacity_are_stable():
    judged = queue(np.full(500, 1 / 0.999))
    assert (judged.verdict, judged.queue_growth, judged.wait_growth) == ("STABLE", 0, 0)


def test_a_peak_at_the_end_is_a_backlog_and_no_overload():
    quiet, peak = poisson(0.5, 1), poisson(2, 2, 1000)
    judged = queue(np.concatenate([quiet, peak]))
    assert judged.verdict == "BACKLOGGED"
    assert judged.wait_growth > judged.limit


def test_a_peak_that_has_been_worked_off_is_none():
    assert queue(np.concatenate([poisson(0.5, 1), poisson(2, 2, 300), poisson(0.5, 3)])).verdict == "STABLE"


def test_only_the_window_is_judged():
    gaps = np.concatenate([poisson(2, 1, 500), np.full(1, 1000), poisson(0.5, 2)])
    measured = np.arange(len(gaps)) > 500
    assert queue(gaps).verdict == "STABLE"  # the queue at the start has gone long before the end
    assert queue(gaps, measured=measured).verdict == "STABLE"
    assert queue(gaps[:500]).verdict == queue(gaps, measured=~measured).verdict.replace("BACKLOGGED", "OVERLOADED")


def test_bursts_are_no_overload():
    """Gaps of coefficient of variation 3."""
    verdicts = Counter(
        queue(np.random.default_rng(seed).gamma(1 / 9, 9 / 0.8, 4000)).verdict for seed in SEEDS
    )  # fmt: skip
    assert verdicts["STABLE"] >= 0.98 * len(SEEDS)
    assert all(queue(np.random.default_rng(seed).gamma(1 / 9, 9 / 1.5, 4000)).verdict == "OVERLOADED" for seed in SEEDS)


def test_starving_work_is_seen_whatever_the_order():
    """Every tenth request is long and only served once no others come: few wait, but much work."""
    arrival = np.arange(2000) * 10**9
    work = np.where(np.arange(2000) % 10 == 9, 50.0, 1.0)
    admit = np.where(work > 1, 2000 * 10**9 + arrival, arrival)
    judged = judge_open(arrival, admit, admit + 10**8, work, np.ones(2000, bool))
    assert judged.verdict == "OVERLOADED"
    assert judged.queue_growth == pytest.approx(500 / 590, abs=0.01)


def test_all_at_once():
    at, every = np.zeros(5, np.int64), np.ones(5, bool)
    waited = judge_open(at, at + np.arange(5), at + 9, np.ones(5), every)
    assert (waited.verdict, waited.queue_growth) == ("OVERLOADED", None)
    assert judge_open(at, at, at + 9, np.ones(5), every).verdict == "STABLE"


# ---------------------------------------------------------------------- of runs


def verdict_of(rate_rps: float, seats: int, **sections) -> str:
    load = {"workload": synthetic(requests=1500, rate_rps=rate_rps, input_tokens=100, output_tokens=100)}
    latency = {"latency": AFFINE | {"decode": {"base_ms": 1, "per_seq_ms": 1}}}
    of = load | latency | {"decoding": {"kind": "autoregressive"}, "scheduler": {"max_num_seqs": seats}} | sections
    _, results = run_of(**of)
    return results.saturation["verdict"]


@pytest.mark.parametrize(("seats", "policy"), [(16, "fcfs"), (16, "shortest_prompt"), (8192, "fcfs")])
def test_of_batches_with_a_queue_and_without(seats, policy):
    """A token takes a millisecond of a server that many share, so that it bears some 9 requests of 100 tokens."""
    scheduler = {"max_num_seqs": seats, "admission": policy}
    memory = {"kv_blocks": 10**7, "state_slots": seats} if seats > 16 else {}
    verdicts = [verdict_of(rate, seats, scheduler=scheduler, memory=memory) for rate in (3, 7, 14, 30)]
    assert verdicts == ["STABLE", "STABLE", "OVERLOADED", "OVERLOADED"]


def test_a_closed_loop_is_stable():
    workload = {
        "kind": "closed_loop",
        "requests": 50,
        "concurrency": 40,
        "input_tokens": {"kind": "constant", "value": 10},
        "output_tokens": {"kind": "constant", "value": 10},
    }
    assert verdict_of(1, 1, workload=workload) == "STABLE"


def test_levels():
    edges = np.array([0.0, 1.0, 2.0, 4.0])
    begin, end = np.array([0.5, -1.0, 3.0]), np.array([2.0, 9.0, 3.0])
    assert mean_level(edges, begin, end, np.array([2.0, 1.0, 5.0])).tolist() == [2.0, 3.0, 1.0]


def conversations(load: float, seed: int, turns: int = 5, think: float = 4.0, many: int = 400):
    """The verdict on one server that takes a second for each turn; the next comes ``think`` seconds after the last."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum(rng.exponential(turns / load, many))
    coming = [(start, session, turns) for session, start in enumerate(starts)]
    heapify(coming)
    rows, free = [], 0.0
    while coming:
        arrival, session, left = heappop(coming)
        admit = max(arrival, free)
        free = admit + 1.0
        rows.append((arrival, admit, free, left == turns, session))
        if left > 1:
            heappush(coming, (free + think, session, left - 1))
    arrival, admit, finish, first, session = (np.array(column) for column in zip(*rows, strict=True))
    columns = ((of * 1e9).astype(np.int64) for of in (arrival, admit, finish))
    one = np.ones(len(rows))
    return judge_conversations(*columns, one, one > 0, first > 0, session)


@pytest.mark.parametrize(
    ("load", "many", "verdicts"),
    [(0.5, 400, {"STABLE"}), (0.8, 400, {"STABLE"}), (1.2, 2000, FULL), (1.5, 400, FULL), (2, 400, FULL)],
)
def test_conversations_that_slow_themselves_down_hide_no_overload(load, many, verdicts):
    judged = [conversations(load, seed, many=many) for seed in range(20)]
    assert {of.verdict for of in judged} <= verdicts
    assert verdicts == FULL or all(of.settled for of in judged)


def test_whether_conversations_settled_is_said():
    assert conversations(0.5, 0, think=900).settled is False
    assert conversations(2, 0, turns=100, many=40).settled is False
    assert queue(poisson(0.5, 0)).settled
    assert queue(poisson(0.5, 0, requests=4), service=9.0).settled is False


def test_a_load_that_had_not_settled_is_doubted():
    _, short = run_of(workload=synthetic(requests=20, rate_rps=50, output_tokens=400))
    assert doubts(short.saturation) == [
        "the load arrived in too short a time to settle, so that STABLE says little: take more requests"
    ]
    _, long = run_of(workload=synthetic(requests=300))
    assert doubts(long.saturation) == []
