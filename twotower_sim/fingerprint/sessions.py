"""Conversations: how many turns they have, when the next turn comes, and how its prompt grows out of the last one."""

from typing import Literal

import numpy as np
from pydantic import field_validator

from twotower_sim.draws import uniform
from twotower_sim.fingerprint.lengths import draw_outputs, tokens
from twotower_sim.fingerprint.quantiles import COARSE, Part, Table, at, between, quantiles
from twotower_sim.requests import MOST_TOKENS, Dependencies, Requests

MOST_TURNS = 100_000


class Sessions(Part):
    """Turns come one after another, each ``wait_s`` after the one before has finished (``waits_for: finish``), after it
    has arrived (``arrival``), or after its recorded arrival, whatever happens (``record``). A prompt is the one before,
    its answer and ``new_input_tokens``, below 0 where something is left out."""

    turns: Table
    waits_for: Literal["finish", "arrival", "record"]
    wait_s: Table | None = None
    first_input_tokens: Table
    new_input_tokens: Table | None = None

    @field_validator("turns", "wait_s", "first_input_tokens", "new_input_tokens")
    @classmethod
    def _bounds(cls, table: Table | None, info) -> Table | None:
        bounds = {"turns": (1, MOST_TURNS), "wait_s": (0, 1e9), "first_input_tokens": (1, MOST_TOKENS)}
        return between(*bounds.get(info.field_name, (-MOST_TOKENS, MOST_TOKENS)))(table) if table else table


def turns_of(sessions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn of each request in its session, from 0, and the request of the turn before (-1: none)."""
    order = sessions.argsort(kind="stable")
    same = np.concatenate(([False], np.diff(sessions[order]) == 0))
    previous = np.full(len(sessions), -1)
    previous[order[same]] = order[np.flatnonzero(same) - 1]
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(sessions))))
    turn = np.empty(len(sessions), np.int64)
    turn[order] = np.arange(len(sessions)) - starts
    return turn, previous


def measure_sessions(requests: Requests) -> Sessions:
    assert requests.sessions is not None
    turn, previous = turns_of(requests.sessions)
    later = np.flatnonzero(turn > 0)
    before = previous[later]
    new = requests.input_tokens[later] - requests.input_tokens[before] - requests.output_tokens[before]
    waits_for, wait_s = _waits(requests, later, before)
    return Sessions(
        turns=quantiles(np.unique(requests.sessions, return_counts=True)[1]),
        waits_for=waits_for,
        wait_s=quantiles(np.round(wait_s, 3), COARSE) if len(later) else None,
        first_input_tokens=quantiles(requests.input_tokens[turn == 0], COARSE),
        new_input_tokens=quantiles(new, COARSE) if len(later) else None,
    )


def _waits(
    requests: Requests, later: np.ndarray, before: np.ndarray
) -> tuple[Literal["finish", "arrival", "record"], np.ndarray]:
    after = requests.after
    if after is not None and len(later):
        waiting = later[np.diff(after.first)[later] > 0]
        if 2 * len(waiting) >= len(later):
            last = after.first[waiting + 1] - 1
            return ("arrival" if after.dispatch[last].mean() > 0.5 else "finish"), after.delay_ns[last] / 1e9
    return "record", (requests.arrival_ns[later] - requests.arrival_ns[before]) / 1e9


# ---------------------------------------------------------------------- drawing


def draw_turns(sessions: Sessions, count: int, seed: int) -> np.ndarray:
    """Turns of the first ``count`` sessions."""
    return tokens(sessions.turns, uniform(seed, "turns", np.arange(count)))


def draw_sessions(
    sessions: Sessions, start_s: np.ndarray, turns: np.ndarray, board: list[list[int]], input_table: Table,
    output_table: Table, seed: int,
) -> Requests:  # fmt: skip
    """All requests of sessions that start at these times, in order of arrival (as early as it can be)."""
    first = np.concatenate(([0], np.cumsum(turns)))
    session = np.repeat(np.arange(len(turns)), turns)
    turn = np.arange(first[-1]) - first[session]
    wait_s = at(sessions.wait_s, uniform(seed, "wait", session, turn)) if sessions.wait_s else np.zeros(len(turn))
    wait_s[turn == 0] = start_s
    total = np.cumsum(wait_s)
    arrival_s = total - (total[first[:-1]] - start_s)[session]
    input_tokens, output_tokens = np.empty(len(turn), np.int64), np.empty(len(turn), np.int64)
    shares = np.array(board, float)
    p, x = np.array(input_table).T
    for depth in range(int(turns.max())):
        of = first[:-1][turns > depth] + depth
        key = session[of], depth
        if depth == 0:
            inputs = tokens(sessions.first_input_tokens, uniform(seed, "input", *key))
        else:
            new = tokens(sessions.new_input_tokens or [(0, 0), (1, 0)], uniform(seed, "input", *key))
            inputs = np.clip(input_tokens[of - 1] + output_tokens[of - 1] + new, 1, MOST_TOKENS)
        input_tokens[of] = inputs
        rank = draw_outputs(np.interp(inputs, x, p), shares, uniform(seed, "output", *key))
        output_tokens[of] = tokens(output_table, rank)
    after = None
    if sessions.waits_for != "record":
        waits = turn > 0
        after = Dependencies(
            np.concatenate(([0], np.cumsum(waits))),
            np.flatnonzero(waits) - 1,
            np.rint(wait_s[waits] * 1e9).astype(np.int64),
            np.full(waits.sum(), sessions.waits_for == "arrival"),
            np.zeros(len(turn), bool),
        )
    arrival_ns = np.rint(arrival_s * 1e9).astype(np.int64)
    drawn = Requests(arrival_ns, input_tokens, output_tokens, None, session, after)
    return drawn.take(arrival_ns.argsort(kind="stable"))
