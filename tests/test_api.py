"""The API: what the commands do, to the byte; frames; mappings; errors; and that it prints nothing."""

import doctest
import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import typer
import yaml
from conftest import ROOT, synthetic
from pandas.api.types import is_bool_dtype, is_float_dtype, is_integer_dtype, is_string_dtype
from typer.testing import CliRunner

from twotower_sim import api, outcomes
from twotower_sim.cli import app

CHAT = {
    "workload": synthetic(requests=60, rate_rps=4.0),
    "decoding": {"gamma": 0.7},
    "slo": {"request_latency_ms": 5000},
}
STUDY = {
    "scenario": "chat.yaml",
    "design": {"kind": "grid", "axes": {"scheduler.max_num_seqs": [4, 64], "decoding": [{"kind": "two_tower"}]}},
    "replications": 2,
    "metrics": ["request_latency.p90", "goodput"],
}
PLAN = {
    "scenario": "chat.yaml",
    "objectives": {"request_latency.p90": 4000},
    "choices": {"deployment.gpu": ["h100-sxm", "h200"]},
    "most_gpus": 8,
    "replications": 2,
}
TINY = ROOT / "reports" / "tiny-cpu.profile.json.gz"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, capfd):
    """A working directory with the files above; whatever a test does through the API, it prints nothing."""
    monkeypatch.chdir(tmp_path)
    for name, data in (("chat", CHAT), ("study", STUDY), ("plan", PLAN)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    yield tmp_path
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def command(capfd):
    """Runs a command as typed."""

    def call(*arguments):
        done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        capfd.readouterr()

    return call


def same_files(ours, theirs):
    """The same names and bytes, but for run.json, whose facts and figures have the same names."""
    names = sorted(path.name for path in Path(theirs).iterdir())
    assert sorted(path.name for path in Path(ours).iterdir()) == names
    for name in names:
        mine, other = (Path(folder, name).read_bytes() for folder in (ours, theirs))
        if name == "run.json":
            assert json.loads(mine).keys() == json.loads(other).keys()
        else:
            assert mine == other, name


# ---------------------------------------------------------------------- the same as the commands


def test_a_run(command):
    command("run", "chat.yaml", "--set", "decoding.gamma=0.6", "--out", "cli", "--timeline", "cli.trace", "-q")
    run = api.run("chat.yaml", {"decoding.gamma": 0.6})
    run.timeline("api.trace")
    run.save("api")
    same_files("api", "cli")
    assert Path("api.trace").read_bytes() == Path("cli.trace").read_bytes()
    assert run.summary == json.loads(Path("cli/summary.json").read_text())


ALONE = {"cache": None, "jobs": 1}


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (["run", "chat.yaml", "--set", "seed=2"], lambda: api.run("chat.yaml", {"seed": 2})),
        (["sweep", "study.yaml", "--set", "seed=2"], lambda: api.sweep("study.yaml", {"seed": 2}, **ALONE)),
        (
            ["compare", "chat.yaml", "chat.yaml", "--replications", "2", "--metric", "goodput"],
            lambda: api.compare(["chat.yaml"] * 2, replications=2, metrics=["goodput"], **ALONE),
        ),
        (["plan", "plan.yaml", "--set", "seed=2"], lambda: api.plan("plan.yaml", {"seed": 2}, **ALONE)),
    ],
)
def test_pages(words, call, command, monkeypatch):
    """The same, and they name the same command."""
    monkeypatch.setattr(sys, "argv", ["twotower-sim", *words])
    alone = [] if words[0] == "run" else ["--no-cache", "--jobs", 1]
    command(*words, *alone, "--html", "cli.html", "--out", "cli", "-q")
    result = call()
    result.html("api.html")
    assert result.command == sys.argv
    assert Path("api.html").read_bytes() == Path("cli.html").read_bytes()


def test_a_sweep(command):
    command("sweep", "study.yaml", "--set", "seed=3", "--out", "cli", "--no-cache", "--jobs", 1, "-q")
    sweep = api.sweep("study.yaml", {"seed": 3}, cache=None, jobs=1)
    sweep.save("api")
    same_files("api", "cli")
    assert sweep.report == json.loads(Path("cli/sweep.json").read_text())


def test_a_comparison(command):
    options = ["--replications", 2, "--metric", "request_latency.p90", "--no-cache", "--jobs", 1]
    Path("wide.yaml").write_text(yaml.safe_dump(CHAT | {"scheduler": {"max_num_seqs": 8}}))
    command("compare", "chat.yaml", "wide.yaml", *options, "--out", "cli", "-q")
    both = api.compare(["chat.yaml", "wide.yaml"], replications=2, metrics=["request_latency.p90"], cache=None, jobs=1)
    both.save("api")
    same_files("api", "cli")
    assert both.scenarios == ["chat", "wide"]


def test_a_plan(command):
    command("plan", "plan.yaml", "--set", "seed=3", "--out", "cli", "--cache", "kept", "--jobs", 1, "-q")
    plan = api.plan("plan.yaml", {"seed": 3}, cache="kept", jobs=1)
    plan.save("api")
    same_files("api", "cli")
    assert plan.met
    assert plan.answer == plan.report["answer"]


def test_traces(command, data):
    file = data / "traces" / "mooncake_conversation_trace.jsonl.gz"
    command("trace", "convert", file, "cli.csv", "--limit", 300, "--window", 10, 1e6)
    done = api.trace_convert(file, "api.csv", limit=300, window=(10, 1e6))
    assert (done.requests, done.format, len(done.warnings)) == (300, "mooncake", 1)
    command("trace", "sample", "mooncake-conversation", "cli.jsonl", "--requests", 50, "--seed", 2)
    sample = api.trace_sample("mooncake-conversation", "api.jsonl", 50, seed=2)
    assert len(sample.requests) == 50
    assert sample.lost == []
    command("trace", "fingerprint", "cli.csv", "cli.yaml")
    found = api.trace_fingerprint("cli.csv", "api.yaml", check=True)
    for ending in ("csv", "jsonl"):
        assert Path(f"api.{ending}").read_bytes() == Path(f"cli.{ending}").read_bytes()
    ours, theirs = (yaml.safe_load(Path(f"{name}.yaml").read_text()) for name in ("api", "cli"))
    assert ours == theirs
    assert found.requests == 300
    assert list(found.check) == ["figure", "trace", "drawn", "off"]
    described = api.trace_describe(file)
    assert described.stats.arrivals.span_s > 3000
    assert len(described.requests) == 12_031
    assert described.lengths.loc["output", "max"] == described.requests["output_tokens"].max()
    described.plot("trace.svg")
    assert "<svg" in Path("trace.svg").read_text()


def test_any_table_is_a_trace():
    Path("own.csv").write_text("at,in,out\n0.5,10,20\n1.5,30,40\nx,1,1\n")
    columns = {"arrival": "at", "input_tokens": "in", "output_tokens": "out"}
    found = api.trace_describe("own.csv", columns=columns, on_error="skip")
    assert found.requests.to_dict("list") == {
        "arrival_s": [0.0, 1.0],
        "input_tokens": [10, 30],
        "output_tokens": [20, 40],
    }
    assert "rows skipped: 1 malformed" in found.skipped[0]


def test_profiles(command):
    command("profile", "merge", "cli.json.gz", TINY, TINY)
    merged = api.profile_merge("api.json.gz", [TINY, TINY])
    assert Path("api.json.gz").read_bytes() == Path("cli.json.gz").read_bytes()
    shown = api.profile_show("api.json.gz")
    assert shown.profile == merged
    denoise = shown.passes.set_index("pass").loc["denoise"]
    assert denoise["fastest_ms"] == pytest.approx(
        1e3 * min(of for of in merged.latency.passes["denoise"].median_s if of)
    )
    assert (shown.commits["tokens_per_step"] >= 1).all()
    shown.plot("profile.svg")
    assert "<svg" in Path("profile.svg").read_text()
    same = api.profile_compare(TINY, "api.json.gz")
    assert (same.times["median"] == 1).all()
    assert (same.tokens["first"] == same.tokens["second"]).all()
    checked = api.profile_check(TINY)
    assert len(checked.facts) >= 2
    assert list(checked.passes) == list(shown.passes)


def test_a_log(command):
    logged = {"workload.requests": 300}
    api.run("chat.yaml", logged).save("run")
    command("validate", "--log", "run/requests.csv.gz", "chat.yaml", "--out", "cli", "--share", 0.6)
    found = api.validate_log("run/requests.csv.gz", "chat.yaml", share=0.6)
    found.save("api")
    same_files("api", "cli")
    assert found.verdict == json.loads(Path("cli/log_validation.json").read_text())["verdict"]
    assert (found.figures["error"].abs() < 1).all()
    assert (found.coefficients["value"] > 0).all()
    found.plot("pairs.svg")
    assert "<svg" in Path("pairs.svg").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_real_thing():
    length = {"kind": "constant", "value": 40}
    few = {"workload.requests": 6, "workload.arrivals.rate_rps": 50, "workload.output_tokens": length}
    found = api.validate([ROOT / "scenarios" / "validate_tiny.yaml"], few, profile=TINY, repetitions=3)
    found.save("out")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "fidelity.json",
        "profile.json.gz",
        "report.md",
        "runs.json.gz",
    ]
    assert json.loads(Path("out/fidelity.json").read_text()) == found.report
    assert set(found.errors["prediction"]) == {"recorded_commits", "drawn_commits", "beforehand"}
    assert is_float_dtype(found.errors["error"])
    assert "workload.requests=6" in found.command


def test_calibrating():
    few = {"batch": [1], "context": [0, 64], "tokens": [16], "repetitions": 3, "refine": 0, "only": "latency"}
    dry = api.calibrate("p.json.gz", dry_run=True, **few)
    assert dry.profile is None
    assert any(line.startswith("latency ") for line in dry.estimate)
    assert not Path("p.json.gz").exists()
    done = api.calibrate("p.json.gz", **few)
    assert api.profile_show("p.json.gz").profile == done.profile


def test_lists():
    found = api.trace_list()
    assert "mooncake" in set(found.formats["name"])
    assert found.public.set_index("name").loc["mooncake-conversation", "requests"] == 12_031
    assert api.schema()["title"] == "Scenario"
    resolved = api.check("chat.yaml", {"deployment.replicas": 2})
    assert (resolved.requests, resolved.gpus, resolved.gpu) == (60, 4, "h100-sxm")


# ---------------------------------------------------------------------- frames


def test_frames_of_a_run():
    run = api.run("chat.yaml")
    metrics, requests = run.metrics, run.requests
    assert list(metrics) == ["avg", "min", "max", "p99", "p90", "p75", "p50", "std"]
    assert all(map(is_float_dtype, metrics.dtypes))
    assert metrics.loc["request_latency", "p90"] == run.summary["metrics"]["request_latency"]["p90"]
    assert np.isnan(metrics.loc["goodput", "p90"])
    run.save("out")
    written = pandas.read_csv("out/requests.csv.gz")
    pandas.testing.assert_frame_equal(requests, written)
    kinds = [is_float_dtype if name.endswith("_s") else is_integer_dtype for name in list(requests)[:-1]]
    assert all(kind(requests[name]) for kind, name in zip(kinds, requests, strict=False))
    assert is_bool_dtype(requests["measured"])
    assert run.requests["finish_s"].max() == pytest.approx(run.summary["utilisation"]["duration_s"], abs=1)


def test_requests_that_were_rejected_have_no_times():
    memory = {"kv_blocks": 20, "oversized": "reject"}
    requests = api.run(CHAT, {"memory": memory, "scheduler.max_num_seqs": 4}).requests
    gone = requests["finish_s"].isna()
    assert 0 < gone.sum() < 60
    assert requests.loc[gone, "admit_s"].isna().all()
    assert (requests.loc[gone, "input_tokens"] + requests.loc[gone, "output_tokens"]).min() > 300


def test_frames_of_many_runs():
    sweep = api.sweep("study.yaml", cache=None, jobs=1)
    points, estimates = sweep.points, sweep.estimates
    assert list(points) == [
        "point", "scheduler.max_num_seqs", "decoding", "replication", "seed", "request_latency.p90", "goodput",
        "saturation", "error",
    ]  # fmt: skip
    assert points["scheduler.max_num_seqs"].tolist() == [4, 4, 64, 64]
    assert is_integer_dtype(points["scheduler.max_num_seqs"])
    assert is_string_dtype(points["decoding"])
    assert is_float_dtype(points["request_latency.p90"])
    assert list(estimates)[-6:] == ["metric", "n", "mean", "std", "low", "high"]
    assert all(is_float_dtype(estimates[name]) for name in ("mean", "std", "low", "high"))
    mean = points.query("point == 1")["request_latency.p90"].mean()
    assert estimates.query("point == 1 and metric == 'request_latency.p90'")["mean"].item() == pytest.approx(mean)
    once = api.sweep(STUDY | {"replications": 1}, cache=None, jobs=1).estimates
    assert is_float_dtype(once["low"])  # where no interval is known, too
    assert once["low"].isna().all()
    both = api.compare([CHAT, CHAT | {"name": "slow", "scheduler": {"max_num_seqs": 2}}], cache=None, jobs=1)
    assert list(both.differences) == [
        "scenario", "metric", "mean", "difference", "low", "high", "ratio", "interval_contains_0",
    ]  # fmt: skip
    assert all(is_float_dtype(both.differences[name]) for name in ("mean", "difference", "low", "high", "ratio"))
    plan = api.plan("plan.yaml", cache=None, jobs=1)
    assert is_float_dtype(plan.candidates["usd_per_hour"])
    assert is_bool_dtype(plan.trials["meets"])
    assert plan.candidates["usd_per_hour"].min() == plan.report["best"]["usd_per_hour"]


# ---------------------------------------------------------------------- what is given


def test_a_mapping_is_as_good_as_a_file(folder):
    assert api.run(CHAT | {"name": "chat"}).summary == api.run("chat.yaml").summary
    assert (
        api.sweep(STUDY, cache=None, jobs=1).report["points"]
        == api.sweep("study.yaml", cache=None, jobs=1).report["points"]
    )
    within = api.plan(PLAN | {"scenario": CHAT}, cache=None, jobs=1)
    assert within.report["best"] == api.plan(PLAN, cache=None, jobs=1).report["best"]
    assert within.report["plan"]["scenario"] == CHAT


def test_a_file_may_hold_its_scenario():
    Path("whole.yaml").write_text(yaml.safe_dump(STUDY | {"scenario": CHAT}, sort_keys=False))
    found = [api.sweep(of, cache=None, jobs=1) for of in ("whole.yaml", "study.yaml")]
    assert found[0].points.equals(found[1].points)
    wrong = yaml.safe_dump(STUDY | {"scenario": CHAT | {"modell": "x"}})
    Path("wrong.yaml").write_text(wrong)
    line = 1 + wrong.splitlines().index("  modell: x")
    with pytest.raises(api.InputError, match=f"wrong.yaml:{line}: modell: unknown key"):
        api.sweep("wrong.yaml", cache=None)


def test_files_of_a_mapping_are_relative_to_its_base(monkeypatch):
    Path("there/inside").mkdir(parents=True)
    Path("there/trace.csv").write_text("arrival_s,input_tokens,output_tokens\n0,10,20\n1,30,40\n")
    Path("there/chat.yaml").write_text(yaml.safe_dump({"workload": {"kind": "trace", "path": "trace.csv"}}))
    given = {"workload": {"kind": "trace", "path": "../trace.csv"}}
    assert api.run(given, base="there/inside").summary["counts"]["arrived"] == 2
    counts = ["counts.arrived"]
    assert api.sweep(STUDY | {"metrics": counts}, base="there", cache=None, jobs=1).points["counts.arrived"].eq(2).all()
    monkeypatch.chdir("there")
    assert api.run("chat.yaml", {"workload.path": "trace.csv"}).summary["counts"]["arrived"] == 2


def test_values_may_be_those_of_numpy():
    design = {
        "kind": "grid",
        "axes": {"decoding.gamma": np.array([0.6, 0.8]), "scheduler.max_num_seqs": range(4, 9, 4)},
    }
    found = api.sweep(STUDY | {"design": design}, {"workload.requests": np.int64(20)}, cache=None, jobs=1)
    assert found.points["decoding.gamma"].unique().tolist() == [0.6, 0.8]


def test_sections_are_set_before_what_is_in_them():
    run = api.run(CHAT, {"decoding.draft_tokens": 2, "decoding": {"kind": "speculative", "acceptance": 0.5}})
    assert run.summary["scenario"]["decoding"]["draft_tokens"] == 2


def test_nothing_that_is_given_changes():
    given, changes = json.dumps(STUDY | {"scenario": CHAT}), {"slo": {"request_latency_ms": 1}}
    of = json.loads(given)
    api.sweep(of, changes, cache=None, jobs=1)
    assert json.dumps(of) == given
    assert changes == {"slo": {"request_latency_ms": 1}}


NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: api.run("none.yaml"), "none.yaml: cannot be read"),
        (lambda: api.run(7), "<scenario>: found 7; expected the path of a file, or a mapping"),
        (lambda: api.run(CHAT | {"modell": "x"}), "<scenario>: modell: unknown key (did you mean model?)"),
        (lambda: api.run(CHAT | {1: "x"}), "<scenario>: key 1 is no text"),
        (lambda: api.run(CHAT | {"model": object}), "<scenario>: model: found <class 'object'>; expected text, numbers"),
        (lambda: api.run(CHAT, {"decoding.gama": 0.7}), "<set>: decoding.gama: unknown key (did you mean gamma?)"),
        (lambda: api.run(CHAT, {"decoding.gamma": "high"}), "<set>: decoding.gamma: found 'high'"),
        (lambda: api.run(CHAT, {"decoding.gamma": NAN}), "<set>: decoding.gamma: found nan"),
        (lambda: api.run(CHAT, ["decoding.gamma=0.7"]), "<set>: expected a mapping"),
        (lambda: api.run(CHAT, {"model": "gpt"}), "model 'gpt' is neither a preset"),
        (lambda: api.sweep(STUDY | {"scenario": 3}), "<study>: scenario: found 3; expected the path of a scenario, or"),
        (lambda: api.sweep(STUDY | {"scenario": "no.yaml"}), "<study>: scenario: no.yaml is no file"),
        (lambda: api.sweep(STUDY | {"scenario": CHAT | {"modell": 1}}, cache=None), "<scenario>: modell: unknown key"),
        (lambda: api.sweep("study.yaml", {"scheduler.max_num_seqs": 3}), "<set>: scheduler.max_num_seqs: has no effect"),
        (lambda: api.sweep(STUDY | {"metrics": ["goodputs"]}), "<study>: metrics: goodputs: unknown metric"),
        (lambda: api.sweep("study.yaml", backend="slurm"), "--backend: found 'slurm'; allowed: loky, dask, ray"),
        (lambda: api.sweep("study.yaml", jobs=0), "jobs: found 0; expected 1 or more"),
        (lambda: api.compare([CHAT]), "compare: found one scenario; expected two or more"),
        (lambda: api.compare([CHAT, CHAT | {"modell": 1}]), "<scenario-2>: modell: unknown key"),
        (lambda: api.compare([CHAT, CHAT], replications=0), "replications: found 0; expected 1 to 10000"),
        (lambda: api.plan(PLAN | {"objectives": {"ttft": 1}}), "<plan>: objectives: found 'ttft'"),
        (lambda: api.check({}), "<scenario>: workload: is missing"),
        (lambda: api.schema("fingerprint"), "--of: found 'fingerprint'; allowed: scenario, study, plan"),
        (lambda: api.trace_describe("none.csv"), "none.csv: cannot be read"),
        (lambda: api.trace_describe("x", format="azur"), "--format: found 'azur' (did you mean azure?)"),
        (lambda: api.trace_describe("x", columns={"arrival": "t"}), "--column: input_tokens=NAME is missing"),
        (lambda: api.trace_describe("x", on_error="ignore"), "--on-error: found 'ignore'; allowed: fail, skip"),
        (lambda: api.trace_convert("x", "y.csv", limit=0), "limit: found 0; expected 1 or more"),
        (lambda: api.trace_convert("x", "y.txt"), "y.txt: found ending '.txt'"),
        (lambda: api.trace_fingerprint("x", "y.yaml", plot="z.html"), "--plot: has no effect without --check"),
        (lambda: api.trace_sample("azure-conversation-2023", "y.csv", 0), "requests: found 0; expected 1 or more"),
        (lambda: api.trace_sample("azure", "y.csv", 10), "fingerprint 'azure' is neither a preset"),
        (lambda: api.trace_fetch("azure"), "trace fetch: 'azure' is no public trace"),
        (lambda: api.profile_show("none.json"), "none.json: not a profile"),
        (lambda: api.profile_merge("x.json", []), "profiles: found []; expected a list of one or more"),
        (lambda: api.trace_fetch([]), "names: found []; expected a list of one or more"),
        (lambda: api.validate(CHAT), "scenarios: found {'workload': "),
        (lambda: api.compare("chat.yaml"), "scenarios: found 'chat.yaml'; expected a list"),
        (lambda: api.validate([CHAT], repetitions=2), "repetitions: found 2; expected 3 or more"),
        (lambda: api.validate([CHAT]), "<scenario-1>: deployment.placement.kind: found split"),
        (lambda: api.validate_log("none.csv"), "none.csv: cannot be read"),
        (lambda: api.validate_log("none.csv", share=1), "share: found 1; expected 0.05 to 0.95"),
        (lambda: api.calibrate("p.json", batch=[4, 1]), "--batch 4,1: expected rising numbers"),
        (lambda: api.calibrate("p.json", repetitions=2), "--repetitions 2: expected 3 or more"),
        (lambda: api.run("chat.yaml").save("chat.yaml"), "chat.yaml: cannot be written"),
        (lambda: api.profile_show(TINY).plot("p.pdf"), "found suffix '.pdf'; allowed: .html, .png, .svg"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(call, said, folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(api.InputError) as error:
        call()
    assert said in str(error.value)
    assert sorted(folder.rglob("*")) == before


def test_without_the_extra_it_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "calibrate.validation", None)
    monkeypatch.setitem(sys.modules, "calibrate.calibration", None)
    for call in (lambda: api.validate([CHAT]), lambda: api.calibrate("p.json")):
        with pytest.raises(api.InputError, match=r"needs calibrate\.\w+: pip install 'twotower-sim\[calibrate\]'"):
            call()


# ---------------------------------------------------------------------- everything the command line does

ELSEWHERE = {
    "all": "trace_list", "column": "columns", "from": "mirror", "log": "validate_log", "metric": "metrics",
    "no_cache": "cache", "out": "save", "quiet": "progress", "share": "validate_log",
}  # fmt: skip
"""Options whose counterpart has another name."""


def commands(of: typer.Typer, path=()):
    for command in of.registered_commands:
        yield (*path, command.name or command.callback.__name__), command.callback
    for group in of.registered_groups:
        yield from commands(group.typer_instance, (*path, group.name))


def test_every_command_and_option_has_its_counterpart():
    """With the same default, where the command's says what it is."""
    found = {"_".join(path).removeprefix("scenario_"): callback for path, callback in commands(app)}
    assert set(found) | {"validate_log", "InputError"} == set(api.__all__)
    results = dict(inspect.getmembers(outcomes, inspect.isclass))
    for name, callback in found.items():
        function = getattr(api, name)
        parameters = inspect.signature(function).parameters
        known = {*parameters, *api.__all__}
        result = results.get(function.__annotations__["return"])
        known |= set(dir(result)) if result else set()
        for option, of in inspect.signature(callback).parameters.items():
            assert {option, ELSEWHERE.get(option)} & known or name == "calibrate", f"{name}: {option}"
            if option in parameters and of.default is not None:
                assert parameters[option].default == of.default, f"{name}: {option}"


def test_every_option_of_calibrate_has_its_counterpart():
    from calibrate.calibration import Settings
    from calibrate.cli import calibrate

    ours = inspect.signature(Settings).parameters | inspect.signature(api.calibrate).parameters
    renamed = {"block_size": "block_sizes", "gamma": "gammas", "steps": "steps_per_block", "eager": "graphs"}
    for name, option in inspect.signature(calibrate).parameters.items():
        mine = ours[renamed.get(name, name)]
        if name not in {*renamed, "out", "batch", "context", "tokens"}:
            assert mine.default == option.default, name


def test_every_function_has_an_example(monkeypatch, capfd):
    """Those of docstrings do what they say, but for those that take minutes or the network."""
    for name in ("scenarios", "reports"):
        Path(name).symlink_to(ROOT / name)
    api.trace_sample("azure-conversation-2023", "out/drawn.csv", 2000)
    load = {"kind": "fingerprint", "fingerprint": "azure-conversation-2023", "requests": 200}
    finder = doctest.DocTestFinder().find(api, extraglobs={"api": api, "chat": {"workload": load}})
    by_name = {test.name.rpartition(".")[2]: test for test in finder}
    for name in api.__all__:
        assert name == "InputError" or by_name[name].examples, name
    said = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in finder:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
    assert sum(len(test.examples) for test in finder) > 20


def test_the_example_of_the_readme(capfd):
    """With the first of the choices of the plan that it solves alone."""
    shipped = ROOT / "scenarios" / "plans" / "azure_conversation.yaml"
    plan = yaml.safe_load(shipped.read_text())
    first = next(iter(plan["choices"].items()))
    plan |= {"choices": dict([first]), "scenario": str(ROOT / "scenarios" / "quickstart.yaml")}
    Path("scenarios/plans").mkdir(parents=True)
    Path("scenarios/plans", shipped.name).write_text(yaml.safe_dump(plan))
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    exec(code)
    assert "meets all objectives at the least cost" in capfd.readouterr().out


def test_importing_is_quick():
    code = "import sys, twotower_sim.api; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert not {"torch", "pandas", "scipy", "altair", "optuna", "simpy", "numpy"} & set(loaded)


def test_the_notebook():
    """Whole; its answer keeps the promise, and its charts are charts of what there is."""
    path = ROOT / "scenarios" / "notebook.py"
    held = runpy.run_path(str(path))
    best = held["plan"].report["best"]
    assert held["plan"].met
    for name, bound in held["asked"]["objectives"].items():
        assert best["objectives"][name]["high"] <= bound
    assert best["quality"] >= held["asked"]["quality_floor"]
    assert len(held["traffic"].requests) == len(held["run"].requests) == 3000
    assert held["verdict"] == "STABLE"
    assert 0 < len(held["borne"]) < len(held["sweep"].points) == 16
    assert set(held["compared"].differences["scenario"]) == {"two-tower", "one-tower"}
    for chart in ("latencies", "costs"):
        assert held[chart].to_dict()["mark"]["type"] in ("circle", "bar")
    assert json.loads(Path("out/chat/plan.json").read_text()) == held["plan"].report
    lines = path.read_text().splitlines()
    assert len(lines) < 100
    assert lines.count("# %%") >= 8
