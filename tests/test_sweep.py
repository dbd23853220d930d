"""Sweeps: designs, common random numbers, the cache, interruption, and the same bytes wherever they run."""

import csv
import gzip
import json
import os
import pty
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from typer.testing import CliRunner

from twotower_sim import experiments
from twotower_sim.cli import app
from twotower_sim.errors import InputError
from twotower_sim.experiments import Experiment, run_all
from twotower_sim.figures import figure, figures_of
from twotower_sim.interval import estimate
from twotower_sim.metrics import evaluate
from twotower_sim.result import summary
from twotower_sim.result_cache import ResultCache
from twotower_sim.scenario import Scenario, load_scenario
from twotower_sim.simulation import prepare, simulate
from twotower_sim.study import load_study
from twotower_sim.workers import Workers

RESULTS = ("points.csv", "summary.csv", "sweep.json")
SCENARIO = """
workload:
  kind: synthetic
  requests: 60
  arrivals: {kind: poisson, rate_rps: 20}
  input_tokens: {kind: lognormal, mean: 300, cv: 1}
  output_tokens: {kind: lognormal, mean: 80, cv: 1}
decoding: {gamma: 0.7}
"""
GRID = {"kind": "grid", "axes": {"scheduler.max_num_seqs": [4, 64], "decoding.gamma": [0.6, 0.8]}}


@pytest.fixture
def study(tmp_path):
    """Writes a study and its scenario; gives the path."""
    (tmp_path / "scenario.yaml").write_text(SCENARIO)

    def write(name="study", **changes):
        plain = {"scenario": "scenario.yaml", "design": GRID, "metrics": ["request_latency.p90"]} | changes
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: of for key, of in plain.items() if of is not None}, sort_keys=False))
        return path

    return write


def sweep(path, *arguments, code=0):
    """Runs in this process, on one core, into out/ beside the study."""
    where = ["--out", str(path.parent / "out" / path.stem), "--cache", str(path.parent / "cache"), "--jobs", "1"]
    done = CliRunner().invoke(app, ["sweep", str(path), *where, *map(str, arguments)])
    if isinstance(done.exception, InputError):
        assert code == 2
        return str(done.exception)
    assert done.exit_code == code, done.output
    return done.output


def bytes_of(path):
    return [(path.parent / "out" / path.stem / name).read_bytes() for name in RESULTS]


def rows_of(path, name="points.csv"):
    with (path.parent / "out" / path.stem / name).open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def simulated(monkeypatch):
    """Scenarios simulated in this process."""
    made = []
    outcome = Experiment.outcome

    def counted(experiment):
        made.append(experiment.scenario)
        return outcome(experiment)

    monkeypatch.setattr(Experiment, "outcome", counted)
    return made


# ---------------------------------------------------------------------- designs


def values_of(path):
    return [point.values for point in load_study(path, [])[1]]


def test_a_grid_is_every_combination(study):
    found = [tuple(of.values()) for of in values_of(study())]
    assert found == [(4, 0.6), (4, 0.8), (64, 0.6), (64, 0.8)]


def test_a_list_leaves_what_it_does_not_name(study):
    points = [{"decoding.gamma": 0.5}, {"decoding": {"kind": "autoregressive"}}]
    loaded, found = load_study(study(design={"kind": "list", "points": points}), [])
    assert loaded.keys == ["decoding.gamma", "decoding"]
    assert [point.runs[0].scenario.decoding.kind for point in found] == ["two_tower", "autoregressive"]
    assert found[0].runs[0].scenario.decoding.gamma == 0.5


RANGES = {
    "scheduler.max_num_seqs": {"low": 2, "high": 5, "integer": True},
    "workload.arrivals.rate_rps": {"low": 0.1, "high": 100, "log": True},
    "decoding.gamma": {"low": 0.5, "high": 0.9},
    "deployment.gpu": ["h100-sxm", "h200"],
}


def test_random_points_are_within_their_ranges_and_evenly_so(study):
    drawn = values_of(study(design={"kind": "random", "points": 800, "axes": RANGES}))
    seats, rates, gammas, gpus = (np.array([of[key] for of in drawn]) for key in RANGES)
    assert np.bincount(seats)[2:].min() > 150  # of four alike, 200 each
    assert (rates.min() >= 0.1, rates.max() <= 100) == (True, True)
    assert abs(np.log10(rates).mean() - 0.5) < 4 * 3 / 12**0.5 / 800**0.5
    assert abs(gammas.mean() - 0.7) < 4 * 0.4 / 12**0.5 / 800**0.5
    assert abs((gpus == "h200").mean() - 0.5) < 4 * 0.5 / 800**0.5
    assert abs(np.corrcoef(seats, gammas)[0, 1]) < 4 / 800**0.5


def test_more_points_and_more_axes_leave_random_points_as_they_were(study):
    design = {"kind": "random", "points": 5, "axes": {"decoding.gamma": RANGES["decoding.gamma"]}}
    few = values_of(study(design=design))
    more = values_of(study(design={"kind": "random", "points": 9, "axes": RANGES}))
    assert [of["decoding.gamma"] for of in more[:5]] == [of["decoding.gamma"] for of in few]
    assert values_of(study(design=design | {"seed": 1})) != few


def test_order_of_changes(study):
    """Scenario, then ``set``, then --set, then the point; a kind before what its section holds."""
    axes = {"decoding.gamma": [0.5, 0.6], "decoding.kind": ["block_diffusion"]}
    path = study(set={"seed": 4, "scheduler.max_num_seqs": 8}, design={"kind": "grid", "axes": axes})
    runs = [point.runs[0].scenario for point in load_study(path, ["seed=5"])[1]]
    assert [(of.decoding.kind, of.decoding.gamma, of.seed) for of in runs] == [
        ("block_diffusion", 0.5, 5),
        ("block_diffusion", 0.6, 5),
    ]
    assert runs[0].scheduler.max_num_seqs == 8


def test_naming_the_kind_that_it_is_keeps_the_section(study):
    path = study(design={"kind": "grid", "axes": {"decoding.kind": ["two_tower", "autoregressive"]}})
    assert load_study(path, [])[1][0].runs[0].scenario.decoding.gamma == 0.7


def test_files_are_found_from_the_study(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "studies").mkdir()
    (tmp_path / "base" / "scenario.yaml").write_text(SCENARIO)
    (tmp_path / "studies" / "trace.csv").write_text("arrival_s,input_tokens,output_tokens\n0,10,10\n1,10,10\n")
    path = tmp_path / "studies" / "study.yaml"
    columns = {"arrival": "arrival_s", "input_tokens": "input_tokens", "output_tokens": "output_tokens"}
    plain = {
        "scenario": "../base/scenario.yaml",
        "set": {"workload": {"kind": "trace", "columns": columns}, "workload.path": "trace.csv"},
        "design": GRID,
        "metrics": ["counts.completed"],
    }
    path.write_text(yaml.safe_dump(plain))
    sweep(path)
    assert {row["counts.completed"] for row in rows_of(path)} == {"2"}


BAD = [
    ({"design": None}, "design: is missing"),
    ({"scenario": "no.yaml"}, "study.yaml:1: scenario: "),
    ({"replications": 0}, "study.yaml:13: replications: found 0"),
    ({"replication": 2}, "replication: unknown key (did you mean replications?)"),
    ({"metrics": []}, "metrics: found []"),
    ({"metrics": ["cost.usd", "cost.usd"]}, "metrics: cost.usd stands twice"),
    ({"metrics": ["request_latncy.p90"]}, "unknown metric (did you mean request_latency?)"),
    ({"metrics": ["request_latency.p91"]}, "request_latency has avg, min, max, p99, p90, p75, p50, std"),
    ({"metrics": ["cost.usd_per_milion_output_tokens"]}, "(did you mean cost.usd_per_million_output_tokens?)"),
    ({"metrics": ["quality.0.9.retained"]}, "quality.0.9.retained: no run has it (did you mean quality.0."),
    ({"design": {"kind": "gird", "axes": {}}}, "design.kind: found 'gird'; allowed: grid, list, random (did you mean grid?)"),
    ({"design": {"kind": "grid", "axes": {}}}, "design.axes: found {}"),
    ({"design": {"kind": "grid", "axes": {"seed": []}}}, "design.axes.seed: found []"),
    ({"design": {"kind": "grid", "axes": {"se ed": [1]}}}, "design.axes.se ed"),
    ({"design": {"kind": "list", "points": []}}, "design.points: found []"),
    ({"design": {"kind": "random", "points": 2, "axes": {"seed": {"low": 2, "high": 1}}}}, "low is 2 and high 1"),
    ({"design": {"kind": "random", "points": 2, "axes": {"seed": {"low": 0, "high": 1, "log": True}}}}, "expected more than 0 with log"),
    ({"design": {"kind": "random", "points": 2, "axes": {"seed": {"low": 0.5, "high": 1, "integer": True}}}}, "whole low and high"),
    ({"replications": 10_000, "design": GRID | {"axes": {"seed": list(range(11))}}}, "110,000 runs, 11 points; at most 100,000"),
    ({"set": {"decoding.gamma": 0.5}}, "set.decoding.gamma: has no effect: the design varies it"),
    ({"set": {"decoding.gama": 0.5}}, "study.yaml:"),
    ({"design": {"kind": "grid", "axes": {"decoding.gama": [0.5, 0.6]}}}, "decoding.gama: unknown key (did you mean gamma?)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_bad_studies_are_explained(study, changes, said):
    path = study(**changes)
    found = sweep(path, code=2)
    assert said in found
    assert str(path) in found
    assert not (path.parent / "out").exists()


def test_options_that_do_nothing_are_said(study):
    said = sweep(study(), "--set", "decoding.gamma=0.5", code=2)
    assert "--set decoding.gamma: has no effect: the design" in said
    for more, expected in (
        (["--backend", "slurm"], "--backend: found 'slurm'; allowed: loky, dask, ray"),
        (["--backend", "dask"], "--backend dask: needs --scheduler ADDRESS"),
        (["--scheduler", "tcp://x:1"], "--scheduler: has no effect"),
        (["--backend", "ray"], "--jobs: has no effect with --backend ray"),
    ):
        assert expected in sweep(study(), *more, code=2)


def test_what_a_cluster_lacks_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match="--backend ray needs ray: pip install ray"):
        list(Workers(backend="ray").map(abs, [1]))
    with pytest.raises(InputError, match=r"needs distributed: pip install 'twotower-sim\[cluster\]'"):
        list(Workers(backend="dask", scheduler="tcp://127.0.0.1:9").map(abs, [1]))


class ReadyRay:
    """As much of Ray as the work needs, in this process: the newest of what waits is done first."""

    class exceptions:  # noqa: N801
        RayError = ArithmeticError

    def __init__(self):
        self.running = False

    def init(self, address, **_):
        self.running = address == "here"
        if not self.running:
            raise ConnectionError("nobody is there")

    def remote(self, function):
        return type("Remote", (), {"remote": staticmethod(lambda item: (function, item))})

    def cluster_resources(self):
        return {"CPU": 2.0}

    def wait(self, waiting):
        return waiting[-1:], waiting[:-1]

    def get(self, done):
        return [function(item) for function, item in done]

    def shutdown(self):
        self.running = False


def test_ray_does_all_of_it(monkeypatch):
    ray = ReadyRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    items = list(range(300))
    assert sorted(Workers(backend="ray", scheduler="here").map(str, items)) == sorted(map(str, items))
    assert not ray.running
    with pytest.raises(InputError, match="--scheduler there: cannot be reached: nobody is there"):
        list(Workers(backend="ray", scheduler="there").map(str, items))
    for nobody in ("127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:99999"):
        with pytest.raises(InputError, match=f"--scheduler {nobody}: cannot be reached: (?!nobody)"):
            list(Workers(backend="ray", scheduler=nobody).map(str, items))


# ---------------------------------------------------------------------- figures


def test_points_differ_by_what_was_changed_alone(study):
    """Common random numbers: the same requests at every point, others in every replication."""
    path = study(
        replications=3, metrics=["input_sequence_length", "metrics.output_sequence_length.max", "nfe_per_block"]
    )
    sweep(path)
    rows = rows_of(path)
    assert [(row["point"], row["replication"], row["seed"]) for row in rows] == [
        (str(point), str(i + 1), str(i)) for point in range(1, 5) for i in range(3)
    ]
    for seed in "012":
        same = [row for row in rows if row["seed"] == seed]
        assert len({row["input_sequence_length"] for row in same}) == 1
        assert len({row["nfe_per_block"] for row in same}) == 2  # one for each gamma, whatever the batch
    assert len({row["input_sequence_length"] for row in rows}) == 3


def test_a_sweep_gives_the_figures_of_its_runs(study, tmp_path):
    metrics = ["request_latency.p90", "cost.usd", "goodput", "quality.0.8.retained"]
    path = study(replications=2, metrics=metrics)
    said = sweep(path)
    assert "sweep | study" in said
    done = CliRunner().invoke(app, [
        "run", str(tmp_path / "scenario.yaml"), "--out", str(tmp_path / "one"), "--quiet", "--set", "seed=1",
        "--set", "scheduler.max_num_seqs=64", "--set", "decoding.gamma=0.8",
    ])  # fmt: skip
    assert done.exit_code == 0
    one = json.loads((tmp_path / "one" / "summary.json").read_text())
    row = rows_of(path)[-1]
    assert float(row["request_latency.p90"]) == one["metrics"]["request_latency"]["p90"]
    assert float(row["cost.usd"]) == one["cost"]["usd"]
    assert (row["goodput"], row["quality.0.8.retained"]) == ("", "0.987")
    report = json.loads((tmp_path / "out" / "study" / "sweep.json").read_text())
    last = report["points"][-1]
    both = [float(of["request_latency.p90"]) for of in rows_of(path)[-2:]]
    assert last["values"] == {"scheduler.max_num_seqs": 64, "decoding.gamma": 0.8}
    assert last["metrics"]["request_latency.p90"]["mean"] == pytest.approx(np.mean(both))
    assert last["metrics"]["goodput"] is None
    assert report["points"][0]["metrics"]["quality.0.8.retained"] is None  # a point with gamma 0.6
    assert {of["part"] for of in report["provenance"]} == set(one["provenance"])
    assert report["failed"] == []
    found = {(of["point"], of["metric"]): of for of in rows_of(path, "summary.csv")}
    assert float(found["4", "request_latency.p90"]["high"]) == last["metrics"]["request_latency.p90"]["high"]
    assert found["4", "goodput"]["n"] == "0"


def test_short_names_mean_what_stands_in_the_summary():
    figures = figures_of(json.loads(json.dumps({
        "metrics": {"goodput": {"unit": "r", "avg": 2.0, "p50": None}}, "counts": {"arrived": 3}, "blocks": {},
        "utilisation": {"busy": 0.5}, "memory": {}, "cost": {}, "quality": {"0.8": {"retained": 0.9}}, "classes": {},
        "saturation": {"verdict": "STABLE", "limit": None},
    })))  # fmt: skip
    for name, value in {
        "goodput": 2.0,
        "goodput.avg": 2.0,
        "metrics.goodput": 2.0,
        "goodput.p50": None,
        "counts.arrived": 3,
        "quality.0.8.retained": 0.9,
    }.items():
        assert figure(figures, name) == value


def test_intervals_cover_what_they_should():
    """95 % of intervals over normal draws hold the mean, however few the draws; published t for four is 3.182."""
    draws = np.random.default_rng(1)
    for n in (2, 4, 10):
        covered = 0
        for values in draws.normal(3.0, 2.0, (2000, n)):
            of = estimate(values.tolist())
            covered += of.low <= 3.0 <= of.high
        assert abs(covered / 2000 - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5
    of = estimate([1.0, 2.0, 3.0, 4.0])
    assert (of.n, of.mean) == (4, 2.5)
    assert of.half == pytest.approx(3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=1e-6)
    assert estimate([1.0]) == (1, 1.0, None, None)


def test_points_that_fall_behind_are_marked(study):
    axes = {"workload.arrivals.rate_rps": [5, 500]}
    path = study(
        set={"workload.requests": 1000, "scheduler.max_num_seqs": 4},
        design={"kind": "grid", "axes": axes},
        replications=2,
    )
    said = sweep(path)
    assert [row["saturation"] for row in rows_of(path)] == ["STABLE", "STABLE", "OVERLOADED", "OVERLOADED"]
    assert "Unstable    point 2: OVERLOADED in 2 of 2 runs" in said
    assert "Answer      Only point 1 (rate_rps 5) of 2 bears its load" in said
    assert "Unstable    point 1" not in said
    report = json.loads((path.parent / "out" / "study" / "sweep.json").read_text())
    assert [(of["point"], of["saturation"]) for of in report["unstable"]] == [(2, "OVERLOADED")] * 2


# ---------------------------------------------------------------------- failures


def test_a_point_that_cannot_run_leaves_the_others(study):
    axes = {"scheduler.max_num_seqs": [4, 1024], "deployment.gpu": ["h100-sxm", "h300"]}
    path = study(design={"kind": "grid", "axes": axes}, set={"scheduler.max_num_batched_tokens": 2048})
    said = sweep(path)
    rows = rows_of(path)
    assert [bool(row["request_latency.p90"]) for row in rows] == [True, False, False, False]
    assert "gpu 'h300' is neither a preset" in rows[1]["error"]
    assert "1024 sequences (max_num_seqs) of 16 tokens a round need 16384" in rows[2]["error"]
    assert "Failed      point 2: gpu 'h300'" in said
    report = json.loads((path.parent / "out" / "study" / "sweep.json").read_text())
    assert [of["point"] for of in report["failed"]] == [2, 3, 4]
    assert str(path.parent) not in "".join(row["error"] for row in rows[:2])


def test_where_no_point_can_run_nothing_is_written(study):
    path = study(design={"kind": "grid", "axes": {"deployment.gpu": ["h300", "h301"]}})
    said = sweep(path, code=2)
    assert "gpu 'h300'" in said
    assert "gpu 'h301'" in said
    assert not (path.parent / "out").exists()


# ---------------------------------------------------------------------- the cache


def test_nothing_is_simulated_twice(study, simulated):
    path = study()
    sweep(path)
    assert len(simulated) == 4
    first = bytes_of(path)
    sweep(path)
    assert len(simulated) == 4
    assert bytes_of(path) == first
    more = {"kind": "grid", "axes": GRID["axes"] | {"decoding.gamma": [0.6, 0.7, 0.8]}}
    sweep(study(design=more, replications=2, metrics=["cost.usd"]))
    assert len(simulated) == 12
    sweep(path, "--no-cache")
    assert len(simulated) == 24


def test_equal_points_are_simulated_once(study, simulated):
    path = study(design={"kind": "list", "points": [{"seed": 3}, {"seed": 4}, {"seed": 3}]}, replications=2)
    sweep(path)
    assert sorted(of.seed for of in simulated) == [3, 4, 5]
    assert [row["seed"] for row in rows_of(path)] == ["3", "4", "4", "5", "3", "4"]


def files_of(path):
    return sorted((path.parent / "cache").rglob("*.gz"))


def test_an_interrupted_sweep_goes_on(study, simulated, monkeypatch):
    path = study()
    outcome = Experiment.outcome

    def interrupted(experiment):
        if len(simulated) == 2:
            raise KeyboardInterrupt
        return outcome(experiment)

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "outcome", interrupted)
        assert "the same command goes on from there" in sweep(path, code=130)
    assert len(files_of(path)) == 2
    assert not (path.parent / "out").exists()
    sweep(path)
    assert len(simulated) == 4
    resumed = bytes_of(path)
    sweep(path, "--no-cache")
    assert bytes_of(path) == resumed


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:-9], lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:],
    lambda raw: gzip.compress(b"{}"), lambda raw: gzip.compress(b"[1]"), lambda raw: gzip.compress(b'{"key": "other", "result": {}}'),
])  # fmt: skip
def test_damaged_entries_are_computed_anew(study, simulated, damage):
    path = study()
    sweep(path)
    first = bytes_of(path)
    file = files_of(path)[1]
    good = file.read_bytes()
    file.write_bytes(damage(good))
    sweep(path)
    assert len(simulated) == 5
    assert bytes_of(path) == first
    assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_said(study):
    path = study()
    (path.parent / "cache").write_text("")
    assert "cannot be written: " in sweep(path, code=2)


def test_many_may_write_one_entry(tmp_path):
    cache, result = ResultCache(tmp_path), {"a": list(range(5000))}

    def work(i):
        cache.put("ab12", result)
        return cache.get("ab12")

    with ThreadPoolExecutor(8) as threads:
        assert all(found == result for found in threads.map(work, range(64)))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ab12.json.gz"]
    assert cache.get("ab13") is None


def test_a_key_is_of_all_that_a_run_follows_from(tmp_path, monkeypatch):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,10,20\n2023-11-16 18:17:04.9799600,10,20\n"
    )
    gpu = tmp_path / "gpu.yaml"
    gpu.write_text((ROOT / "twotower_sim" / "presets" / "gpus" / "h200.yaml").read_text())

    def key(base=tmp_path, **changes):
        plain = {"workload": {"kind": "trace", "path": "trace.csv"}, "deployment": {"gpu": "gpu.yaml"}} | changes
        return Experiment(Scenario.model_validate(plain), base).key()

    known = {key()}
    assert key(name="other") == key()
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (trace, gpu):
        (moved / file.name).write_bytes(file.read_bytes())
    assert key(moved) == key()

    def is_new(found):
        assert found not in known
        known.add(found)

    is_new(key(seed=1))
    is_new(key(scheduler={"max_num_seqs": 3}))
    for file in (trace, gpu):
        file.write_text(file.read_text().replace("20\n", "21\n", 1) + "\n# changed\n" * (file is gpu))
        is_new(key())
    monkeypatch.setattr(experiments, "_program", lambda: "a later version")
    is_new(key())


def test_a_file_that_is_read_once_only_is_no_trace_of_a_sweep(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    scenario = Scenario.model_validate({"workload": {"kind": "trace", "path": "pipe"}})
    [(_, outcome)] = run_all([Experiment(scenario, tmp_path)], ResultCache(None), Workers(1))
    assert "pipe: is no regular file" in outcome.error


def test_results_of_another_program_are_none(tmp_path):
    """A worker that runs other sources, or sees other files, must not fill the cache."""
    (tmp_path / "scenario.yaml").write_text(SCENARIO)
    scenario = load_scenario(tmp_path / "scenario.yaml")
    _, outcome = experiments._attempt(("a key from elsewhere", Experiment(scenario, tmp_path)))
    assert "runs another version" in outcome.error


def test_outcomes_are_summaries(tmp_path):
    (tmp_path / "scenario.yaml").write_text(SCENARIO)
    scenario = load_scenario(tmp_path / "scenario.yaml")
    found = Experiment(scenario, tmp_path).outcome()
    assert found["counts"]["completed"] == 60
    assert found == json.loads(json.dumps(found))
    assert found["name"] == ""
    run = simulate(prepare(scenario, tmp_path))
    whole = summary(run, evaluate(run))
    assert found["metrics"] == whole["metrics"]
    assert set(found) == set(whole)


# ---------------------------------------------------------------------- elsewhere


def command(path, *arguments):
    where = ["--out", str(path.parent / "out" / path.stem), "--cache", str(path.parent / "cache")]
    return [sys.executable, "-m", "twotower_sim", "sweep", str(path), *where, *map(str, arguments)]


def slow(study, name="slow", points=10):
    """Runs of a few tenths of a second each."""
    axes = {"workload.arrivals.rate_rps": [18 + 0.1 * i for i in range(points)]}
    return study(
        name,
        set={"workload.requests": 4000},
        design={"kind": "grid", "axes": axes},
        metrics=["request_latency.p90", "goodput"],
    )


def wait_for(condition, process=None):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.02)


def test_processes_give_the_same_bytes(study):
    path = study(replications=2)
    sweep(path, "--no-cache")
    serial = bytes_of(path)
    done = subprocess.run(command(path, "--jobs", 2), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert bytes_of(path) == serial
    assert len(files_of(path)) == 8


def test_progress_on_a_terminal(study):
    path = study()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, command(path, "--jobs", 1), os.environ | {"COLUMNS": "120", "TERM": "xterm"})
    shown = b""
    with suppress(OSError):  # that is how a terminal ends
        while part := os.read(terminal, 1 << 16):
            shown += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown.decode()
    assert "4 of 4" in shown.decode()
    assert "Traceback" not in shown.decode()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_stopped_goes_on(study, blow):
    """It repeats at most what was in flight, leaves no process behind and ends with the bytes of one that was not."""
    path = slow(study)
    process = subprocess.Popen(
        command(path, "--jobs", 2),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: len(files_of(path)) >= 2, process)
    if blow == signal.SIGKILL:
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    else:
        os.killpg(process.pid, blow)
        stderr = process.communicate(timeout=60)[1]
        assert (process.returncode, "Interrupted; what was computed is in" in stderr) == (130, True)
        assert "Traceback" not in stderr
    wait_for(lambda: not alive(process.pid))
    kept = len(files_of(path))
    assert 2 <= kept < 10
    assert not (path.parent / "out" / path.stem / "sweep.json").exists()
    done = subprocess.run(command(path, "--jobs", 2, "--quiet"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((path.parent / "out" / path.stem / "run.json").read_text())["simulated"] == 10 - kept
    resumed = bytes_of(path)
    sweep(path, "--no-cache")
    assert bytes_of(path) == resumed


def alive(session: int) -> list[str]:
    """Processes of a session that are no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


@pytest.fixture
def cluster(tmp_path):
    """(address, workers) of a Dask scheduler with two worker processes on loopback."""
    pytest.importorskip("distributed", reason="distributed is not installed: pip install 'twotower-sim[cluster]'")
    log, file = (tmp_path / "cluster.log").open("w"), tmp_path / "scheduler.json"

    def start(role, *arguments):
        line = [sys.executable, "-m", f"distributed.cli.dask_{role}", "--no-dashboard", *map(str, arguments)]
        return subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log)

    scheduler = start("scheduler", "--host", "127.0.0.1", "--port", 0, "--scheduler-file", file)
    wait_for(lambda: file.exists() and file.read_text().endswith("}"), scheduler)
    address = json.loads(file.read_text())["address"]
    own = ["--nthreads", 1, "--no-nanny", "--local-directory", tmp_path / "dask"]
    workers = [start("worker", address, *own) for _ in range(2)]
    try:
        import distributed

        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=120)
        yield address, workers
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()
        log.close()


def test_a_cluster_gives_the_same_bytes_even_if_a_worker_dies(study, cluster):
    address, workers = cluster
    path = slow(study)
    sweep(path, "--no-cache")
    serial = bytes_of(path)
    process = subprocess.Popen(
        command(path, "--backend", "dask", "--scheduler", address, "--quiet"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(files_of(path)) >= 2, process)
    workers[0].kill()
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
    assert json.loads((path.parent / "out" / path.stem / "run.json").read_text())["simulated"] == 10
    assert workers[1].poll() is None
    assert bytes_of(path) == serial


def test_a_cluster_that_is_not_there_is_said(monkeypatch):
    pytest.importorskip("distributed", reason="distributed is not installed: pip install 'twotower-sim[cluster]'")
    monkeypatch.setattr("twotower_sim.workers.CONNECT_S", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense://x", "no address"):
        with pytest.raises(InputError, match=f"--scheduler {address}: cannot be reached: "):
            list(Workers(backend="dask", scheduler=address).map(abs, [1]))


def test_the_example():
    """As the README has it, with fewer requests."""
    path = ROOT / "scenarios" / "studies" / "batch_and_gamma.yaml"
    loaded, points = load_study(path, ["workload.requests=20"])
    assert (loaded.replications, len(points)) == (4, 4)
    runs = [run for point in points for run in point.runs]
    found = dict(run_all(runs, ResultCache(None), Workers(1)))
    assert not any(outcome.error for outcome in found.values())
    assert all(figure(figures_of(of.summary), name) is not None for of in found.values() for name in loaded.metrics)
