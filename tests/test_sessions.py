"""Conversations: turns that come when others have finished, exactly; what their prompts share; when they start."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import AFFINE, ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from invariants import check
from test_ways import COSTS, TIGHT, WAYS

from twotower_sim.errors import InputError
from twotower_sim.metrics import evaluate
from twotower_sim.readers import read_trace
from twotower_sim.requests import Dependencies, Requests
from twotower_sim.scenario import Scenario
from twotower_sim.sessions import grown_prefixes, started, stretched
from twotower_sim.simulation import prepare, simulate

NOTHING = {"kind": "synthetic", "requests": 1, "arrivals": {"kind": "poisson", "rate_rps": 1},
           "input_tokens": {"kind": "constant", "value": 1}, "output_tokens": {"kind": "constant", "value": 1}}  # fmt: skip


def served(requests: Requests, **sections):
    run = prepare(Scenario.model_validate({"workload": NOTHING, "latency": AFFINE} | sections), given=requests)
    return simulate(run)


def times(run) -> tuple[np.ndarray, np.ndarray]:
    return np.array(run.records.arrival_ns), np.array(run.records.finish_ns)


@st.composite
def conversations(draw):
    """Requests of which each may wait for some before it: chains, branches and joins."""
    count = draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    waits = [sorted(rng.choice(row, size=min(row, rng.integers(0, 4)), replace=False).tolist()) for row in range(count)]
    first = np.concatenate(([0], np.cumsum([len(of) for of in waits])))
    on = np.array([row for of in waits for row in of], np.int64)
    delay_ns = rng.integers(0, 3, len(on)) * rng.integers(0, 2 * 10**8, len(on))
    after = Dependencies(first, on, delay_ns, rng.random(len(on)) < 0.3, rng.random(count) < 0.5)
    arrival_ns = np.sort(rng.integers(0, 2 * 10**9, count))
    return Requests(arrival_ns, rng.integers(1, 400, count), rng.integers(1, 60, count), None, None, after)


@settings(max_examples=60, deadline=None)
@given(conversations(), st.sampled_from(sorted(WAYS)), st.integers(1, 3), st.booleans())
def test_every_request_comes_exactly_when_it_is_let_go(requests, way, replicas, tight):
    sections = {"latency": COSTS, **WAYS[way]} | ({"memory": WAYS[way].get("memory", {}) | TIGHT} if tight else {})
    sections["deployment"] = sections.get("deployment", {}) | {"replicas": replicas}
    run = served(requests, **sections)
    check(run, evaluate(run))
    arrival_ns, finish_ns = times(run)
    finish_ns[run.rejected] = arrival_ns[run.rejected]  # refused as it came
    after = requests.after
    for row in range(len(requests)):
        own = slice(after.first[row], after.first[row + 1])
        happened = np.where(after.dispatch[own], arrival_ns[after.on[own]], finish_ns[after.on[own]])
        due = (happened + after.delay_ns[own]).tolist()
        due += [requests.arrival_ns[row]] if after.binding[row] or not due else []
        assert arrival_ns[row] == max(due)


@settings(max_examples=30, deadline=None)
@given(conversations(), st.sampled_from(sorted(WAYS.keys() - {"speculative"})))
def test_an_open_replay_at_the_times_that_came_out_gives_the_same(requests, way):
    apart = requests.after.delay_ns + 1 + np.arange(len(requests.after.delay_ns))
    requests = replace(requests, after=replace(requests.after, delay_ns=apart))
    sections = {"latency": COSTS, "commits": {"kind": "constant", "tokens_per_step": 4}} | WAYS[way]  # luck without ids
    run = served(requests, **sections)
    arrival_ns, finish_ns = times(run)
    assume(len(set(arrival_ns.tolist())) == len(arrival_ns))  # else who comes first at one instant is by other ids
    order = np.argsort(arrival_ns)
    again = served(Requests(arrival_ns[order], *(column[order] for column in (requests.input_tokens, requests.output_tokens))),
                   **sections)  # fmt: skip
    assert times(again)[1].tolist() == finish_ns[order].tolist()


# ---------------------------------------------------------------------- what a file says


def trace(tmp_path, *rows: dict):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"input_length": 10, "output_length": 5} | row) + "\n" for row in rows))
    return path


def waits(requests: Requests) -> list[list[tuple[int, float, bool]]]:
    """(request, seconds, dispatch) by request."""
    after = requests.after
    flat = list(zip(after.on.tolist(), (after.delay_ns / 1e9).tolist(), after.dispatch.tolist(), strict=True))
    return [flat[low:high] for low, high in zip(after.first, after.first[1:], strict=False)]


def test_turns_with_delays_wait_for_the_one_before(tmp_path):
    path = trace(
        tmp_path,
        {"timestamp": 0, "session_id": "a"},
        {"timestamp": 1000, "session_id": "b"},
        {"delay": 500, "session_id": "a"},
        {"delay": 250, "session_id": "a"},
    )
    requests = read_trace(path).requests
    assert requests.arrival_ns.tolist() == [0, 500_000_000, 750_000_000, 1_000_000_000]
    assert requests.sessions.tolist() == [0, 0, 0, 1]
    assert waits(requests) == [[], [(0, 0.5, False)], [(1, 0.25, False)], []]
    assert requests.after.binding.tolist() == [True, False, False, True]


def test_turns_with_times_wait_for_their_time_too(tmp_path):
    path = trace(tmp_path, *({"timestamp": at, "session_id": "a"} for at in (0, 2000, 1000)), {"timestamp": 1500})
    requests = read_trace(path).requests
    assert waits(requests) == [[], [(0, 0, False)], [], [(1, 0, False)]]
    assert requests.after.binding.all()
    assert requests.sessions.tolist() == [0, 0, 1, 0]  # who names no session is one of its own


def test_a_turn_without_a_time_or_a_delay_is_named(tmp_path):
    path = trace(tmp_path, {"timestamp": 0, "session_id": "a"}, {"session_id": "a"})
    with pytest.raises(InputError, match=r"trace.jsonl:2: timestamp is missing"):
        read_trace(path)


def test_taking_some_drops_what_they_waited_for():
    after = Dependencies(
        np.array([0, 0, 1, 3]), np.array([0, 0, 1]), np.array([5, 6, 7]), np.array([0, 1, 0], bool), np.ones(3, bool)
    )
    requests = Requests(np.arange(3), np.ones(3, int), np.ones(3, int), None, np.zeros(3, int), after)
    assert waits(requests.take(slice(1, 3))) == [[], [(0, 7e-9, False)]]
    assert waits(requests.take(np.array([2, 0]))) == [[(1, 6e-9, True)], []]
    assert waits(requests.take(np.array([True, True, False]))) == [[], [(0, 5e-9, False)]]


def test_conversations_start_more_often_but_go_on_as_they_did():
    requests = Requests(np.array([0, 10, 40, 50]), *np.ones((2, 4), int), None, np.array([7, 9, 7, 9]))
    assert stretched(requests, 2.0).tolist() == [0, 5, 40, 45]
    relative = Requests(np.array([0, 40, 0, 30]), *np.ones((2, 4), int), None, np.array([3, 3, 8, 8]))
    assert started(relative, np.array([100, 120])).arrival_ns.tolist() == [100, 120, 140, 150]


def test_prompts_grow_with_the_conversation():
    """40 tokens, then 100 that repeat them; another session; 20 tokens start anew; then 50 that repeat these."""
    requests = Requests(np.arange(5), np.array([40, 100, 33, 20, 50]), np.ones(5, int), None, np.array([0, 0, 1, 0, 0]))
    prefixes = grown_prefixes(requests, 16)
    of = [prefixes.of(request).tolist() for request in range(5)]
    assert [len(hashes) for hashes in of] == [2, 6, 2, 1, 3]
    assert of[1][:2] == of[0]
    assert of[4][:1] == of[3]
    assert len({*of[1], *of[2], *of[4]}) == 6 + 2 + 3


# ---------------------------------------------------------------------- from the command's point of view


def scenario(tmp_path, path, **more):
    load = {"kind": "trace", "path": str(path)} | more
    return Scenario.model_validate(
        {"workload": load, "latency": AFFINE, "model": str(ROOT / "calibrate" / "tiny" / "config.json")}
    )


def test_closed_conversations_wait_and_open_ones_do_not(tmp_path):
    path = trace(
        tmp_path, {"timestamp": 0, "session_id": "a", "output_length": 100}, {"timestamp": 10, "session_id": "a"}
    )
    closed, open_ = (simulate(prepare(scenario(tmp_path, path, sessions=kind))) for kind in ("closed", "open"))
    assert times(open_)[0].tolist() == [0, 10_000_000]
    arrival_ns, finish_ns = times(closed)
    assert arrival_ns[1] == finish_ns[0] > 10_000_000


def test_assumed_prefixes_are_said_and_hit(tmp_path):
    rows = ({"timestamp": 1000 * turn, "session_id": "a", "input_length": 400 + 400 * turn} for turn in range(3))
    load = scenario(tmp_path, trace(tmp_path, *rows))
    run = prepare(
        load.model_copy(update={"memory": load.memory.model_validate({"prefix_cache": {"kind": "attention"}})})
    )
    assert any("prefixes are assumed" in warning for warning in run.warnings)
    simulate(run)
    assert run.engines[0].prefix_caches[0].counts["tokens_reused"] == 400 + 800
