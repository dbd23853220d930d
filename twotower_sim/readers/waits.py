"""What each request of a trace waits for, from what its file says of sessions.

A turn waits for the end of the one before it, and then:

- as long as its ``delay`` says;
- else, where the file says when requests finished, as long as it was from the latest end before it; where nothing of
  its session had finished, it was sent beside the others, as long after the latest of them as the file has it;
- else until its recorded time, if that is later.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from twotower_sim.readers.rows import After
from twotower_sim.requests import LATEST_NS, Dependencies

UNKNOWN = -1


class Turns(NamedTuple):
    """Columns (n,) int64 in the file's order; UNKNOWN where the file does not say."""

    arrival_ns: np.ndarray
    finish_ns: np.ndarray
    delay_ns: np.ndarray  # from the end of the session's turn before
    session: np.ndarray


class _Wait(NamedTuple):
    on: int
    delay_ns: int
    dispatch: bool = False


class Told(NamedTuple):
    """What a file says outright that rows wait for."""

    after: dict[int, Sequence[After]]
    row_of: dict[Hashable, int]
    unbound: Sequence[int]  # rows that may come before their recorded time
    complete: bool  # no row was left out: what is waited for is there


Bad = Callable[[int, str], None]


def waits(turns: Turns, told: Told, bad: Bad) -> tuple[np.ndarray, Dependencies, np.ndarray]:
    """Arrivals as if answers took no longer than recorded, or no time; dependencies; and which rows can be kept.
    ``bad`` hears of rows that wait for what is not there, in a circle, or for ever."""
    count = len(turns.arrival_ns)
    keep = np.ones(count, bool)
    waiting: list[list[_Wait]] = [[] for _ in range(count)]
    binding = turns.arrival_ns != UNKNOWN
    binding[list(told.unbound)] = False
    for row, of in told.after.items():
        for after in of:
            if (on := told.row_of.get(after.id)) is not None:
                waiting[row].append(_Wait(on, after.delay_ns, after.dispatch))
            elif told.complete:
                keep[row] = False
                bad(row, f"waits for request {after.id!r:.60}, which is not in the file")
    for rows in _sessions(turns):
        _in_turn([row for row in rows if row not in told.after], turns, waiting, binding)
    arrival_ns, settled = _settled(turns.arrival_ns, waiting)
    for row in np.flatnonzero(keep & ~settled).tolist():
        bad(row, "waits, through others, for itself or for more than 146 years")
    first = np.concatenate(([0], np.cumsum([len(of) for of in waiting])))
    flat = np.array([wait for of in waiting for wait in of], np.int64).reshape(-1, 3)
    return (
        arrival_ns,
        Dependencies(first, flat[:, 0], flat[:, 1], flat[:, 2].astype(bool), binding),
        keep & settled,
    )


def _sessions(turns: Turns) -> list[list[int]]:
    """Rows of each session of more than one, by arrival where it is known, ties in the file's order."""
    rows = np.flatnonzero(turns.session != UNKNOWN)
    groups: dict[int, list[int]] = {}
    for row, session in zip(rows.tolist(), turns.session[rows].tolist(), strict=True):
        groups.setdefault(session, []).append(row)
    arrival_ns = turns.arrival_ns
    for of in groups.values():
        if all(arrival_ns[row] != UNKNOWN for row in of):
            of.sort(key=lambda row: arrival_ns[row])
    return [of for of in groups.values() if len(of) > 1]


def _in_turn(rows: list[int], turns: Turns, waiting: list[list[_Wait]], binding: np.ndarray) -> None:
    ended: list[tuple[int, int]] = []  # (finish, row) of the rows before, rising
    arrival, finish, delay = (column[rows].tolist() for column in turns[:3])
    for place, row in enumerate(rows):
        if place:
            before = rows[place - 1]
            if delay[place] != UNKNOWN:
                wait, binding[row] = _Wait(before, delay[place]), False
            elif finish[place - 1] == UNKNOWN or arrival[place] == UNKNOWN:
                wait = _Wait(before, 0)
            elif at := bisect_right(ended, (arrival[place], len(waiting))):
                wait, binding[row] = _Wait(ended[at - 1][1], arrival[place] - ended[at - 1][0]), False
            else:
                wait, binding[row] = _Wait(before, arrival[place] - arrival[place - 1], dispatch=True), False
            waiting[row].append(wait)
        if finish[place] != UNKNOWN:
            ended.insert(bisect_right(ended, (finish[place], row)), (finish[place], row))


def _settled(arrival_ns: np.ndarray, waiting: list[list[_Wait]]) -> tuple[np.ndarray, np.ndarray]:
    """No arrival is before that of what it waits for (Kahn's order); and which rows have one in time."""
    times = np.maximum(arrival_ns, 0).tolist()
    left = [len(of) for of in waiting]
    followers: list[list[tuple[int, int]]] = [[] for _ in waiting]
    for row, of in enumerate(waiting):
        for wait in of:
            followers[wait.on].append((row, wait.delay_ns))
    ready = deque(row for row, count in enumerate(left) if not count)
    settled = np.zeros(len(times), bool)
    unknown = (arrival_ns == UNKNOWN).tolist()
    while ready:
        row = ready.popleft()
        if times[row] > LATEST_NS:
            continue
        settled[row] = True
        for follower, delay_ns in followers[row]:
            times[follower] = max(times[follower], times[row] + (delay_ns if unknown[follower] else 0))
            left[follower] -= 1
            if not left[follower]:
                ready.append(follower)
    return np.array([min(time, LATEST_NS) for time in times], np.int64), settled
