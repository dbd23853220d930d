"""What charts of pages show, against the JSON that they are views of."""

import json
from pathlib import Path

import numpy as np
import pytest
from pages import write

from twotower_sim.charts import SHOWN, distribution
from twotower_sim.figures import is_felt
from twotower_sim.tables import heading


def charts(page: Path) -> list[dict]:
    (line,) = (line for line in page.read_text().splitlines() if line.startswith("const specs = "))
    return json.loads(line.removeprefix("const specs = ").removesuffix(";"))


def about(page: Path, start: str) -> list[dict]:
    """Rows of all layers of the charts whose description starts so."""
    found = [spec for spec in charts(page) if spec["description"].startswith(start)]
    assert found
    return [rows(spec) for spec in found]


def rows(spec: dict) -> list[dict]:
    datasets = [of["data"]["values"] for of in (spec, *spec.get("layer", [])) if "data" in of]
    return [row for values in datasets for row in values]


def test_metrics_of_a_sweep_leave_out_what_depends_on_the_length_of_a_run(tmp_path):
    page, sweep = write("sweep", "grid", tmp_path)
    assert {of["stable"] for of in sweep["points"]} == {True, False}
    for metric in sweep["study"]["metrics"]:
        (shown,) = about(page, f"{heading(metric)} by scheduler.max_num_seqs")
        there = [of["metrics"][metric] for of in sweep["points"] if of["stable"] or not is_felt(metric)]
        told = {(row["mean"], row["low"], row["high"]) for row in shown}
        assert told == {(of["mean"], of["low"], of["high"]) for of in there}


def test_fronts_of_a_sweep_are_filled(tmp_path):
    page, sweep = write("sweep", "grid", tmp_path)
    for front in sweep["fronts"]:
        paid, felt = heading(front["paid"]), heading(front["felt"])
        (shown,) = about(page, f"{felt} against {paid}: ")
        points = {of["point"]: of for of in sweep["points"] if of["stable"]}
        for filled, numbers in ((True, {*front["points"]}), (False, points.keys() - {*front["points"]})):
            of = {(row["x"], row["y"]) for row in shown if "x" in row and row["filled"] == filled}
            assert of == {
                tuple(points[n]["metrics"][front[axis]]["mean"] for axis in ("paid", "felt")) for n in numbers
            }


@pytest.mark.parametrize("name", ["met", "missed"])
def test_trials_of_a_plan_stand_at_their_cost_and_the_worst_share_of_their_bounds(name, tmp_path):
    page, plan = write("plan", name, tmp_path)
    (shown,) = about(page, "All trials")
    stable = [of for of in plan["trials"] if {*of["saturation"]} == {"STABLE"}]
    assert 0 < len(stable) < len(plan["trials"])
    expected = set()
    for of in stable:
        latency = of["objectives"]["request_latency.p90"]
        ends = [(latency["high"] or latency["mean"]) / plan["plan"]["objectives"]["request_latency.p90"]]
        if "good_request_fraction" in of["objectives"]:
            ends.append(0.9 / of["objectives"]["good_request_fraction"]["low"])
        assert of["meets"] == (max(ends) <= 1)
        expected.add((of["usd_per_hour"], round(max(ends), 9), of["meets"]))
    assert {(row["x"], round(row["y"], 9), row["filled"]) for row in shown if "filled" in row} == expected
    assert [row["y"] for row in shown if "filled" not in row] == [1.0]  # the bound


def test_ratios_of_a_comparison_are_those_of_what_can_be_compared(tmp_path):
    page, compared = write("compare", "one that falls behind", tmp_path)
    for side in compared["scenarios"][1:]:
        (shown,) = about(page, f"{side['name']} to {compared['scenarios'][0]['name']}: ratios")
        told = {(row["ratio"], row["low"], row["high"], row["kind"]) for row in shown if "ratio" in row}
        there = [of for of in side["metrics"].values() if of and of["comparable"] and of["ratio"] is not None]
        assert told == {(of["ratio"], *of["ratio_interval"], of["verdict"]) for of in there}
        assert (len(there) == len(side["metrics"])) == (side["saturation"] == ["STABLE"] * 3)


def test_curves_of_a_comparison_are_named(tmp_path):
    page, compared = write("compare", "two towers and one", tmp_path)
    names = {side["name"] for side in compared["scenarios"]}
    curves = [{row["curve"] for row in rows(spec) if "curve" in row} for spec in charts(page)]
    assert sum(of == names for of in curves) == 3 + 5  # latencies, and levels over time
    assert not any(of for of in curves if of not in (names, set()))


def test_a_distribution_counts_what_is_0():
    samples = {"a": np.array([0.0, 0.0, 1.0, 2.0, 4.0]), "b": np.array([3.0]), "c": np.zeros(3)}
    chart = distribution("Wait", "ms", samples, [("objective", 10.0)])
    assert chart.note == "dashed: objective; some are 0"
    shown = {name: [row for row in rows(chart.spec) if row.get("curve") == name] for name in samples}
    assert [len(of) for of in shown.values()] == [len(SHOWN), len(SHOWN), 0]
    assert (shown["a"][0]["p"], shown["a"][0]["x"]) == (0.4, 1.0)
    assert (shown["a"][-1]["p"], shown["a"][-1]["x"]) == (1.0, 4.0)
    assert distribution("Wait", "ms", {"c": np.zeros(3)}) is None
