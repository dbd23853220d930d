"""How busy servers are over time, exactly, and as the utilisation says."""

import numpy as np
import pytest
from conftest import AFFINE, synthetic

from twotower_sim.metrics import evaluate
from twotower_sim.replica import Round
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import prepare, simulate
from twotower_sim.usage import BINS, Usage


def round_(start_ns: int, end_ns: int, kv_blocks: int) -> Round:
    return Round(start_ns, end_ns, 0, 0, 0, 0, (0, 0, 0, 0), 0, kv_blocks)


@pytest.mark.parametrize("span_s", [0.01, 3, 5000])
def test_usage_is_exact_whatever_the_length_of_a_run(span_s, monkeypatch):
    monkeypatch.setattr("twotower_sim.usage.ROUNDS", 64)
    random = np.random.default_rng(1)
    ends = np.sort(random.integers(0, int(span_s * 1e9), 1001))
    usage, rounds = (
        Usage(),
        list(zip(ends[:-1:2].tolist(), ends[1::2].tolist(), random.integers(1, 99, 500).tolist(), strict=True)),
    )
    for row in rounds:
        usage.observe(0, round_(*row))
    edges_ns, busy, blocks = usage.bins(int(ends[-1]))
    assert len(busy) <= BINS
    assert edges_ns[-1] == ends[-1]
    for low, high, ran, used in zip(edges_ns[:-1], edges_ns[1:], busy, blocks, strict=True):
        inside = [(max(min(end, high) - max(start, low), 0), kv) for start, end, kv in rounds]
        busy_ns = sum(ns for ns, _ in inside)
        assert ran * (high - low) == pytest.approx(busy_ns, abs=2)
        if busy_ns > 1000:
            assert used == pytest.approx(sum(ns * kv for ns, kv in inside) / busy_ns, rel=1e-3)


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_time_line_agrees_with_the_utilisation(replicas):
    run = prepare(
        Scenario.model_validate(
            {"workload": synthetic(requests=300, rate_rps=4), "latency": AFFINE, "deployment": {"replicas": replicas}}
        )
    )
    usage = Usage()
    results = evaluate(simulate(run, usage.observe))
    edges_ns, busy, blocks = usage.bins(int(results.columns.finish_ns.max()))
    assert busy @ np.diff(edges_ns) == pytest.approx(sum(engine.busy_ns for engine in run.engines))
    assert np.nanmax(blocks) <= results.memory["kv_blocks_peak"]
