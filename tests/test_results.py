"""Results: invariants of whole runs, determinism, files, and definitions of metrics."""

import csv
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import AFFINE, ROOT, run_of, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check

from twotower_sim.errors import InputError
from twotower_sim.result import REQUEST_COLUMNS, all_or_nothing, summary, write_json, write_requests

AIPERF = {
    "time_to_first_token": "ms", "time_to_second_token": "ms", "inter_token_latency": "ms", "request_latency": "ms",
    "output_token_throughput": "tokens/sec", "output_token_throughput_per_user": "tokens/sec/user",
    "request_throughput": "requests/sec", "goodput": "requests/sec",
}  # fmt: skip
OURS = {
    "block_latency",
    "commit_gap",
    "queue_time",
    "nfe_per_block",
    "tokens_per_nfe",
    "output_token_throughput_per_gpu",
}
STATISTICS = {"unit", "avg", "min", "max", "std", "p50", "p75", "p90", "p95", "p99"}

SCENARIOS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 9),
        "workload": st.builds(
            synthetic,
            requests=st.integers(1, 120),
            rate_rps=st.sampled_from([0.5, 5, 500]),
            input_tokens=st.sampled_from([1, 40, 900]),
            output_tokens=st.sampled_from([1, 30, 200]),
        ),
        "decoding": st.sampled_from(
            [
                {"kind": "autoregressive"},
                {"kind": "two_tower"},
                {"kind": "two_tower", "gamma": 0.6, "steps_per_block": 8},
            ]
        ),
        "deployment": st.fixed_dictionaries(
            {"gpu": st.sampled_from(["h200", "b200"]), "replicas": st.integers(1, 3)}
            | {"placement": st.sampled_from([{"kind": "split"}, {"kind": "colocated"}])}
        ),
        "scheduler": st.fixed_dictionaries(
            {
                "max_num_seqs": st.sampled_from([1, 5, 64]),
                "prefill": st.sampled_from(["mixed", "first"]),
                "admission": st.sampled_from(["fcfs", "shortest_prompt"]),
                "host_overhead_ms": st.sampled_from([0, 2]),
            }
        ),
        "memory": st.sampled_from([{}, {"kv_blocks": 300, "state_slots": 9, "oversized": "reject"}]),
        "router": st.sampled_from([{"kind": "round_robin"}, {"kind": "power_of_two"}]),
        "latency": st.sampled_from([{"kind": "roofline"}, AFFINE]),
        "slo": st.just({"time_to_first_token_ms": 500, "inter_token_latency_ms": 20}),
    }
)


@settings(max_examples=120, deadline=None)
@given(SCENARIOS)
def test_invariants_of_any_run(sections):
    run, results = run_of(**sections)
    check(run, results)
    figures = summary(run, results)
    json.dumps(figures, allow_nan=False, default=float)
    for name, metric in figures["metrics"].items():
        assert set(metric) >= STATISTICS, name
        if metric["p50"] is not None:
            ordered = [metric[key] for key in ("min", "p50", "p75", "p90", "p95", "p99", "max")]
            assert ordered == sorted(ordered)
            assert metric["min"] <= metric["avg"] * (1 + 1e-12)
    for shares in figures["utilisation"]["share_of_time"].values():
        assert sum(shares.values()) == pytest.approx(1)
        if AFFINE not in (sections["latency"],) or "waiting" not in shares:
            assert min(shares.values()) >= -1e-6
    # 10. every figure names where it is from
    assert {"latency", "gpu", "model"} <= set(figures["provenance"])
    assert ("commits" in figures["provenance"]) == (sections["decoding"]["kind"] == "two_tower")


def test_metrics_by_name_and_unit():
    run, results = run_of(workload=synthetic(), slo={"request_latency_ms": 500})
    metrics = summary(run, results)["metrics"]
    assert {name: metrics[name]["unit"] for name in AIPERF} == AIPERF
    assert set(metrics) >= OURS
    assert all(metrics[name]["avg"] is not None for name in set(AIPERF) | OURS)


@pytest.mark.parametrize(("kind", "bound_ms"), [("two_tower", 60), ("autoregressive", 11)])
def test_definitions(kind, bound_ms):
    """From the per-request columns, as AIPerf's metrics reference writes them."""
    _, results = run_of(
        workload=synthetic(requests=300, rate_rps=20, output_tokens=40),
        decoding={"kind": kind},
        latency=AFFINE,
        slo={"time_to_first_token_ms": bound_ms, "inter_token_latency_ms": 8},
    )
    c, metrics = results.columns, results.metrics
    ttft = (c.first_ns - c.arrival_ns) / 1e6
    latency = (c.finish_ns - c.arrival_ns) / 1e6
    several = c.output_tokens > 1
    itl = (latency - ttft)[several] / (c.output_tokens - 1)[several]
    duration_s = (c.finish_ns.max() - c.arrival_ns.min()) / 1e9
    assert metrics["time_to_first_token"]["p99"] == pytest.approx(np.percentile(ttft, 99))
    assert metrics["request_latency"]["avg"] == pytest.approx(latency.mean())
    assert metrics["inter_token_latency"]["p90"] == pytest.approx(np.percentile(itl, 90))
    assert metrics["output_token_throughput"]["avg"] == pytest.approx(c.output_tokens.sum() / duration_s)
    assert metrics["output_token_throughput_per_user"]["p50"] == pytest.approx(np.median(1e3 / itl[itl > 0]))
    assert metrics["request_throughput"]["avg"] == pytest.approx(300 / duration_s)
    second = c.second_ns >= 0
    assert metrics["time_to_second_token"]["max"] == pytest.approx((c.second_ns - c.first_ns)[second].max() / 1e6)
    met = ttft <= bound_ms
    met[several] &= itl <= 8
    assert 0 < met.sum() < 300
    assert metrics["goodput"]["avg"] == pytest.approx(met.sum() / duration_s)
    assert metrics["good_request_fraction"]["avg"] == pytest.approx(met.mean())
    gaps = metrics["commit_gap"]
    moments = -(-c.output_tokens // 16) if kind == "two_tower" else c.output_tokens
    assert gaps["count"] == (moments - 1).sum()
    assert gaps["avg"] * gaps["count"] == pytest.approx((latency - ttft).sum())
    if kind == "two_tower":
        assert metrics["nfe_per_block"]["avg"] * metrics["nfe_per_block"]["count"] == pytest.approx(c.nfe.sum())
        assert metrics["tokens_per_nfe"]["avg"] == pytest.approx((c.output_tokens / c.nfe).mean())
        assert sum(int(k) * n for k, n in results.blocks["by_steps"].items()) == c.nfe.sum()


def test_a_request_keeps_its_luck_in_any_deployment():
    """Invariant 6: only where and when it runs changes, not how many steps its blocks take."""

    def luck(**sections):
        _, results = run_of(workload=synthetic(requests=200, rate_rps=20), **sections)
        assert results.counts["preemptions"] == 0
        return results.columns.nfe.tolist()

    expected = luck()
    assert luck(deployment={"gpu": "b200", "replicas": 3}, router={"kind": "random"}) == expected
    assert luck(scheduler={"max_num_seqs": 4, "admission": "shortest_prompt", "prefill": "first"}) == expected
    assert luck(latency=AFFINE, memory={"kv_block_tokens": 64}) == expected
    assert luck(seed=1) != expected


def test_preempted_work_is_counted_in_nfe():
    _, results = run_of(
        workload=synthetic(requests=40, rate_rps=100), memory={"kv_blocks": 120, "state_slots": 16}, latency=AFFINE
    )
    assert results.counts["preemptions"] > 5
    steps = sum(int(k) * n for k, n in results.blocks["by_steps"].items())
    assert results.columns.nfe.sum() > steps  # denoise steps that were lost


def test_cost_follows_gpus_price_and_power():
    run, results = run_of(workload=synthetic(), deployment={"replicas": 3})
    cost, seconds = results.cost, results.utilisation["duration_s"]
    assert run.gpus == 6
    assert cost["gpu_hours"] == pytest.approx(6 * seconds / 3600)
    assert cost["usd"] == pytest.approx(cost["gpu_hours"] * run.gpu.price_usd_per_hour)
    assert cost["energy_kwh_at_full_power"] == pytest.approx(cost["gpu_hours"] * 0.7)
    millions = results.columns.output_tokens.sum() / 1e6
    assert cost["usd_per_million_output_tokens"] == pytest.approx(cost["usd"] / millions)
    _, unpriced = run_of(workload=synthetic(), deployment={"gpu": "gb10"})
    assert unpriced.cost["usd"] is None


def test_rejected_requests_are_counted_and_listed(tmp_path):
    _, results = run_of(
        workload=synthetic(requests=100),
        memory={"kv_blocks": 40, "state_slots": 8, "oversized": "reject"},
        latency=AFFINE,
    )
    assert 0 < results.counts["rejected"] < 100
    assert results.counts["completed"] == 100 - results.counts["rejected"]
    write_requests(tmp_path / "r.csv.gz", results.columns)
    table = pd.read_csv(tmp_path / "r.csv.gz")
    assert table["finish_s"].isna().sum() == results.counts["rejected"]
    assert not table["arrival_s"].isna().any()


def test_a_request_that_can_never_fit_is_an_error():
    with pytest.raises(InputError, match=r"request \d+ \(\d+ input, \d+ output tokens\) needs \d+ tokens at once"):
        run_of(workload=synthetic(requests=100), memory={"kv_blocks": 40, "state_slots": 8})
    with pytest.raises(InputError, match="no request fits"):
        run_of(
            workload=synthetic(requests=10, input_tokens=5000),
            memory={"kv_blocks": 1, "state_slots": 8, "oversized": "reject"},
        )
    with pytest.raises(InputError, match="without chunked_prefill a round holds 4096 tokens"):
        run_of(
            workload=synthetic(requests=100, input_tokens=5000),
            scheduler={"chunked_prefill": False, "max_num_batched_tokens": 4096},
        )


# ---------------------------------------------------------------------- files


def test_requests_file_reads_back_exactly(tmp_path):
    _, results = run_of(workload=synthetic(requests=70), latency=AFFINE)
    c = results.columns
    write_requests(tmp_path / "requests.csv.gz", c)
    with gzip.open(tmp_path / "requests.csv.gz", "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == REQUEST_COLUMNS
    assert [int(row["request_id"]) for row in rows] == list(range(70))
    for name in ("arrival", "admit", "first", "finish"):
        key = "first_token_s" if name == "first" else f"{name}_s"
        found = [int(row[key].replace(".", "")) for row in rows]
        assert found == getattr(c, f"{name}_ns").tolist()
    assert [int(row["nfe"]) for row in rows] == c.nfe.tolist()


SCENARIO = """\
workload:
  kind: synthetic
  requests: 300
  arrivals: {kind: gamma, rate_rps: 30, cv: 2}
  input_tokens: {kind: lognormal, mean: 300, cv: 1}
  output_tokens: {kind: lognormal, mean: 100, cv: 1}
deployment: {replicas: 3}
router: {kind: power_of_two}
"""


def test_the_same_bytes_whatever_the_hash_seed(tmp_path):
    """Invariant 5, in processes of their own."""
    (tmp_path / "s.yaml").write_text(SCENARIO)
    written = []
    for seed in ("0", "1"):
        out = tmp_path / seed
        command = [sys.executable, "-m", "twotower_sim", "run", "s.yaml", "--out", str(out), "-q"]
        subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": seed})
        written.append([(out / name).read_bytes() for name in ("summary.json", "requests.csv.gz")])
    assert written[0] == written[1]


def test_nothing_is_lost_when_writing_fails(tmp_path):
    target = tmp_path / "summary.json"
    target.write_text("earlier")
    with pytest.raises(RuntimeError), all_or_nothing() as stage:
        stage(target).write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert target.read_text() == "earlier"
    with all_or_nothing() as stage:
        stage(target).write_text("whole")
        assert target.read_text() == "earlier"
    assert target.read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_full_disk_is_said(tmp_path):
    with pytest.raises(InputError, match="cannot be written: No space left on device"), all_or_nothing() as stage:
        stage(tmp_path / "x")
        (ROOT / "/dev/full").write_text("x" * 100_000)
    with pytest.raises(InputError, match="cannot be written"), all_or_nothing() as stage:
        (tmp_path / "file").write_text("")
        stage(tmp_path / "file" / "below")


def test_no_nan_reaches_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
