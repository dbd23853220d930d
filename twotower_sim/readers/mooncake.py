"""Mooncake JSONL (kvcache-ai/Mooncake, FAST'25): one object a line with ``timestamp`` (ms since the trace's start),
``input_length`` and ``output_length`` (tokens) and, in every row or in none, ``hash_ids``: a whole number for each
block of the prompt, equal where prompts are equal up to there. Blocks have 512 tokens, or what else fits all rows.

With ``session_id`` (AIPerf, Dynamo) a row is a turn: it comes ``delay`` ms after the end of the one before, or else at
its ``timestamp`` but not before that end. Other keys are allowed."""

from collections.abc import Callable
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Row, name, span_ns, tokens

TEXTS = ("text_input", "messages", "payload")
_LENGTHS = {"input_length", "output_length"}
_TIMES = {"timestamp", "created_time", "delay", "delay_ms", "session_id"}
_MS = "milliseconds"
_OTHERS = {"chat_id", "schema", "event", "requests", "turns"}


def sniff(head: Head) -> bool:
    if not isinstance(head, dict) or not _OTHERS.isdisjoint(head):
        return False
    return head.keys() >= _LENGTHS or (not _TIMES.isdisjoint(head) and any(text in head for text in TEXTS))


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Row]:
    return read


def read(of: dict[str, Any]) -> Row:
    time, session, delay = of.get("timestamp"), of.get("session_id"), of.get("delay")
    time = of.get("created_time") if time is None else time
    delay = of.get("delay_ms") if delay is None else delay
    if "input_length" not in of and (text := next((text for text in TEXTS if text in of), None)):
        raise InputError(f"input_length is missing: the row has {text}, and to count its tokens takes a tokenizer")
    return Row(
        tokens(of.get("input_length"), "input_length"),
        tokens(of.get("output_length"), "output_length"),
        span_ns(time, "timestamp", 1_000_000, _MS) if time is not None or session is None or delay is None else None,
        of.get("hash_ids"),
        None if session is None else name(session, "session_id"),
        None if delay is None else span_ns(delay, "delay", 1_000_000, _MS),
    )
