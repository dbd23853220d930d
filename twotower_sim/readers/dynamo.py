"""Dynamo's request traces (dynamo.request.trace.v1), plain or as ``{"event": …}``: of its events those of type
request_end are requests, with ``request``: request_id, output_tokens, request_received_ms, total_time_ms and
``replay``: trace_block_size, input_length, input_sequence_hashes. Those of one agent_context.session_id are a session.
"""

from collections.abc import Callable
from typing import Any

from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Found, Row, array, name, optional_ns, present, section, span_ns, tokens

SCHEMA = "dynamo.request.trace"
PARTIAL_BLOCKS = "either"
_MS = "milliseconds"


def sniff(head: Head) -> bool:
    return isinstance(head, dict) and str(_event(head).get("schema")).startswith(SCHEMA)


def _event(of: dict[str, Any]) -> dict[str, Any]:
    return section(of, "event") if isinstance(of.get("event"), dict) else of


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Found]:
    return _read


def _read(item: dict[str, Any]) -> Found:
    event = _event(item)
    if present(event, "event_type") != "request_end":
        return []
    request = section(event, "request")
    replay = section(request, "request.replay")
    received_ns = span_ns(request.get("request_received_ms"), "request.request_received_ms", 1_000_000, _MS)
    took_ns = optional_ns(request, "request.total_time_ms", 1_000_000, _MS)
    agent = event.get("agent_context")
    return Row(
        tokens(replay.get("input_length"), "request.replay.input_length"),
        tokens(request.get("output_tokens"), "request.output_tokens"),
        received_ns,
        array(replay, "input_sequence_hashes") if replay.get("input_sequence_hashes") is not None else None,
        name(agent.get("session_id"), "agent_context.session_id") if isinstance(agent, dict) else None,
        id=name(present(request, "request.request_id"), "request.request_id"),
        finish_ns=None if took_ns is None else received_ns + took_ns,
        block_tokens=tokens(replay.get("trace_block_size"), "request.replay.trace_block_size"),
    )
