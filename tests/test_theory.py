"""Queueing theory: waiting times, Little's law, utilisation and capacity, with tolerances from confidence intervals."""

import numpy as np
import pytest
from conftest import AFFINE, run_of, synthetic

from twotower_sim.metrics import evaluate
from twotower_sim.requests import Requests
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import prepare, simulate

SERVICE_S = 0.01


def single_server(output_tokens: np.ndarray, rate_rps: float, seed: int):
    """An M/G/1 queue: one seat, and every token takes SERVICE_S (the first in its prefill round)."""
    scenario = Scenario.model_validate(
        {
            "workload": synthetic(requests=1),
            "decoding": {"kind": "autoregressive"},
            "scheduler": {"max_num_seqs": 1},
            "latency": {
                "kind": "affine",
                "prefill": {"base_ms": SERVICE_S * 1e3},
                "decode": {"base_ms": SERVICE_S * 1e3},
            },
        }
    )
    n = len(output_tokens)
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1e9 / rate_rps, n)).astype(np.int64)
    run = prepare(scenario, given=Requests(arrivals, np.ones(n, np.int64), output_tokens))
    simulate(run)
    return run, evaluate(run)


def mean_and_error(samples: np.ndarray, batches: int = 30) -> tuple[float, float]:
    """Mean of a correlated sequence and its standard error by batch means."""
    means = [batch.mean() for batch in np.array_split(samples, batches)]
    return float(np.mean(means)), float(np.std(means, ddof=1) / batches**0.5)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_waiting_time_of_m_d_1(load):
    """Pollaczek-Khinchine for constant service: W = rho s / (2 (1 - rho))."""
    _, results = single_server(np.ones(300_000, np.int64), load / SERVICE_S, seed=1)
    c = results.columns
    mean, error = mean_and_error((c.admit_ns - c.arrival_ns) / 1e9)
    expected = load * SERVICE_S / (2 * (1 - load))
    assert abs(mean - expected) < 4 * error
    assert error < 0.1 * expected  # else the line above says nothing
    assert results.utilisation["busy"] == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_waiting_time_of_m_m_1(load):
    """Geometric service times of 50 tokens on average, close to exponential: W = rho s / (1 - rho)."""
    tokens = np.random.default_rng(2).geometric(1 / 50, 100_000)
    service_s = 50 * SERVICE_S
    _, results = single_server(tokens, load / service_s, seed=3)
    c = results.columns
    mean, error = mean_and_error((c.admit_ns - c.arrival_ns) / 1e9)
    exponential = load * service_s / (1 - load)
    geometric = exponential * (1 - 1 / 100)  # E[S^2] = (2 - p) / p^2 instead of 2 / p^2
    assert abs(mean - geometric) < 4 * error
    assert error < 0.1 * exponential


@pytest.mark.parametrize("kind", ["two_tower", "autoregressive"])
def test_littles_law_of_the_decode_stage(kind):
    """Sequences decoding, seen round by round, equal throughput times time in decode, seen request by request."""
    seen_ns = 0

    def observe(replica, round_):
        nonlocal seen_ns
        seen_ns += (round_.decoding + round_.extending) * (round_.end_ns - round_.start_ns)

    scenario = Scenario.model_validate(
        {"workload": synthetic(requests=2000, rate_rps=20), "decoding": {"kind": kind}, "latency": AFFINE}
    )
    run = simulate(prepare(scenario), observe=observe)
    finish, prefilled = (np.frombuffer(c, np.int64) for c in (run.records.finish_ns, run.records.prefilled_ns))
    assert seen_ns == (finish - prefilled).sum()
    assert seen_ns > 5 * finish.max()  # a real batch, not one at a time


@pytest.mark.parametrize("kind", ["two_tower", "autoregressive"])
def test_a_closed_loop_reaches_the_capacity_bound_and_no_more(kind):
    """N users without think time keep N sequences in the batch; every round takes 10 ms whatever is in it."""
    users, round_ = 32, {"base_ms": 10}
    _, results = run_of(
        workload={
            "kind": "closed_loop",
            "requests": 3200,
            "concurrency": users,
            "input_tokens": {"kind": "constant", "value": 16},
            "output_tokens": {"kind": "lognormal", "mean": 512, "cv": 0.5},
        },
        decoding={"kind": kind},
        commits={"kind": "constant", "tokens_per_step": 4},
        latency={"kind": "affine", "compose": "max"}
        | dict.fromkeys(("prefill", "decode", "denoise", "extend"), round_),
    )
    output = results.columns.output_tokens
    # a round a token, the first in the prefill; or a prefill, four steps and an extend a block, the last without
    rounds = output if kind == "autoregressive" else -(-output // 16) * 5
    bound = users * output.sum() / (rounds.sum() * 0.010)
    reached = results.metrics["output_token_throughput"]["avg"]
    assert 0.97 * bound < reached <= bound  # the last requests find an emptying batch
    assert results.utilisation["busy"] == pytest.approx(1, abs=1e-6)


def test_an_overloaded_server_is_busy_all_the_time_and_serves_at_its_capacity():
    _, results = single_server(np.ones(20_000, np.int64), 2 / SERVICE_S, seed=4)
    assert results.metrics["request_throughput"]["avg"] == pytest.approx(1 / SERVICE_S, rel=1e-3)
    assert results.utilisation["busy"] == pytest.approx(1, abs=1e-3)
