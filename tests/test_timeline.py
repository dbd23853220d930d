"""The Perfetto trace of a run."""

import json
from collections import Counter

import pytest
from conftest import AFFINE, synthetic

from twotower_sim.metrics import evaluate
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import prepare, simulate
from twotower_sim.timeline import CONTEXT, DENOISER, Timeline


@pytest.fixture(params=["two_tower", "autoregressive"])
def recorded(request, tmp_path):
    scenario = Scenario.model_validate(
        {
            "workload": synthetic(requests=30, rate_rps=20),
            "decoding": {"kind": request.param},
            "deployment": {"replicas": 2},
            "latency": AFFINE,
        }
    )
    run = prepare(scenario)
    timeline = Timeline(run)
    simulate(run, observe=timeline.observe)
    results = evaluate(run)
    timeline.write(tmp_path / "t.json", run, results)
    return run, results, json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_it_shows_the_run_as_it_was(recorded):
    """Recording takes another path through the engine; it must not change the run."""
    run, results, _ = recorded
    _, plain = (lambda r: (r, evaluate(r)))(simulate(prepare(run.scenario)))
    assert plain.columns.finish_ns.tolist() == results.columns.finish_ns.tolist()
    assert plain.counts == results.counts
    for name, shares in results.utilisation["share_of_time"].items():
        assert plain.utilisation["share_of_time"][name] == pytest.approx(shares)


def test_passes_fill_the_busy_time_and_do_not_overlap(recorded):
    run, _, events = recorded
    for engine in run.engines:
        passes = [e for e in events if e["ph"] == "X" and e["pid"] == engine.index]
        assert sum(e["dur"] for e in passes) == pytest.approx(engine.busy_ns / 1e3, rel=1e-6)
        ordered = sorted(passes, key=lambda e: (e["ts"], e["tid"]))
        ends = [e["ts"] + e["dur"] for e in ordered]
        assert all(end <= e["ts"] + 0.01 for end, e in zip(ends, ordered[1:], strict=False))
        tracks = {e["tid"] for e in passes}
        assert tracks == ({DENOISER, CONTEXT} if run.luck else {CONTEXT})


def test_every_request_and_block_is_a_span(recorded):
    run, results, events = recorded
    begins = Counter(e["name"].split()[0] for e in events if e["ph"] == "b")
    assert begins["request"] == begins["queue"] == begins["prefill"] == 30
    assert begins["block"] == (results.blocks["completed"] if run.luck else 0)
    assert Counter(e["ph"] for e in events)["e"] == sum(begins.values())
    for event in events:
        if event.get("args", {}).get("commits"):
            assert sum(event["args"]["commits"]) == 16


def test_counters_and_names(recorded):
    _, _, events = recorded
    assert {e["name"] for e in events if e["ph"] == "C"} == {"sequences", "KV blocks"}
    named = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"replica 0", "replica 1", "context tower"} <= named
