"""The command line as users meet it: every documented command, every scenario, exit codes, interruption."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from twotower_sim.cli import app, main
from twotower_sim.scenario import load_scenario

SCENARIOS = sorted((ROOT / "scenarios").glob("*.yaml"))
TRACES = {
    "mooncake_conversation": "mooncake_conversation_trace.jsonl.gz",
    "azure_conversation": "AzureLLMInferenceTrace_conv.csv.gz",
}


def call(*arguments: str, cwd=ROOT, env=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "twotower_sim", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def test_help():
    assert "run" in call("--help").stdout
    assert "--timeline" in call("run", "--help").stdout


def test_run_prints_and_writes(tmp_path):
    done = call("run", str(ROOT / "scenarios" / "quickstart.yaml"), "--set", "workload.requests=200", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # progress is silent where stderr is no terminal
    assert "Time to First Token (ms)" in done.stdout
    assert "observed: github junze-eng/twotower-repro" in done.stdout
    out = tmp_path / "out" / "quickstart"
    figures = json.loads((out / "summary.json").read_text())
    assert figures["counts"]["completed"] == 200
    assert figures["scenario"]["workload"]["requests"] == 200
    clock = json.loads((out / "run.json").read_text())
    assert clock["wall_s"] > 0
    assert {"twotower-sim", "numpy", "simpy", "python"} <= set(clock["versions"])
    assert "wall" not in (out / "summary.json").read_text()


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", [None, "two_tower", "autoregressive"])
def test_every_scenario_runs_as_it_is_and_in_both_modes(path, kind, tmp_path, request):
    overrides = ["--set", f"decoding.kind={kind}"] if kind else []
    if path.stem in TRACES:
        trace = request.getfixturevalue("data") / "traces" / TRACES[path.stem]
        overrides += ["--set", f"workload.path={trace}"]
    done = call("run", str(path), *overrides, "--out", str(tmp_path), "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    counts = json.loads((tmp_path / "summary.json").read_text())["counts"]
    assert counts["completed"] == counts["arrived"] > 0


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_is_valid_and_says_what_it_is(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert load_scenario(path).name == path.stem


@pytest.fixture
def mirror(tmp_path, data):
    """The address of a folder with a public trace under the name that it is fetched by."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    packed = data / "traces" / TRACES["mooncake_conversation"]
    (folder / "mooncake-conversation.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_commands_of_the_readme(tmp_path, data, mirror):
    """Every twotower-sim line of the README, as printed, but for where results go and where downloads come from."""
    lines = re.findall(r"^\.venv/bin/twotower-sim (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        arguments = line.split("#")[0].split()
        if arguments[0] in ("run", "validate", "sweep", "compare", "plan"):
            name = "log" if "--log" in arguments else Path(arguments[1]).stem
            arguments += ["--out", str(tmp_path / "out" / name)]
        if arguments[0] in ("sweep", "compare", "plan"):
            arguments += ["--cache", str(tmp_path / "cache")]
        if arguments[0] == "plan":
            arguments += ["--set", "workload.requests=400"]
        if arguments[0] == "validate" and "--log" not in arguments:  # without calibrating, and less of it
            arguments += [
                "--profile",
                "reports/tiny-cpu.profile.json.gz",
                "--repetitions",
                "3",
                "--set",
                "workload.requests=8",
            ]
        if arguments[:2] == ["trace", "fetch"]:
            arguments += ["--from", mirror, "--to", "out"]
        arguments = [str(tmp_path / a) if a.startswith("out") else a for a in arguments]
        arguments = [str(tmp_path / "trace.json") if a == "trace.json" else a for a in arguments]
        arguments = [a.replace("FILE", str(data / "traces" / TRACES["mooncake_conversation"])) for a in arguments]
        done = call(*arguments)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_check(tmp_path):
    done = call("scenario", "check", "scenarios/quickstart.yaml", "--set", "deployment.replicas=3")
    assert done.returncode == 0
    assert "6 x h100-sxm, 3 replica(s)" in done.stdout
    wrong = call("scenario", "check", "scenarios/quickstart.yaml", "--set", "deployment.gpu=h300")
    assert wrong.returncode == 2
    assert "gpu 'h300' is neither a preset (a100-80gb, b200, gb10, h100-sxm, h200) nor a file" in wrong.stderr


@pytest.mark.parametrize(
    ("of", "title"), [((), "Scenario"), (("--of", "study"), "Study"), (("--of", "plan"), "PlanFile")]
)
def test_schema(of, title):
    assert json.loads(call("scenario", "schema", *of).stdout)["title"] == title


QUICK = "scenarios/quickstart.yaml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nothing.yaml"], "nothing.yaml: cannot be read: No such file or directory"),
        (["run", "."], "cannot be read: Is a directory"),
        (["run", QUICK, "--set", "foo=1"], "foo: unknown key"),
        (["run", QUICK, "--set", "model=gpt"], "model 'gpt' is neither a preset (nemotron-3-nano-30b-a3b,"),
        (["run", QUICK, "--set", "model=nemotron-3-nano-30b-a3b"], "has one tower; decoding.kind two_tower needs two"),
        (["run", QUICK, "--set", "deployment.placement.kind=colocated"], "both towers of nemotron-twotower-30b-a3b need"),
        (["run", QUICK, "--set", "deployment.placement.link=x"], "link: found 'x'; h100-sxm has nvlink, pcie, network"),
        (["run", QUICK, "--set", "decoding.gamma=0.99"], "decoding.gamma 0.99 with steps_per_block 16: class mixed was measured at (gamma, steps) (0.5, 8),"),
        (["run", QUICK, "--set", "decoding.block_size=32"], "decoding.block_size: found 32; commits were measured at 16"),
        (["run", QUICK, "--set", "commits.kind=profile", "--set", "commits.path=no.json"], "not a profile"),
        (["run", QUICK, "--set", "commits.kind=constant", "--set", "commits.tokens_per_step=0.5"], "tokens_per_step: found 0.5"),
        (["run", QUICK, "--set", "latency.kind=affine"], "latency.prefill: is missing"),
        (["run", QUICK, "--set", "latency={kind: affine, prefill: {}}"], "latency.denoise: is missing; decoding.kind two_tower"),
        (["run", QUICK, "--set", "workload.kind=trace", "--set", "workload.path=no.jsonl"], "no.jsonl: cannot be read"),
        (["run", QUICK, "--out", "README.md"], "README.md: cannot be written: "),
        (["run", QUICK, "--out", "/proc/nowhere"], "/proc/nowhere: cannot be written: "),
        (["run", QUICK, "--bogus"], "No such option"),
        (["run"], "Missing argument"),
        (["simulate"], "No such command"),
    ],
)  # fmt: skip
def test_bad_input_is_explained_with_exit_code_2(arguments, said):
    done = call(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_failures_leave_earlier_results_alone(tmp_path):
    small = ["--set", "workload.requests=50", "--out", str(tmp_path)]
    assert call("run", QUICK, *small).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "folder").mkdir()
    for timeline in ("/proc/nowhere/t.json", str(tmp_path / "folder"), str(tmp_path / "summary.json"), "/dev/null", ""):
        failed = call("run", QUICK, *small, "--set", "seed=1", "--timeline", timeline)
        assert failed.returncode == 2
        assert "cannot be written" in failed.stderr
        assert "Traceback" not in failed.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_failed_run_leaves_no_folder(tmp_path):
    endless = "latency={kind: affine, prefill: {base_ms: 1e6}, denoise: {base_ms: 1e6, per_context_token_ms: 1e6}, extend: {}}"
    failed = call("run", QUICK, "--out", str(tmp_path / "a" / "b"), "--set", endless)
    assert (failed.returncode, "146 years" in failed.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_importing_is_quiet(tmp_path):
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    interrupted = call("--help", cwd=tmp_path)
    assert (interrupted.returncode, interrupted.stdout, interrupted.stderr) == (130, "", "")


def test_too_little_memory_is_said(monkeypatch, capsys):
    def exhaust(*_):
        raise MemoryError

    monkeypatch.setattr("twotower_sim.report.run_and_report", exhaust)
    monkeypatch.setattr(sys, "argv", ["twotower-sim", "run", QUICK])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("Error: memory does not hold")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_ctrl_c_leaves_earlier_results_alone(tmp_path):
    small = ["run", QUICK, "--out", str(tmp_path), "--set"]
    assert call(*small, "workload.requests=50").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower_sim", *small, "workload.requests=3000000"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while cpu_seconds(process.pid) < 1.5:  # it simulates by then, however slow the machine
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in stderr
    assert "Traceback" not in stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_in_process(tmp_path, monkeypatch, capsys):
    """The same entry points without a process of their own."""
    done = CliRunner().invoke(app, ["run", str(ROOT / QUICK), "--out", str(tmp_path), "--set", "workload.requests=20"])
    assert done.exit_code == 0
    monkeypatch.setattr(sys, "argv", ["twotower-sim", "run", "nothing.yaml"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("Error: nothing.yaml")
