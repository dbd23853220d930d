"""The search for the least costly deployment, against brute force on servers that are simple enough."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower_sim.capacity import Candidate, Objective, Shape, breaking_load, find, front, judge

LOAD = 10.0
P90 = Objective("time_to_first_token.p90", 100.0)
GOOD = Objective("good_request_fraction", 0.9, least=True)


def candidate(name: str, speed: float, gpus: int = 1, usd: float = 1.0, quality: float | None = None) -> Candidate:
    return Candidate(name, {"speed": speed}, gpus, usd, quality)


def served(shape: Shape, noise: float = 0.0) -> dict:
    """Of servers that serve ``speed`` requests a second each."""
    spare = shape.replicas * shape.candidate.overrides["speed"] - LOAD * shape.load
    latency_ms = 100 / spare + noise if spare > 0 else 1.0  # what a run that falls behind shows means nothing
    good = {"unit": "ratio", "avg": max(0.0, 1 - 0.1 / spare) if spare > 0 else 1.0}
    nothing = {key: {} for key in ("counts", "blocks", "utilisation", "memory", "cost", "quality", "classes")}
    return nothing | {
        "metrics": {"time_to_first_token": {"avg": latency_ms / 2, "p90": latency_ms}, "good_request_fraction": good},
        "saturation": {"verdict": "STABLE" if spare > 0 else "OVERLOADED", "settled": shape.load < SETTLES},
    }


SETTLES = 20.0


class Servers:
    def __init__(self, *noise: float) -> None:
        self.tried: list[tuple[str, int, float]] = []
        self._noise = noise or (0.0,)

    def __call__(self, shapes):
        self.tried += [(of.candidate.name, of.replicas, of.load) for of in shapes]
        return [[served(shape, noise) for noise in self._noise] for shape in shapes]


candidates = st.lists(st.tuples(st.floats(0.2, 30), st.integers(1, 8), st.floats(0.1, 20)), min_size=1, max_size=6).map(
    lambda of: [candidate(f"c{i}", speed, gpus, usd) for i, (speed, gpus, usd) in enumerate(of)]
)


@settings(deadline=None)
@given(candidates, st.integers(1, 64))
def test_the_answer_is_that_of_brute_force(of, most_gpus):
    servers = Servers()
    answer = find(of, [P90, GOOD], most_gpus, servers)
    feasible = [
        trial.cost
        for one in of
        for n in range(1, most_gpus // one.gpus + 1)
        if (trial := judge(Shape(one, n), [served(Shape(one, n))], [P90, GOOD])).meets
    ]
    assert (answer.best.cost if answer.best else None) == (min(feasible) if feasible else None)
    assert len(set(servers.tried)) == len(servers.tried)  # nothing is tried twice
    assert {trial.shape.candidate.name for trial in answer.fewest} | answer.dearer.keys() | answer.given_up.keys() == {
        one.name for one in of
    }
    for trial in answer.fewest:  # and one replica fewer does not do
        one, n = trial.shape.candidate, trial.shape.replicas
        assert n == 1 or not judge(Shape(one, n - 1), [served(Shape(one, n - 1))], [P90, GOOD]).meets


def test_few_trials_find_many_replicas():
    servers = Servers()
    answer = find([candidate("slow", 0.1)], [P90], 1000, servers)
    assert answer.best.shape.replicas == 110
    assert len(servers.tried) < 2 * math.log2(1000)


def test_what_cannot_be_cheaper_is_dearer():
    servers = Servers()
    answer = find([candidate("good", 20.0), candidate("dear", 0.5, usd=3.0)], [P90], 64, servers)
    assert answer.best.shape.candidate.name == "good"
    assert answer.dearer == {"dear": "2 replicas or more cost more than 1 x (good)"}
    assert max(n for name, n, _ in servers.tried if name == "dear") == 1


def test_nothing_does_and_what_comes_closest():
    answer = find([candidate("a", 1.0), candidate("b", 2.4)], [P90], 4, Servers())
    assert answer.best is None
    assert answer.given_up == {"a": "4 GPUs do not meet the objectives", "b": "4 GPUs do not meet the objectives"}
    assert not answer.closest.stable  # not even the last of them
    answer = find([candidate("a", 2.6), candidate("b", 2.55)], [P90], 4, Servers())
    assert answer.closest.shape.candidate.name == "a"
    assert answer.closest.stable
    assert answer.closest.ratio == pytest.approx(100 / 0.4 / 100)


def test_too_large_for_the_budget():
    answer = find([candidate("huge", 99.0, gpus=16)], [P90], 8, Servers())
    assert answer.given_up == {"huge": "one replica has 16 GPUs; 8 allowed"}
    assert answer.closest is None


def test_an_unstable_run_meets_nothing_however_good_its_percentiles_look():
    trial = judge(Shape(candidate("a", 1.0), 5), [served(Shape(candidate("a", 1.0), 5))], [P90])
    assert trial.figures["time_to_first_token.p90"].mean == 1.0
    assert not trial.meets


def test_the_bad_end_of_the_interval_has_to_meet():
    noisy = Servers(-30.0, 0.0, 30.0)
    steady = find([candidate("a", 1.1)], [P90], 64, Servers()).best
    wary = find([candidate("a", 1.1)], [P90], 64, noisy).best
    assert wary.shape.replicas > steady.shape.replicas
    assert 70 < wary.figures["time_to_first_token.p90"].high <= 100


def test_a_candidate_that_cannot_run_is_given_up():
    def run(shapes):
        return ["no room" if of.candidate.name == "small" else [served(of)] for of in shapes]

    answer = find([candidate("small", 99.0), candidate("large", 20.0, usd=9.0)], [P90], 64, run)
    assert answer.given_up == {"small": "no room"}
    assert answer.best.shape.candidate.name == "large"


def test_the_load_at_which_it_breaks():
    best = find([candidate("a", 3.0)], [P90], 64, Servers()).best  # 4 serve 12 a second; 11 leave 100 ms
    low, high = breaking_load(best, [P90], Servers())
    assert low <= 1.1 < high <= 1.02 * low
    assert breaking_load(find([candidate("a", 900.0)], [P90], 64, Servers()).best, [P90], Servers()) == (8.0, math.inf)


def test_the_front_has_what_nothing_beats():
    of = [
        candidate("cheap", 12.0, usd=1.0, quality=0.98),
        candidate("fast", 40.0, usd=3.0, quality=0.98),
        candidate("bad", 12.0, usd=3.0, quality=0.9),
        candidate("exact", 12.0, usd=2.0, quality=1.0),
    ]
    trials = [judge(Shape(one, 1), [served(Shape(one, 1))], [P90]) for one in of]
    assert [trial.shape.candidate.name for trial in front(trials)] == ["cheap", "exact", "fast"]


def test_there_is_no_answer_from_a_load_that_had_not_settled():
    def short(shapes):
        found = [[served(shape)] for shape in shapes]
        for (summary,) in found:
            summary["saturation"]["settled"] = False
        return found

    answer = find([candidate("a", 3.0)], [P90], 64, short)
    assert answer.best is None
    assert answer.closest.meets
    assert not answer.closest.settled
    assert answer.closest.shape == find([candidate("a", 3.0)], [P90], 64, Servers()).best.shape


def test_the_margin_ends_where_loads_do_not_settle(monkeypatch):
    best = find([candidate("a", 900.0)], [P90], 64, Servers()).best
    monkeypatch.setattr("test_capacity.SETTLES", 2.0)
    assert breaking_load(best, [P90], Servers()) == (1.25**3, math.inf)
    monkeypatch.setattr("test_capacity.SETTLES", 1.1)
    assert breaking_load(best, [P90], Servers()) == (1.0, math.inf)
