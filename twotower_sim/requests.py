"""Request facts: what arrives and when, as columns. Known to the simulation; routers and schedulers see less."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twotower_sim.errors import InputError

MOST_TOKENS = 2**31 - 1
"""A request's input or output is shorter; a trace that says otherwise has its columns or units mixed up."""
LATEST_NS = 1 << 62  # 146 years: the last arrival, with room for what follows in 64 bits


@dataclass(frozen=True)
class Prefixes:
    """Hashes of the prompts' blocks, flat: equal hashes at equal places mean equal prompts up to there."""

    first: np.ndarray  # int64 (n + 1,): where each request's hashes begin
    hashes: np.ndarray  # int64; the last of a request may cover less than a whole block
    block_tokens: int

    def of(self, request: int) -> np.ndarray:
        return self.hashes[self.first[request] : self.first[request + 1]]

    def take(self, index: np.ndarray | slice) -> "Prefixes":
        rows = np.arange(len(self.first) - 1)[index]
        first, at = _ragged(self.first, rows)
        return Prefixes(first, self.hashes[at], self.block_tokens)


@dataclass(frozen=True)
class Dependencies:
    """What each request waits for, flat: it arrives when the last of them has let it go, and not before its recorded
    arrival where that is ``binding``. A request that waits for nothing arrives at its recorded time."""

    first: np.ndarray  # int64 (n + 1,): where each request's own begin
    on: np.ndarray  # int64 (m,): the other request
    delay_ns: np.ndarray  # int64 (m,), from when the other finishes
    dispatch: np.ndarray  # bool (m,): or from when it arrives
    binding: np.ndarray  # bool (n,)

    @classmethod
    def none(cls, requests: int) -> "Dependencies":
        """Of requests that wait for nothing."""
        nothing = np.zeros(0, np.int64)
        return cls(np.zeros(requests + 1, np.int64), nothing, nothing, nothing > 0, np.ones(requests, bool))

    def take(self, index: np.ndarray | slice) -> "Dependencies":
        """Of some requests, in a new order; nobody waits for those that are left out."""
        rows = np.arange(len(self.binding))[index]
        place = np.full(len(self.binding), -1)
        place[rows] = np.arange(len(rows))
        first, at = _ragged(self.first, rows)
        on = place[self.on[at]]
        kept = on >= 0
        first = np.concatenate(([0], np.cumsum(kept)))[first]
        at = at[kept]
        return Dependencies(first, on[kept], self.delay_ns[at], self.dispatch[at], self.binding[rows])


def _ragged(first: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows' parts of a flat column begin when only they are kept, and where they stand now."""
    counts = np.diff(first)[rows]
    new = np.concatenate(([0], np.cumsum(counts)))
    return new, np.arange(new[-1]) + np.repeat(first[rows] - new[:-1], counts)


@dataclass(frozen=True)
class Requests:
    """Columns of equal length, in order of arrival; a request's id is its index."""

    arrival_ns: np.ndarray  # int64, from the start of the simulation; all 0 in a closed loop
    input_tokens: np.ndarray  # int64, >= 1
    output_tokens: np.ndarray  # int64, >= 1
    prefixes: Prefixes | None = None  # None: nothing is known of what prompts share
    sessions: np.ndarray | None = None  # int64: number of the conversation; None: each request is its own
    after: Dependencies | None = None  # None: nothing waits for anything else

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def take(self, index: np.ndarray | slice) -> "Requests":
        return Requests(
            self.arrival_ns[index],
            self.input_tokens[index],
            self.output_tokens[index],
            self.prefixes.take(index) if self.prefixes else None,
            self.sessions[index] if self.sessions is not None else None,
            self.after.take(index) if self.after else None,
        )


def merged(parts: Sequence[Requests]) -> tuple[Requests, np.ndarray]:
    """All requests of several loads in order of arrival (at one instant, in the order of the loads), and the load that
    each is of. Those of different loads share no prefixes and no sessions. Raises InputError where prefixes are hashed
    in blocks of different sizes."""
    whole = Requests(
        np.concatenate([part.arrival_ns for part in parts]),
        np.concatenate([part.input_tokens for part in parts]),
        np.concatenate([part.output_tokens for part in parts]),
        _joined_prefixes(parts),
        _joined_sessions(parts),
        _joined_dependencies(parts),
    )
    order = np.argsort(whole.arrival_ns, kind="stable")
    return whole.take(order), np.repeat(np.arange(len(parts)), [len(part) for part in parts])[order]


def _joined_prefixes(parts: Sequence[Requests]) -> Prefixes | None:
    known = [part.prefixes for part in parts if part.prefixes]
    if not known:
        return None
    if len(found := sorted({of.block_tokens for of in known})) > 1:
        raise InputError(f"prefixes are hashed in blocks of {' and '.join(map(str, found))} tokens; expected one size")
    counts = [np.diff(of.prefixes.first) if of.prefixes else np.zeros(len(of), np.int64) for of in parts]
    return Prefixes(_from_counts(counts), _apart([of.hashes for of in known]), found[0])


def _joined_sessions(parts: Sequence[Requests]) -> np.ndarray | None:
    if all(part.sessions is None for part in parts):
        return None
    return _apart([np.arange(len(of)) if of.sessions is None else of.sessions for of in parts])


def _joined_dependencies(parts: Sequence[Requests]) -> Dependencies | None:
    if all(part.after is None for part in parts):
        return None
    own = [of.after or Dependencies.none(len(of)) for of in parts]
    before = np.cumsum([0, *map(len, parts)])
    return Dependencies(
        _from_counts([np.diff(of.first) for of in own]),
        np.concatenate([of.on + offset for of, offset in zip(own, before, strict=False)]),
        np.concatenate([of.delay_ns for of in own]),
        np.concatenate([of.dispatch for of in own]),
        np.concatenate([of.binding for of in own]),
    )


def _from_counts(counts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(np.concatenate(counts))))


def _apart(columns: list[np.ndarray]) -> np.ndarray:
    """Numbers of several columns, one after the other, renumbered so that no two columns share any."""
    numbered, used = [], 0
    for column in columns:
        values, number = np.unique(column, return_inverse=True)
        numbered.append(number + used)
        used += len(values)
    return np.concatenate(numbered)
