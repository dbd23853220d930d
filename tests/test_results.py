"""Results: invariants of whole runs, determinism, files, and definitions of metrics."""

import csv
import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import AFFINE, run_of, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check

from twotower_sim.console import _lines
from twotower_sim.errors import InputError
from twotower_sim.requests import LATEST_NS
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
        assert min(shares.values()) >= 0
    if not run.latency.side_by_side:
        for engine in run.engines:  # shares scale away what rounding to nanoseconds takes, and no more
            passes_s = engine.denoiser_s + sum(engine.context_s)
            assert passes_s <= (engine.busy_ns + engine.rounds) / 1e9
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
        workload=synthetic(rate_rps=20, requests=300) | {"output_tokens": {"kind": "lognormal", "mean": 40, "cv": 4}},
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
    assert met[~several].any()  # but an objective on what a request does not have is not met
    met[~several] = False
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


def test_autoregressive_decoding_has_no_denoiser_forwards():
    _, results = run_of(workload=synthetic(requests=20), decoding={"kind": "autoregressive"})
    assert not results.columns.nfe.any()


def test_no_share_of_time_is_negative_where_towers_take_turns():
    """Rounds last whole nanoseconds; thousands of them may be shorter than their passes, as here."""
    run, results = run_of(
        workload=synthetic(requests=400), deployment={"gpu": "b200", "placement": {"kind": "colocated"}}
    )
    (engine,) = run.engines
    assert engine.busy_ns / 1e9 < engine.denoiser_s + sum(engine.context_s) - 1e-7
    shares = results.utilisation["share_of_time"]["gpus"]
    assert 0 <= shares["host"] < 1e-7
    assert not any("-" in line for line in _lines(summary(run, results)) if line.startswith("Gpus "))


def test_a_run_beyond_64_bits_of_nanoseconds_is_an_error(tmp_path):
    """No request is lost in silence: not one that arrives at the end of the clock, not one that lasts beyond it."""
    row = '{"timestamp": %d, "input_length": 5, "output_length": 40}\n'
    (tmp_path / "late.jsonl").write_text(row % 0 + row % (LATEST_NS // 10**6))
    with pytest.raises(InputError, match="more than 146 years"):
        run_of(tmp_path, workload={"kind": "trace", "path": "late.jsonl"}, latency=AFFINE)
    endless = AFFINE | {"denoise": {"base_ms": 1e6, "per_context_token_ms": 1e6}}
    with pytest.raises(InputError, match="more than 146 years"):
        run_of(workload=synthetic(requests=20, input_tokens=50_000), latency=endless)


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
    rejected = table["finish_s"].isna()
    assert rejected.sum() == results.counts["rejected"]
    assert not table["arrival_s"].isna().any()
    assert (table.loc[rejected, ["nfe", "blocks"]] == 0).all(axis=None)
    assert (table.loc[~rejected, ["nfe", "blocks"]] > 0).all(axis=None)


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
    """The error of a write names no file."""
    target = tmp_path / "new" / "folder" / "x"
    with (
        pytest.raises(InputError, match=f"^{target}: cannot be written: No space left on device"),
        all_or_nothing() as stage,
    ):
        stage(target)
        Path("/dev/full").write_text("x" * 100_000)
    with pytest.raises(RuntimeError), all_or_nothing() as stage:
        stage(tmp_path / "new" / "y")
        stage(target)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_lets_nothing_be_removed_is_said(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    target = tmp_path / "x"
    with pytest.raises(InputError, match=f"^{target}: cannot be written: Read-only file system"), all_or_nothing() as s:
        monkeypatch.setattr(Path, "touch", refuse)
        monkeypatch.setattr(Path, "unlink", refuse)
        s(target)


def test_what_cannot_be_written_is_said_before_it_is_tried(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "same").symlink_to(tmp_path / "file")
    for target, said in (("file/below", "File exists"), ("folder", "no regular file"), ("", "no regular file")):
        with pytest.raises(InputError, match=said), all_or_nothing() as stage:
            stage(tmp_path / target)
    for twice in ("file", "same", "folder/../file"):
        with pytest.raises(InputError, match=f"{twice}: cannot be written: another result"), all_or_nothing() as stage:
            stage(tmp_path / "file")
            stage(tmp_path / twice)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", "same"}


def test_no_nan_reaches_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
