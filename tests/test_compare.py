"""Comparisons of scenarios on the same draws."""

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_sweep import SCENARIO
from typer.testing import CliRunner

from twotower_sim.cli import app
from twotower_sim.errors import InputError
from twotower_sim.interval import estimate, ratio_interval


@pytest.fixture
def compare(tmp_path):
    """Writes scenarios by name, compares them on one core; gives what was printed, and compare.json."""

    def run(*scenarios, options=(), code=0):
        paths = []
        for name, text in scenarios:
            paths.append(tmp_path / f"{name}.yaml")
            paths[-1].write_text(text)
        where = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--jobs", "1"]
        done = CliRunner().invoke(app, ["compare", *map(str, paths), *where, *options])
        if isinstance(done.exception, InputError):
            assert code == 2
            assert not (tmp_path / "out").exists()
            return str(done.exception)
        assert done.exit_code == code, done.output
        return done.output, json.loads((tmp_path / "out" / "compare.json").read_text())

    return run


PLAIN, LOW = ("plain", SCENARIO), ("low", SCENARIO.replace("0.7", "0.5") + "seed: 9\n")
P90 = "request_latency.p90"


def of(report, metric=P90):
    return [side["metrics"][metric] for side in report["scenarios"]]


def test_differences_are_paired(compare, tmp_path):
    said, report = compare(PLAIN, LOW, options=["--replications", "6", "--metric", P90, "--metric", "cost.usd"])
    values = []
    for name in ("plain", "low"):
        for seed in range(6):
            out = tmp_path / f"{name}-{seed}"
            arguments = ["run", str(tmp_path / f"{name}.yaml"), "--out", str(out), "--set", f"seed={seed}", "--quiet"]
            assert CliRunner().invoke(app, arguments).exit_code == 0
            values.append(json.loads((out / "summary.json").read_text())["metrics"]["request_latency"]["p90"])
    plain, low = np.reshape(values, (2, 6))
    first, second = of(report)
    assert report["seeds"] == list(range(6))
    assert first["of"]["mean"] == pytest.approx(plain.mean())
    assert "difference" not in first
    difference = low - plain
    half = 2.570582 * difference.std(ddof=1) / 6**0.5  # published t for five degrees of freedom
    assert second["difference"]["mean"] == pytest.approx(difference.mean())
    assert second["difference"]["low"] == pytest.approx(difference.mean() - half)
    assert second["difference"]["high"] == pytest.approx(difference.mean() + half)
    assert second["ratio"] == pytest.approx(low.mean() / plain.mean())
    assert second["interval_contains_0"] is False
    assert half < 2.228 * (plain.var(ddof=1) / 6 + low.var(ddof=1) / 6) ** 0.5 / 2  # what pairs are for
    assert "request latency p90" in said


def test_a_scenario_does_not_differ_from_itself(compare):
    said, report = compare(PLAIN, PLAIN)
    assert [side["name"] for side in report["scenarios"]] == ["plain", "plain-2"]
    again = of(report, "request_latency.p50")[1]
    assert (again["difference"]["mean"], again["ratio"], again["interval_contains_0"]) == (0, 1, True)
    assert "(0 ± 0)" in said


def test_one_replication_has_no_interval(compare):
    said, report = compare(PLAIN, LOW, options=["--replications", "1"])
    assert "One replication: no intervals" in said
    assert of(report, "request_latency.p50")[1]["interval_contains_0"] is None
    assert of(report, "request_latency.p50")[1]["difference"]["low"] is None


def test_figures_that_one_side_lacks_are_left_out(compare):
    name = "quality.0.5.nfe_per_block"
    _, report = compare(PLAIN, LOW, options=["--replications", "2", "--metric", name])
    first, second = of(report, name)
    assert first is None
    assert second["of"]["n"] == 2
    assert "difference" not in second


def test_other_workloads_are_said(compare):
    said, _ = compare(PLAIN, ("more", SCENARIO.replace("60", "61")), options=["--replications", "2"])
    assert "more: the workload is another than that of plain" in said


def test_a_side_that_falls_behind_is_said(compare):
    more = ["--set", "workload.requests=1000", "--set", "workload.arrivals.rate_rps=4", "--replications", "2"]
    said, _ = compare(PLAIN, ("narrow", SCENARIO + "scheduler: {max_num_seqs: 1}\n"), options=more)
    assert "narrow: OVERLOADED in 2 of 2 runs" in said
    assert "plain: OVERLOADED" not in said


@pytest.mark.parametrize("faster", [False, True])
def test_the_answer_counts_metrics_that_are_better(faster, compare):
    wide, narrow = (
        ("wide", SCENARIO),
        ("narrow", SCENARIO + "scheduler: {max_num_seqs: 2}\nslo: {request_latency_ms: 3000}\n"),
    )
    options = ["--replications", "4", "--metric", P90, "--metric", "goodput", "--metric", "request_throughput"]
    said, report = compare(*[narrow, wide][:: 1 if faster else -1], options=[*options, "--metric", "counts.arrived"])
    verdicts = {
        name: side["verdict"] for name, side in report["scenarios"][1]["metrics"].items() if side and "verdict" in side
    }
    assert f"Answer      {report['answer']}" in said
    assert verdicts[P90] == ("better" if faster else "worse")
    assert verdicts["counts.arrived"] is None


@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.floats(-100, 100)), min_size=2, max_size=8),
)
def test_an_interval_of_a_ratio_says_what_that_of_the_difference_says(pairs):
    base, values = zip(*pairs, strict=True)
    difference, found = estimate([y - x for x, y in pairs]), ratio_interval(base, values)
    assume(abs(abs(difference.mean) - difference.half) > 1e-6)
    if found is None:
        of = estimate(base)
        assert of.low <= 1e-6
    else:
        low, high = found
        assume(high - low < 1e4)
        assert (low <= 1 <= high) == (difference.low <= 0 <= difference.high)
        for factor in (low, high):  # there the difference is just told apart from 0
            at = estimate([y - factor * x for x, y in pairs])
            assert abs(at.mean) == pytest.approx(at.half, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("scenarios", "options", "expected"),
    [
        ([PLAIN], [], "compare: found one scenario; expected two or more"),
        ([PLAIN, LOW], ["--metric", "goodputs"], "goodputs: unknown metric (did you mean goodput?)"),
        ([PLAIN, LOW], ["--metric", "counts.complete"], "no run has it (did you mean counts.completed?)"),
        ([PLAIN, ("wrong", "model: gpt\n" + SCENARIO)], [], "wrong.yaml: model 'gpt' is neither a preset"),
        ([PLAIN, ("wrong", "modell: gpt\n" + SCENARIO)], [], "wrong.yaml:1: modell: unknown key"),
        ([PLAIN, LOW], ["--set", "seed"], "--set seed: expected section.key=value"),
    ],
)
def test_bad_comparisons_are_explained(compare, scenarios, options, expected):
    assert expected in compare(*scenarios, options=options, code=2)
