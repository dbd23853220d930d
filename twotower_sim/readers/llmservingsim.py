"""LLMServingSim's JSONL: an object a request with ``input_toks``, ``output_toks`` and ``arrival_time_ns``, or a session
with ``session_id``, ``arrival_time_ns`` and ``sub_requests``, one after the other's ``tool_duration_ns``."""

from collections.abc import Callable
from typing import Any

from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Found, Row, name, objects, optional_ns, present, span_ns, tokens


def sniff(head: Head) -> bool:
    return isinstance(head, dict) and "arrival_time_ns" in head and ("input_toks" in head or "sub_requests" in head)


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Found]:
    return _read


def _read(of: dict[str, Any]) -> Found:
    arrival_ns = span_ns(of.get("arrival_time_ns"), "arrival_time_ns", 1, "nanoseconds")
    if "sub_requests" not in of:
        return _row(of, "", arrival_ns)
    session = name(present(of, "session_id"), "session_id")
    rows: list[Row] = []
    tool_ns = None
    for index, part in enumerate(objects(of, "sub_requests")):
        row = _row(part, f"sub_requests[{index}].", None if rows else arrival_ns)
        rows.append(row._replace(session=session, delay_ns=(tool_ns or 0) if rows else None))
        tool_ns = optional_ns(part, f"sub_requests[{index}].tool_duration_ns", 1, "nanoseconds")
    return list(rows)


def _row(of: dict[str, Any], within: str, arrival_ns: int | None) -> Row:
    input_tokens, output_tokens = (
        tokens(present(of, f"{within}{field}"), f"{within}{field}") for field in ("input_toks", "output_toks")
    )
    return Row(input_tokens, output_tokens, arrival_ns)
