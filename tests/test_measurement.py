"""The measurement window: which requests the figures are of."""

import csv
import gzip
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import AFFINE, ROOT, run_of, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check
from test_timelines import A_THEN_B, replay, times

from twotower_sim.console import _lines
from twotower_sim.errors import InputError
from twotower_sim.result import summary, write_requests

DECODING = {
    "blocks": {"kind": "two_tower"},
    "levels": {"kind": "two_tower", "gamma_policy": {"kind": "by_queue", "levels": [{"waiting": 1, "gamma": 0.6}]}},
    "tokens": {"kind": "autoregressive"},
    "mock": {"kind": "mock_ar"},
    "bursts": {"kind": "speculative", "draft_tokens": 3, "acceptance": 0.7},
}
SLO = {"time_to_first_token_ms": 100, "inter_token_latency_ms": 12}


def test_only_what_arrives_in_the_window_is_measured(tmp_path):
    """The timeline of test_two_towers_mixed_rounds: B comes at 12 ms, waits for A's step and is done at 38."""
    results = replay(tmp_path, A_THEN_B, measurement={"warm_up_s": 0.012}, slo={"request_latency_ms": 26})
    assert times(results.columns, "first", "finish") == [[28, 38], [42, 38]]  # A's are still there
    assert results.columns.measured.tolist() == [False, True]
    metrics = results.metrics
    for name, value in {"time_to_first_token": 26, "request_latency": 26, "queue_time": 2, "block_latency": 10}.items():
        assert (metrics[name]["count"], metrics[name]["avg"]) == (1, value), name
    assert metrics["commit_gap"]["count"] == 0
    assert metrics["output_token_throughput"]["avg"] == pytest.approx(16 / 0.026)  # from 12 to 38 ms
    assert metrics["goodput"]["avg"] == pytest.approx(1 / 0.026)
    assert metrics["good_request_fraction"]["avg"] == 1
    assert results.blocks == {"completed": 1, "by_steps": {"2": 1}, "idle_forwards": 0}
    assert results.quality["0.8"]["share_of_blocks"] == 1
    assert (results.counts["arrived"], results.counts["completed"], results.counts["excluded"]) == (2, 2, 1)
    assert results.utilisation["duration_s"] == pytest.approx(0.042)  # of the whole run
    assert results.cost["gpu_hours"] == pytest.approx(2 * 0.042 / 3600)


def test_the_end_of_the_window_is_not_inside(tmp_path):
    only_a = replay(tmp_path, A_THEN_B, measurement={"for_s": 0.012})
    assert only_a.columns.measured.tolist() == [True, False]
    assert only_a.metrics["request_latency"]["max"] == 42
    assert only_a.metrics["commit_gap"]["avg"] == 14
    assert only_a.metrics["output_token_throughput"]["avg"] == pytest.approx(32 / 0.042)
    both = replay(tmp_path, A_THEN_B, measurement={"for_s": 0.0121})
    assert both.columns.measured.all()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(DECODING)),
    st.integers(0, 5),
    st.floats(0.1, 0.9),
    st.sampled_from([{}, {"kv_blocks": 120, "state_slots": 9, "oversized": "reject"}]),
)
def test_two_windows_together_are_the_whole_run(kind, seed, part, memory):
    load = synthetic(requests=60, rate_rps=40) | {"classes": {"chat": 0.5, "batch": 0.5}}
    sections = {
        "workload": load, "decoding": DECODING[kind], "latency": AFFINE | {"draft": {"base_ms": 1}}, "slo": SLO,
        "seed": seed, "memory": memory, "scheduler": {"max_num_seqs": 6},
    }  # fmt: skip
    _, whole = run_of(**sections)
    edge_s = float(np.quantile(whole.columns.arrival_ns, part)) / 1e9
    (run, early), (_, late) = (run_of(**sections, measurement=m) for m in ({"for_s": edge_s}, {"warm_up_s": edge_s}))
    check(run, early)
    assert (early.columns.measured != late.columns.measured).all()
    assert early.counts["excluded"] + late.counts["excluded"] == 60
    for name in vars(whole.columns).keys() - {"measured"}:
        assert (getattr(whole.columns, name) == getattr(early.columns, name)).all(), name
    for name, of in whole.metrics.items():
        parts = [results.metrics[name] for results in (early, late) if results.metrics[name]["avg"] is not None]
        if "count" in of and parts:
            assert sum(p["count"] for p in parts) == of["count"], name
            assert sum(p["avg"] * p["count"] for p in parts) == pytest.approx(of["avg"] * of["count"]), name
            assert (min(p["min"] for p in parts), max(p["max"] for p in parts)) == (of["min"], of["max"]), name
    for steps in whole.blocks["by_steps"]:
        assert sum(r.blocks["by_steps"].get(steps, 0) for r in (early, late)) == whole.blocks["by_steps"][steps]
    for gamma, of in whole.quality.items():
        blocks = [
            r.quality[gamma]["share_of_blocks"] * r.blocks["completed"] for r in (early, late) if gamma in r.quality
        ]
        assert sum(blocks) == pytest.approx(of["share_of_blocks"] * whole.blocks["completed"])
    for results in (early, late) if whole.quality else ():
        forwards = sum(of["share_of_blocks"] * of["nfe_per_block"] for of in results.quality.values())
        assert forwards == pytest.approx(results.metrics["nfe_per_block"]["avg"])
    for name, of in whole.classes.items():
        assert sum(r.classes[name]["requests"] for r in (early, late) if name in r.classes) == of["requests"]
    good = [r.metrics["good_request_fraction"]["avg"] * r.columns.measured.sum() for r in (early, late)]
    assert sum(good) == pytest.approx(whole.metrics["good_request_fraction"]["avg"] * 60)
    assert (early.utilisation, early.memory, early.cost) == (whole.utilisation, whole.memory, whole.cost)


def test_a_closed_loop_has_a_window_too():
    """Its arrivals are known only when they happen."""
    length = {"kind": "constant", "value": 32}
    users = {"kind": "closed_loop", "requests": 40, "concurrency": 4, "input_tokens": length, "output_tokens": length}
    _, results = run_of(workload=users, latency=AFFINE, measurement={"warm_up_s": 0.2})
    c = results.columns
    assert (c.measured == (c.arrival_ns >= 0.2e9)).all()
    assert 0 < c.measured.sum() < 40
    assert results.metrics["request_latency"]["count"] == c.measured.sum()


def test_nothing_measured_is_an_error_that_says_where_requests_were():
    load = {"workload": synthetic(requests=40, rate_rps=40), "latency": AFFINE}
    with pytest.raises(InputError, match=r"40 requests arrived before warm_up_s 900, 0 after the window, and 0 in it"):
        run_of(**load, measurement={"warm_up_s": 900})
    with pytest.raises(InputError, match=r"0 requests arrived before warm_up_s 0, 40 after the window, and 0 in it"):
        run_of(**load, measurement={"for_s": 1e-6})


def test_a_window_of_rejected_requests_measures_nothing(tmp_path):
    small = {"memory": {"kv_blocks": 4, "state_slots": 4, "oversized": "reject"}, "measurement": {"warm_up_s": 0.05}}
    with pytest.raises(
        InputError, match="1 requests arrived before warm_up_s 0.05, 0 after the window, and 1 in it, of"
    ):
        replay(tmp_path, [(0, 5, 16), (100, 500, 16)], **small)


def test_what_is_measured_stands_in_the_report_and_in_the_file(tmp_path):
    sections = {"workload": synthetic(requests=40, rate_rps=40), "latency": AFFINE}
    run, results = run_of(**sections, measurement={"warm_up_s": 0.25, "for_s": 0.5})
    inside = int(results.columns.measured.sum())
    (line,) = (line for line in _lines(summary(run, results)) if line.startswith("Measured"))
    assert line.startswith(f"Measured    {inside} of 40 requests: those that arrived in [0.25, 0.75) s;")
    write_requests(tmp_path / "requests.csv.gz", results.columns)
    with gzip.open(tmp_path / "requests.csv.gz", "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["measured"] for row in rows] == [str(m).lower() for m in results.columns.measured.tolist()]
    run, results = run_of(**sections)
    assert not any(line.startswith("Measured") for line in _lines(summary(run, results)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("measurement.warm_up_s=-1", "measurement.warm_up_s: found -1"),
        ("measurement.for_s=0", "measurement.for_s: found 0"),
        ("measurement.warmup_s=1", r"measurement.warmup_s: unknown key \(did you mean warm_up_s\?\)"),
        ("measurement.warm_up_s=1e9", "measurement: nothing is measured: 20 requests arrived before warm_up_s 1e\\+09"),
    ],
)
def test_bad_windows_end_with_2(tmp_path, given, said):
    quick = str(ROOT / "scenarios" / "quickstart.yaml")
    command = ["-m", "twotower_sim", "run", quick, "--set", "workload.requests=20", "--set", given, "--out", "out"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search(said, done.stderr)
    assert list(tmp_path.iterdir()) == []
