"""Rows of a trace become columns: sorted by arrival, with what prompts share and what each request waits for."""

from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from twotower_sim.errors import InputError
from twotower_sim.readers.rows import FAR_NS, After, Row
from twotower_sim.readers.waits import UNKNOWN, Told, Turns, waits
from twotower_sim.requests import LATEST_NS, Prefixes, Requests

HASH_TOKENS = (512, 16, 32, 64, 128, 256, 1024, 2048, 4096)  # of a hashed block

BATCH = 128  # rows that are made columns at once, while they are in the processor's cache

Partial = Literal["hashed", "unhashed", "either"]
"""Whether a last block that is not full has a hash."""
Bad = Callable[[int, str], None]
"""Hears of a place and of what is wrong there; it raises, or counts."""


class Table:
    """Takes rows one by one, in bounded memory beyond the columns themselves."""

    def __init__(self) -> None:
        self.places = array("q")
        self._batch: list[Row] = []  # rows that are not in the columns yet
        self._input, self._output, self._arrival = array("q"), array("q"), array("q")
        self._finish, self._delay, self._session = array("q"), array("q"), array("q")
        self._first, self._hashes, self._hashed = array("q", [0]), array("q"), array("b")
        self._block_tokens: int | None = None
        self._any_hashed = False
        self._sessions: dict[Hashable, int] = {}
        self._rows_of: dict[Hashable, int] = {}  # by request id
        self._after: dict[int, Sequence[After]] = {}  # by row
        self._unbound: list[int] = []  # rows
        self.late = 0  # requests that arrived before the one that stands before them

    def __len__(self) -> int:
        return len(self.places)

    def add(self, row: Row, place: int) -> None:
        """Raises InputError; then nothing is added."""
        if row.id is not None and row.id in self._rows_of:
            raise InputError(f"request {row.id!r:.60} was there before")
        if row.arrival_ns is not None and row.arrival_ns >= FAR_NS:
            raise InputError(f"arrives {row.arrival_ns / 3.156e16:.0f} years after time 0")
        if row.hash_ids is not None:
            self._add_hashes(row.hash_ids, row.block_tokens)
        self._first.append(len(self._hashes))
        if row.id is not None:
            self._rows_of[row.id] = len(self)
        if row.after is not None:
            self._after[len(self)] = row.after
            if not row.bound:
                self._unbound.append(len(self))
        self.places.append(place)
        self._batch.append(row)
        if len(self._batch) == BATCH:
            self._add_batch()

    def _add_batch(self) -> None:
        """Many rows at once, which is quicker than one by one."""
        if not self._batch:
            return
        columns: Any = zip(*self._batch, strict=True)
        of: Any = Row(*columns)
        self._batch = []
        self._input.fromlist(list(of.input_tokens))
        self._output.fromlist(list(of.output_tokens))
        self._hashed.fromlist([ids is not None for ids in of.hash_ids])
        number, sessions = self._sessions.setdefault, self._sessions
        self._session.fromlist([UNKNOWN if id is None else number(id, len(sessions)) for id in of.session])
        for column, times in ((self._arrival, of.arrival_ns), (self._finish, of.finish_ns), (self._delay, of.delay_ns)):
            column.fromlist([UNKNOWN if time_ns is None else time_ns for time_ns in times])

    def _add_hashes(self, ids: Any, block_tokens: int | None) -> None:
        if block_tokens != self._block_tokens:
            if self._any_hashed:
                raise InputError(f"hashed blocks have {block_tokens} tokens; they had {self._block_tokens} before")
            self._block_tokens = block_tokens
        self._any_hashed = True
        try:
            self._hashes.fromlist(ids)
        except (TypeError, OverflowError):
            self._hashes.frombytes(_unsigned(ids))

    # ------------------------------------------------------------------ the whole

    def requests(self, relative: bool, partial: Partial, complete: bool, bad: Bad) -> Requests:
        """In order of arrival (ties keep the file's order), the first at time 0; of ``relative`` times, which count
        from the start of each session, session by session instead. Rows with which something is wrong are told to
        ``bad`` and left out. Unless all of the file's are here (``complete``), nobody waits for one that is not."""
        self._add_batch()
        arrival_ns, input_tokens, output_tokens, sessions = (
            np.frombuffer(column, np.int64) for column in (self._arrival, self._input, self._output, self._session)
        )
        prefixes, keep = self._prefixes(input_tokens, partial, bad)
        after = None
        alone = sessions == UNKNOWN
        grouped = relative or bool(self._after) or len(self._sessions) < len(self) - int(alone.sum())
        if grouped:
            turns = Turns(arrival_ns, np.array(self._finish), np.array(self._delay), sessions)
            told = Told(self._after, self._rows_of, self._unbound, complete)
            arrival_ns, after, kept = waits(turns, told, lambda row, why: bad(self.places[row], why))
            keep &= kept
        sessions[alone] = len(self._sessions) + np.arange(alone.sum())
        requests = Requests(arrival_ns, input_tokens, output_tokens, prefixes, sessions if grouped else None, after)
        rows = np.flatnonzero(keep)
        self.late = 0 if relative else int((np.diff(arrival_ns[rows]) < 0).sum())
        order = np.lexsort((arrival_ns[rows], sessions[rows])) if relative else arrival_ns[rows].argsort(kind="stable")
        if len(order) < len(self) or (np.diff(order) < 0).any():
            requests = requests.take(rows[order])
        if relative or not len(requests):
            return requests
        first_ns, last_ns = int(requests.arrival_ns[0]), int(requests.arrival_ns[-1])
        if last_ns - first_ns > LATEST_NS:
            raise InputError(f"spans {(last_ns - first_ns) / 3.156e16:.0f} years; at most 146 are replayed")
        return replace(requests, arrival_ns=requests.arrival_ns - first_ns)

    def _prefixes(self, input_tokens: np.ndarray, partial: Partial, bad: Bad) -> tuple[Prefixes | None, np.ndarray]:
        """Of blocks whose size fits all rows, or most of them; and which rows it fits."""
        hashed = np.array(self._hashed, bool)
        if not hashed.any():
            return None, ~hashed
        first, hashes = np.frombuffer(self._first, np.int64), np.frombuffer(self._hashes, np.int64)
        counts = np.diff(first)
        sizes = (self._block_tokens,) if self._block_tokens else HASH_TOKENS
        fits = {size: hashed & self._fits(counts, input_tokens, size, partial) for size in sizes}
        size = max(sizes, key=lambda size: fits[size].sum())
        others = ", ".join(str(other) for other in sizes if other != size)
        guess = f" (or of {others} in all rows)" if others else ""
        for row in np.flatnonzero(~fits[size]).tolist():
            expected = int(input_tokens[row]) // size if partial == "unhashed" else -(-int(input_tokens[row]) // size)
            found = f"found {counts[row]} for {input_tokens[row]} tokens" if hashed[row] else "none, though others have"
            bad(
                self.places[row],
                f"hash_ids: {found}; expected one for each block of {size}, {expected}{guess}",
            )
        return Prefixes(first, hashes, size), fits[size]

    @staticmethod
    def _fits(counts: np.ndarray, input_tokens: np.ndarray, size: int, partial: Partial) -> np.ndarray:
        whole, all_ = counts == input_tokens // size, counts == -(-input_tokens // size)
        return {"hashed": all_, "unhashed": whole, "either": all_ | whole}[partial]


def _unsigned(ids: Any) -> bytes:
    """Of 64 bits without a sign, as those that have the same bits with one."""
    try:
        if isinstance(ids, list):
            return array("Q", ids).tobytes()
    except (TypeError, OverflowError):
        pass
    raise InputError("hash_ids: expected a list of whole numbers of 64 bits")
