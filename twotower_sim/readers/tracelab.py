"""TraceLab's JSONL: an object a round of an agent with ``session_id``, ``input_tokens_total``, ``output_tokens`` and
``timing_events``: ``{event_type, timestamp}`` (ISO 8601). A round is sent at its latest user_message or tool_result,
and has finished at its latest text, reasoning or tool_call."""

from collections.abc import Callable
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Row, answered, iso_ns, name, objects, present, tokens

SENT, MADE = ("user_message", "tool_result"), ("text", "reasoning", "tool_call")


def sniff(head: Head) -> bool:
    return isinstance(head, dict) and {"input_tokens_total", "timing_events"} <= head.keys()


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Row | str]:
    return _read


def _read(of: dict[str, Any]) -> Row | str:
    events = objects(of, "timing_events")
    sent, made = ([_time_ns(event) for event in events if event.get("event_type") in types] for types in (SENT, MADE))
    if not sent and not made:
        raise InputError(f"timing_events: found none of {', '.join(SENT + MADE)}")
    arrival_ns = max(sent) if sent else min(made)
    input_tokens, output_tokens = (
        tokens(present(of, field), field, 0) for field in ("input_tokens_total", "output_tokens")
    )
    finish_ns = max(*made, arrival_ns) if made else None
    session = name(of.get("session_id"), "session_id")
    return answered(Row(input_tokens, output_tokens, arrival_ns, session=session, finish_ns=finish_ns))


def _time_ns(event: dict[str, Any]) -> int:
    return iso_ns(present(event, "timing_events.timestamp"), "timing_events.timestamp")
