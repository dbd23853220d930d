"""validate from the command line to its files, on the tiny trained model; never how long anything takes."""

import gzip
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from typer.testing import CliRunner

from calibrate import validation
from twotower_sim.cli import app
from twotower_sim.errors import InputError
from twotower_sim.profile import load_profile

SCENARIO = ROOT / "scenarios" / "validate_tiny.yaml"
PROFILE = ROOT / "reports" / "tiny-cpu.profile.json.gz"
FEW = [
    "--set",
    "workload.requests=6",
    "--set",
    "workload.arrivals.rate_rps=50",
    "--set",
    "workload.output_tokens={kind: constant, value: 40}",
]
TINY = [*FEW, "--set", "workload.input_tokens={kind: constant, value: 40}", "--set", "scheduler.max_num_seqs=2", "--set", "scheduler.max_num_batched_tokens=64"]  # fmt: skip


def call(*arguments):
    done = CliRunner().invoke(app, ["validate", *(str(a) for a in arguments)])
    if isinstance(done.exception, InputError):
        raise done.exception
    assert done.exception is None, done.exception
    return done


def variant(folder, name, old, new):
    """The scenario with something else in it, in another folder."""
    path = folder / f"{name}.yaml"
    path.write_text(SCENARIO.read_text().replace(old, new).replace("../", f"{ROOT}/"))
    return path


def test_on_a_given_profile(tmp_path):
    """Two scenarios, three repetitions: files, figures and picture say the same."""
    other = variant(tmp_path, "autoregressive", "{kind: two_tower, gamma: 0.8}", "{kind: autoregressive}")
    out = tmp_path / "out"
    done = call(
        SCENARIO,
        other,
        *FEW,
        "--profile",
        PROFILE,
        "--repetitions",
        3,
        "--out",
        out,
        "--plot",
        tmp_path / "p.svg",
    )
    assert done.output.count("Recorded commits: ") == done.output.count("Beforehand: ") == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "fidelity.json",
        "profile.json.gz",
        "report.md",
        "runs.json.gz",
    ]
    found = json.loads((out / "fidelity.json").read_text())
    report = (out / "report.md").read_text()
    assert [scenario["name"] for scenario in found["scenarios"]] == ["validate_tiny", "autoregressive"]
    assert not found["calibrated"]
    assert "known of the machine's speed during the runs: all tables" in report  # of a profile without engine figures
    assert str(ROOT) not in json.dumps([scenario["scenario"]["latency"] for scenario in found["scenarios"]])
    for scenario in found["scenarios"]:
        assert scenario["rounds_that_strayed"] == 0
        assert all(parts["scheduling"] == 0 for parts in scenario["parts"].values())
        assert len(scenario["slowness"]) == len(scenario["measured"]) == 3
        error = scenario["recorded_commits"]["errors"]["request_latency.p50"]
        assert f"{error['middle']:+.1%} ({error['low']:+.1%} to {error['high']:+.1%})" in report
    runs = json.loads(gzip.decompress((out / "runs.json.gz").read_bytes()))
    assert [run["name"] for run in runs] == ["validate_tiny"] * 3 + ["autoregressive"] * 3
    for run in runs:
        times = zip(*(run["requests"][key] for key in ("arrival_ns", "admit_ns", "first_ns", "finish_ns")), strict=True)
        assert all(a <= b <= c <= d for a, b, c, d in times)
        assert all(a["end_ns"] <= b["start_ns"] for a, b in zip(run["rounds"], run["rounds"][1:], strict=False))
    assert [sum(block) for request in runs[0]["commits"] for block in request] == [16] * (6 * 3)
    assert len(runs[0]["blocks"]) == 6 * 3
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_calibrating_between_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "SAMPLES", 1)
    monkeypatch.setattr(validation, "PROMPTS_TO_FIT", 2)
    monkeypatch.setattr(validation, "DRAWS", 2)
    torch.set_num_threads(2)
    call(SCENARIO, *TINY, "--repetitions", 3, "--out", tmp_path)
    profile = load_profile(str(tmp_path / "profile.json.gz"))
    assert profile.latency.passes["denoise"].axes["sequences"] == [1, 2]
    assert len(profile.latency.passes["denoise"].samples_s[0]) == 3
    assert set(profile.latency.engine.ratios) >= {"denoise", "extend", "decode", "prefill"}
    assert profile.commits.classes["template"].points == [(0.8, 16)]
    report = (tmp_path / "report.md").read_text()
    assert "measured between the runs" in report
    assert "Probes during a run" in report
    assert "1 thread of torch" in report  # as calibrate has by default, whatever the environment says


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([SCENARIO, "--set", "decoding.kind=mock_ar"], "decoding.kind: found mock_ar; the real engine does two_tower or autoregressive"),
        ([SCENARIO, "--set", "deployment.replicas=2"], "deployment.replicas: found 2; the real engine does 1"),
        ([SCENARIO, "--set", "deployment.placement.kind=split"], "deployment.placement.kind: found split; the real engine does colocated"),
        ([SCENARIO, "--set", "memory.prefix_cache.kind=hybrid"], "memory.prefix_cache.kind: found hybrid"),
        ([SCENARIO, "--set", "scheduler.host_overhead_ms=1"], "scheduler.host_overhead_ms: found 1"),
        ([SCENARIO, "--set", "decoding.block_size=8"], "decoding.block_size: found 8; twotower-tiny has 16"),
        ([SCENARIO, "--set", "commits.kind=observed"], "commits.kind: found observed; expected profile"),
        ([SCENARIO, "--profile", "nothing.json"], "nothing.json: not a profile"),
        ([SCENARIO, "--model", "nowhere/at-all"], "nowhere/at-all"),
        ([SCENARIO, "--plot", "p.pdf"], "found suffix '.pdf'"),
        ([SCENARIO, *FEW, "--profile", PROFILE, "--set", "commits.class=poetry"], "commits.class: found poetry; there are texts to serve of code, template"),
        ([SCENARIO, "--profile", PROFILE, "--prompts", "nothing.jsonl", *FEW], "nothing.jsonl: cannot be read"),
        ([], "nothing to validate; name a scenario, or measurements with --log"),
        ([SCENARIO, SCENARIO, "--log", PROFILE], "found 2 scenarios; expected one at most"),
        (["--log", "nothing.csv"], "nothing.csv: cannot be read"),
        ([SCENARIO, "--share", 0.3], "validate --share: has no effect without --log"),
        (["--log", "nothing.csv", "--threads", 2], "validate --threads: has no effect with --log"),
        (["--log", "nothing.csv", "--profile", PROFILE], "validate --profile: has no effect with --log"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(arguments, said, tmp_path):
    with pytest.raises(InputError, match=re.escape(said)):
        call(*arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scenarios_have_one_model(tmp_path):
    other = variant(tmp_path, "other", "../calibrate/tiny/config.json", "nemotron-twotower-30b-a3b")
    with pytest.raises(InputError, match="the scenarios have different models"):
        call(SCENARIO, other, "--out", tmp_path / "out")


def test_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "twotower_sim", "validate", str(SCENARIO), "--set", "deployment.replicas=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ")
