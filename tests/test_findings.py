"""What a sweep found, from figures written by hand."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower_sim.findings import Findings
from twotower_sim.front import front
from twotower_sim.study import Point, Study
from twotower_sim.sweep import Replication, Sweep

COST, LATENCY = "cost.usd_per_million_output_tokens", "request_latency.p90"


def found(*points, metrics=(LATENCY, COST), verdicts=None):
    """Of points whose replications have figures in the order of ``metrics``."""
    study = {"scenario": "s.yaml", "design": {"kind": "list", "points": [{"seed": i} for i in range(len(points))]}}
    of = Study.model_validate(study | {"metrics": list(metrics)})
    rows = [
        [
            Replication(seed, dict(zip(metrics, figures, strict=True)), {}, [], "", (verdicts or {}).get(i, "STABLE"))
            for seed, figures in enumerate(replications)
        ]
        for i, replications in enumerate(points)
    ]
    return Findings(Sweep(of, [Point(i + 1, {"seed": i}, []) for i in range(len(points))], rows, 0))


def test_the_answer_is_the_cheapest_point_that_bears_its_load():
    cheap, dear, overloaded = [(50, 2), (52, 3)], [(20, 9), (21, 10)], [(900, 1), (950, 1)]
    of = found(cheap, dear, overloaded, verdicts={2: "OVERLOADED"})
    assert of.sentence == (
        "2 of 3 points bear their load; of these point 1 (seed 0) has the least $ per million output tokens, 2.5 ± 6.4."
    )
    assert [(best.metric, best.point) for best in of.bests] == [(LATENCY, 1), (COST, 0)]
    assert of.fronts == [{"paid": COST, "felt": LATENCY, "points": [1, 2]}]
    assert of.shown.number == 1


def test_without_costs_it_is_the_best_by_the_first_metric():
    of = found([(5, 7)], [(5, 8)], metrics=("counts.preemptions", "goodput"))
    assert of.named.metric == "goodput"
    assert of.sentence.endswith("point 2 (seed 1) has the most Goodput (requests/s), 8.")
    neither = found([(5,)], [(6,)], metrics=("counts.preemptions",))
    assert (neither.sentence, neither.shown.number) == ("2 of 2 points bear their load.", 1)


def test_pairs_of_replications_tell_points_apart():
    """Seeds differ by much, points by little but always: what an interval of each mean would not show."""
    steady = found([(1, 10), (1, 20), (1, 30)], [(1, 10.2), (1, 20.2), (1, 30.3)])
    assert steady.named.alike == []
    wavering = found([(1, 10), (1, 20), (1, 30)], [(1, 10.2), (1, 19.9), (1, 30.3)])
    assert wavering.named.alike == [1]
    assert wavering.sentence.endswith("; 1 other is not told apart from it.")
    once = found([(1, 10)], [(1, 11)], [(1, 10)])
    assert once.named.alike == [2]


@pytest.mark.parametrize(("verdict", "said"), [
    ("STABLE", "2 of 2 points bear their load"), ("BACKLOGGED", "Only point 2 (seed 1) of 2 bears its load."),
])  # fmt: skip
def test_one_replication_that_is_not_stable_is_enough(verdict, said):
    of = found([(1, 1), (1, 1)], [(2, 2), (2, 2)], verdicts={0: verdict})
    assert of.sentence.startswith(said)


def test_nothing_bears_its_load():
    of = found([(1, 1)], [(2, 2)], verdicts={0: "OVERLOADED", 1: "BACKLOGGED"})
    assert of.sentence == "None of 2 points bears its load."
    assert (of.shown.number, of.bests, of.fronts[0]["points"]) == (1, [], [])


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), max_size=30))
def test_a_front_is_what_nothing_beats(keys):
    beaten = {
        i for i, j in product(range(len(keys)), repeat=2)
        if keys[i] != keys[j] and all(y <= x for x, y in zip(keys[i], keys[j], strict=True))
    }  # fmt: skip
    assert sorted(front(keys)) == [i for i in range(len(keys)) if i not in beaten]
