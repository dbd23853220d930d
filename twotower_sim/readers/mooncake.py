"""Mooncake JSONL (kvcache-ai/Mooncake, FAST'25): one object a line with ``timestamp`` (ms since the trace's start),
``input_length`` and ``output_length`` (tokens) and, in every row or in none, ``hash_ids``: a whole number for each
block of the prompt, equal where prompts are equal up to there. Blocks have 512 tokens, or what else fits all rows.

With ``session_id`` (AIPerf, Dynamo) a row is a turn: it comes ``delay`` ms after the end of the one before, or else at
its ``timestamp`` but not before that end. Other keys are allowed."""

from collections.abc import Callable
from typing import Any

from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Row, present, span_ns, tokens


def sniff(head: Head) -> bool:
    return isinstance(head, dict) and {"input_length", "output_length"} <= head.keys() and _MARKS.isdisjoint(head)


_MARKS = {"chat_id", "request_id", "schema"}


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Row]:
    return _row


def _row(of: dict[str, Any]) -> Row:
    session, delay, time = of.get("session_id"), of.get("delay"), of.get("timestamp")
    if time is None and (session is None or delay is None):
        present(of, "timestamp")
    return Row(
        tokens(present(of, "input_length"), "input_length"),
        tokens(present(of, "output_length"), "output_length"),
        None if time is None else span_ns(time, "timestamp", 1e6, "milliseconds"),
        of.get("hash_ids"),
        session,
        None if delay is None else span_ns(delay, "delay", 1e6, "milliseconds"),
    )
