"""Sessions of coding agents (kv-cache-tester, AgentX): an object a session with ``id``, ``block_size``,
``hash_id_scope`` and ``requests``. A request has ``t`` (s since its session began), ``in`` and ``out`` (tokens),
``hash_ids`` of the full blocks of its prompt, and may have ``api_time``, ``think_time`` and ``ttft`` (s). Among them
stand subagents: ``{type: "subagent", t, duration_ms, status, requests}``, whose times count from ``t`` where one of
them would otherwise come before it.

A request comes after the end of the one before it, and of the subagents that had ended by then: as long after as it did
when it was recorded; if the one before had not ended, as long after that one's start. A subagent starts likewise after
the request above it. One that was only launched (status "async_launched") is waited for by nobody."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from twotower_sim.errors import InputError
from twotower_sim.readers.hashes import LocalHashes
from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import (
    UNANSWERED,
    After,
    Found,
    Row,
    array,
    in_order,
    name,
    objects,
    optional_ns,
    present,
    shown,
    span_ns,
    tokens,
)

RELATIVE = True
PARTIAL_BLOCKS = "unhashed"
LAUNCHED = "async_launched"
DEEPEST = 20
JUST_NS = 1_000  # that recorded times may be off


def sniff(head: Head) -> bool:
    return isinstance(head, dict) and "requests" in head and ("block_size" in head or "hash_id_scope" in head)


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Found]:
    hashes, seen = LocalHashes(), set[Hashable]()

    def read(of: dict[str, Any]) -> Found:
        session = name(present(of, "id"), "id")
        if session in seen:
            raise InputError(f"id: session {shown(session)} was there before")
        seen.add(session)
        local = of.get("hash_id_scope", "local") == "local"
        rows = _Session(of, session, lambda ids: hashes(session if local else None, ids)).rows
        if local:
            hashes.forget()
        return rows

    return read


class _Sent(NamedTuple):
    """A request; or the last one of a subagent, which was over some time after it."""

    id: Hashable
    at_ns: int
    end_ns: int
    over_ns: int


class _Session:
    """``rows``: what is found of its requests."""

    def __init__(self, of: dict[str, Any], id: Hashable, hashes: Callable[[list[Any]], list[int]]) -> None:
        self._id, self._hashes = id, hashes
        self._block_tokens = tokens(of.get("block_size"), "block_size")
        self.rows: list[Row | str | InputError] = []
        self._stream(objects(of, "requests"), "", None, 0)

    def _stream(self, entries: list[dict[str, Any]], path: str, before: _Sent | None, from_ns: int) -> _Sent | None:
        """Requests of one agent; returns the last that was sent."""
        running: list[_Sent] = []
        for index, entry in enumerate(entries):
            within = f"{path}requests[{index}]"
            try:
                if entry.get("type") == "subagent":
                    running += self._subagent(entry, f"{within}.", before, from_ns)
                    continue
                at_ns = from_ns + span_ns(entry.get("t"), "t")
                ended = [sent for sent in running if sent.over_ns <= at_ns + JUST_NS]
                row = self._row(entry, within, at_ns, before, ended)
                self.rows.append(row if isinstance(row, str) else in_order(row))
            except InputError as error:
                self.rows.append(InputError(f"{within}: {error}"))
                continue
            if isinstance(row, Row):
                running = [sent for sent in running if sent not in ended]
                end_ns = at_ns if row.finish_ns is None else row.finish_ns
                before = _Sent(row.id, at_ns, end_ns, end_ns)
        return before

    def _subagent(self, entry: dict[str, Any], path: str, before: _Sent | None, from_ns: int) -> list[_Sent]:
        """What is waited for, if it is."""
        if path.count(".") > DEEPEST:
            raise InputError(f"subagents are nested more than {DEEPEST} deep")
        at_ns, inner = from_ns + span_ns(entry.get("t"), "t"), objects(entry, "requests")
        duration_ns = optional_ns(entry, "duration_ms", 1_000_000, "milliseconds")
        relative = any(type(of.get("t")) in (int, float) and of["t"] * 1e9 + JUST_NS < at_ns - from_ns for of in inner)
        last = self._stream(inner, path, before, at_ns if relative else from_ns)
        if last is None or last is before or entry.get("status") == LAUNCHED:
            return []
        return [last if duration_ns is None else last._replace(over_ns=max(at_ns + duration_ns, last.end_ns))]

    def _row(self, of: dict[str, Any], within: str, at_ns: int, before: _Sent | None, joined: list[_Sent]) -> Row | str:
        input_tokens, output_tokens = tokens(of.get("in"), "in", 0), tokens(of.get("out"), "out", 0)
        service_ns, first_ns = optional_ns(of, "api_time"), optional_ns(of, "ttft")
        think_ns = None if joined else optional_ns(of, "think_time")
        ids = None
        if of.get("hash_ids") is not None:
            ids = self._hashes(array(of, "hash_ids"))
        if not (input_tokens and output_tokens):
            return UNANSWERED
        return Row(
            input_tokens,
            output_tokens,
            at_ns,
            ids,
            self._id,
            id=(self._id, within),
            after=_waits(at_ns, before, joined, think_ns),
            first_ns=None if first_ns is None else at_ns + first_ns,
            finish_ns=None if service_ns is None else at_ns + service_ns,
            bound=False,
            block_tokens=self._block_tokens,
        )


def _waits(at_ns: int, before: _Sent | None, joined: list[_Sent], think_ns: int | None) -> list[After]:
    if before is None:
        return []
    if before.end_ns > at_ns + JUST_NS:
        return [After(before.id, max(at_ns - before.at_ns, 0), dispatch=True), *(After(sent.id) for sent in joined)]
    if think_ns is None:
        think_ns = max(at_ns - max(sent.over_ns for sent in (before, *joined)), 0)
    return [After(sent.id, think_ns + sent.over_ns - sent.end_ns) for sent in (before, *joined)]
