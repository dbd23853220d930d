"""AIPerf's profile_export.jsonl: an object a request with ``metadata`` (request_start_ns, x_correlation_id or
conversation_id, benchmark_phase, was_cancelled), ``metrics`` (input_sequence_length, output_sequence_length,
request_latency and, where answers were streamed, time_to_first_token; each ``{value, unit}``) and ``error``."""

from collections.abc import Callable
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import UNITS_NS, Row, answered, name, present, section, shown, span_ns, tokens

_UNITS_NS = UNITS_NS | {"sec": 10**9}
_SESSIONS = ("x_correlation_id", "conversation_id")  # one for each time that a conversation was held; of its text


def sniff(head: Head) -> bool:
    return isinstance(head, dict) and "metadata" in head and ("metrics" in head or "error" in head)


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Row | str]:
    return _read


def _read(record: dict[str, Any]) -> Row | str:
    about = section(record, "metadata")
    if about.get("benchmark_phase", "profiling") != "profiling":
        return "warm-up"
    if about.get("was_cancelled"):
        return "cancelled"
    if record.get("error"):
        return "failed"
    metrics = section(record, "metrics")
    arrival_ns = span_ns(about.get("request_start_ns"), "metadata.request_start_ns", 1, "ns")
    session = next((field for field in _SESSIONS if about.get(field) is not None), _SESSIONS[1])
    finish_ns = arrival_ns + _duration_ns(metrics, "request_latency")
    input_tokens, output_tokens = (
        tokens(_value(metrics, field), field, 0) for field in ("input_sequence_length", "output_sequence_length")
    )
    return answered(
        Row(
            input_tokens,
            output_tokens,
            arrival_ns,
            session=name(about.get(session), f"metadata.{session}"),
            first_ns=arrival_ns + _duration_ns(metrics, "time_to_first_token")
            if "time_to_first_token" in metrics
            else None,
            finish_ns=finish_ns,
        )
    )


def _value(metrics: dict[str, Any], field: str) -> Any:
    return present(section(metrics, f"metrics.{field}"), f"metrics.{field}.value")


def _duration_ns(metrics: dict[str, Any], field: str) -> int:
    unit = section(metrics, f"metrics.{field}").get("unit", "ms")
    if not isinstance(unit, str) or unit not in _UNITS_NS:
        raise InputError(f"metrics.{field}.unit: found {shown(unit)}; allowed: ns, us, ms, sec, s")
    return span_ns(_value(metrics, field), f"metrics.{field}.value", _UNITS_NS[unit], unit)
