"""Combinations proposed where there are too many to try: seeded, better than chance, and never beyond what was asked."""

import json
import sys

import pytest
from conftest import AFFINE
from rich.console import Console

from twotower_sim.errors import InputError
from twotower_sim.plan_file import PlanFile
from twotower_sim.planner import Plan, Planner
from twotower_sim.proposals import Merits, Proposals, combinations, size
from twotower_sim.result_cache import ResultCache
from twotower_sim.study import Range
from twotower_sim.workers import Workers

SPACE = {"seats": list(range(40)), "share": Range(low=0.1, high=10, log=True), "kind": ["a", "b", {"c": 1}]}


def merits(values: dict) -> Merits:
    """The least cost, 1, at 29 seats of kind b, share 1; kind a cannot be, and few seats do not do."""
    cost = 1 + abs(values["seats"] - 29) / 10 + abs(values["share"] - 1)
    return Merits(cost, cost, 0.0, 5 - values["seats"])


def proposed(seed: int, generations: int = 8) -> list[dict]:
    proposals = Proposals(SPACE, seed)
    found = []
    for _ in range(generations):
        for proposal in proposals.ask(8):
            found.append(proposal.values)
            proposals.tell(proposal, None if proposal.values["kind"] == "a" else merits(proposal.values))
    return found


def test_the_same_seed_gives_the_same_proposals():
    assert proposed(3) == proposed(3)
    assert proposed(3) != proposed(4)


def test_they_are_in_the_space():
    for values in proposed(0):
        assert values.keys() == SPACE.keys()
        assert 0.1 <= values["share"] <= 10
        assert values["seats"] in SPACE["seats"]
        assert values["kind"] in SPACE["kind"]


def test_they_learn_from_what_came_of_those_before():
    """The second half is better than the first, and asks less often for what cannot be."""

    def fared(of: list[dict]) -> tuple[float, float]:
        possible = [merits(values).cost for values in of if values["kind"] != "a" and merits(values).excess <= 0]
        return sum(possible) / len(possible), len(possible) / len(of)

    halves = [(fared(found[:32]), fared(found[32:])) for found in map(proposed, range(4))]
    assert all(second < first for (first, _), (second, _) in halves)
    assert sum(late for _, (_, late) in halves) > 1.2 * sum(early for (_, early), _ in halves)


def test_sizes_of_spaces():
    assert size(SPACE) is None
    assert size({}) == 1
    small = {"a": [1, 2], "b": ["x", "y", "z"]}
    assert size(small) == 6
    assert combinations(small)[:2] == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}]
    assert combinations({}) == [{}]


def test_what_is_left_to_choose_on_each_gpu_in_each_way():
    choices = {
        "decoding": [{"kind": "two_tower", "gamma": 0.6}, {"kind": "two_tower"}, {"kind": "autoregressive"}],
        "scheduler.max_num_seqs": {"low": 4, "high": 64, "integer": True},
        "deployment.gpu": ["h100-sxm", "h200"],
    }
    asked = PlanFile.model_validate({"scenario": "", "objectives": {"goodput": 1}, "choices": choices})
    seats = Range(low=4, high=64, integer=True)
    two, one = choices["decoding"][:2], choices["decoding"][2:]
    assert [tuple(space.values()) for space in asked.spaces] == [
        (two, seats, ["h100-sxm"]),
        (one, seats, ["h100-sxm"]),
        (two, seats, ["h200"]),
        (one, seats, ["h200"]),
    ]


# ---------------------------------------------------------------------- in a plan

LENGTH = {"kind": "lognormal", "mean": 200, "cv": 0.5, "max": 800}
SCENARIO = {
    "workload": {"kind": "synthetic", "requests": 300, "arrivals": {"kind": "poisson", "rate_rps": 90},
                 "input_tokens": LENGTH, "output_tokens": LENGTH},
    "latency": AFFINE,
    "commits": {"kind": "constant", "tokens_per_step": 4},
}  # fmt: skip
PLAN = {
    "scenario": "scenario.yaml",
    "objectives": {"request_latency.p90": 2500, "time_to_first_token.p90": 400},
    "choices": {
        "decoding": [{"kind": "two_tower"}, {"kind": "autoregressive"}],
        "scheduler.max_num_seqs": [4, 8, 16, 32, 64],
        "scheduler.max_num_batched_tokens": [512, 2048, 8192],
        "deployment.placement": [
            {"kind": "split"},
            *({"kind": "pools", "context": m, "denoiser": n} for m in (1, 2) for n in (1, 2, 3)),
        ],
    },
    "replications": 1,
    "margin": False,
}
COMBINATIONS = 5 * 3 * 7


def solved(folder, **asked) -> Plan:
    (folder / "scenario.yaml").write_text(json.dumps(SCENARIO))
    path = folder / "plan.yaml"
    path.write_text(json.dumps(PLAN | asked))
    return Planner(path, [], ResultCache(folder / "cache"), Workers(1), Console(quiet=True)).solve()


def names(plan: Plan) -> set[str]:
    """Of all candidates, those that cannot be included."""
    return {row[0] for row in plan.candidates.rows}


def test_a_few_proposals_find_what_trying_all_finds(tmp_path):
    every = solved(tmp_path, search={"candidates": COMBINATIONS})
    assert len(names(every)) == COMBINATIONS + 5 * 3
    for seed in (0, 1):
        few = solved(tmp_path, search={"candidates": 32, "seed": seed})
        assert len(names(few)) <= 32 + 5 * 3  # without the towers there is no placement: all are tried
        assert few.shown.meets
        assert few.shown.cost == every.shown.cost
        assert len(few.answer.trials) < len(every.answer.trials)
        again = solved(tmp_path, search={"candidates": 32, "seed": seed})
        assert again.trials == few.trials
        assert again.candidates == few.candidates


def test_a_range_is_proposed_from(tmp_path):
    seats = {"low": 3, "high": 90, "log": True, "integer": True}
    choices = {"decoding": [{"kind": "autoregressive"}], "scheduler.max_num_seqs": seats}
    plan = solved(tmp_path, choices=choices, search={"candidates": 12})
    tried = [of.shape.candidate.overrides["scheduler.max_num_seqs"] for of in plan.answer.trials]
    assert all(isinstance(of, int) and 3 <= of <= 90 for of in tried)
    assert 4 <= len(set(tried)) <= 12
    assert plan.shown.meets


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"choices": {"deployment.gpu": {"low": 1, "high": 2}}}, "deployment.gpu: found a range; expected a list"),
        ({"choices": {"scheduler.max_num_seqs": {"low": 9, "high": 2}}}, "expected low < high"),
        ({"search": {"candidates": 0}}, "search.candidates"),
        ({"search": {"candidate": 4}}, "did you mean candidates?"),
    ],
)
def test_bad_searches_are_explained(tmp_path, asked, said):
    with pytest.raises(InputError, match=r"plan.yaml") as error:
        solved(tmp_path, **asked)
    assert said in str(error.value)


def test_without_optuna_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"needs optuna: pip install 'twotower-sim\[search\]'"):
        solved(tmp_path, search={"candidates": 32})
    assert solved(tmp_path, choices={"decoding": [{"kind": "autoregressive"}]}).shown.meets
