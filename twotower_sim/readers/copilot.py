"""GitHub Copilot sessions (Azure/AzurePublicDataset, 2026): an object a session with ``session_id`` and ``turns`` of
``llm_calls``, each with ``timestamp`` (ISO 8601), ``duration_ms``, ``tokens``: prompt (all of it) and completion, and
``status_code``. Calls come one after the other, or beside each other as their times say."""

from collections.abc import Callable
from functools import partial
from typing import Any

from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import (
    Found,
    Row,
    answered,
    each,
    iso_ns,
    name,
    objects,
    optional_ns,
    present,
    section,
    tokens,
)


def sniff(head: Head) -> bool:
    turns = head.get("turns") if isinstance(head, dict) else None
    return isinstance(turns, list) and any(isinstance(turn, dict) and "llm_calls" in turn for turn in turns)


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Found]:
    return _read


def _read(of: dict[str, Any]) -> Found:
    calls = [
        (f"turns[{i}].llm_calls[{j}]", call)
        for i, turn in enumerate(objects(of, "turns"))
        for j, call in enumerate(objects(turn, f"turns[{i}].llm_calls"))
    ]
    return each(calls, partial(_row, name(present(of, "session_id"), "session_id")))


def _row(session: Any, of: dict[str, Any]) -> Row | str:
    if of.get("status_code") not in (None, 200, "200"):
        return "failed"
    arrival_ns, of_tokens = iso_ns(present(of, "timestamp"), "timestamp"), section(of, "tokens")
    input_tokens, output_tokens = (
        tokens(present(of_tokens, f"tokens.{field}"), f"tokens.{field}", 0) for field in ("prompt", "completion")
    )
    took_ns = optional_ns(of, "duration_ms", 1_000_000, "milliseconds")
    finish_ns = None if took_ns is None else arrival_ns + took_ns
    return answered(Row(input_tokens, output_tokens, arrival_ns, session=session, finish_ns=finish_ns))
