"""The Perfetto trace of a run."""

import json
from collections import Counter

import pytest
from conftest import AFFINE, synthetic

from twotower_sim.metrics import evaluate
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import prepare, simulate
from twotower_sim.timeline import Timeline

WAYS = {
    # sections, and how many tracks have passes
    "two towers": ({}, 2),
    "autoregressive": ({"decoding": {"kind": "autoregressive"}}, 1),
    "lockstep": ({"scheduler": {"policy": "lockstep"}}, 2),
    "steps_per_round": ({"scheduler": {"steps_per_round": 3}}, 2),
    "mock_ar": ({"decoding": {"kind": "mock_ar"}}, 2),
    "speculative": ({"decoding": {"kind": "speculative", "acceptance": 0.7}}, 2),
    "block_diffusion": ({"decoding": {"kind": "block_diffusion", "block_size": 16}}, 1),
    "pools": ({"deployment": {"replicas": 2, "placement": {"kind": "pools", "context": 2, "denoiser": 2}}}, 4),
}


@pytest.fixture(params=sorted(WAYS))
def recorded(request, tmp_path):
    sections, _ = WAYS[request.param]
    scenario = Scenario.model_validate(
        {
            "name": request.param.replace(" ", "-"),
            "workload": synthetic(requests=30, rate_rps=20),
            "deployment": {"replicas": 2},
            "latency": AFFINE | {"draft": {"base_ms": 1}},
        }
        | sections
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
        tandem = run.scenario.tandem is not None
        if not tandem:
            assert sum(e["dur"] for e in passes) == pytest.approx(engine.busy_ns / 1e3, rel=1e-6)
        tracks = sorted({e["tid"] for e in passes})
        assert len(tracks) == WAYS[run.scenario.name.replace("two-towers", "two towers")][1]
        for of in tracks if tandem else [tracks]:  # servers in tandem work at the same time
            mine = [e for e in passes if e["tid"] == of or not tandem]
            ordered = sorted(mine, key=lambda e: e["ts"])
            ends = [e["ts"] + e["dur"] for e in ordered]
            assert all(end <= e["ts"] + 0.01 for end, e in zip(ends, ordered[1:], strict=False))


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
    assert {"replica 0", "replica 1"} <= named
    assert {"context tower", "context server 0"} & named
