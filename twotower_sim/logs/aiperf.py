"""AIPerf's profile_export.jsonl: an object a request with ``metadata`` (request_start_ns, benchmark_phase,
was_cancelled), ``metrics`` (input_sequence_length, output_sequence_length, request_latency and, where answers were
streamed, time_to_first_token; each ``{value, unit}``) and ``error``."""

from collections.abc import Iterable, Iterator
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.logs.entries import Entry
from twotower_sim.logs.fields import Row, present, section, span_ns, tokens

UNITS_NS = {"ns": 1.0, "us": 1e3, "ms": 1e6, "sec": 1e9, "s": 1e9}


def sniff(first: Any) -> bool:
    return isinstance(first, dict) and "metadata" in first and ("metrics" in first or "error" in first)


def read(entries: Iterable[Entry]) -> Iterator[Row | str]:
    """Rows, or why a request is none."""
    for where, record in entries:
        about = section(record, "metadata", where)
        if about.get("benchmark_phase", "profiling") != "profiling":
            yield "warm-up"
        elif about.get("was_cancelled"):
            yield "cancelled"
        elif record.get("error"):
            yield "failed"
        else:
            yield _row(about, section(record, "metrics", where), where)


def _row(about: dict[str, Any], metrics: dict[str, Any], where: str) -> Row:
    arrival_ns = span_ns(
        present(about, "metadata.request_start_ns", where), "metadata.request_start_ns", where, 1, "ns"
    )
    first_ns = _duration_ns(metrics, "time_to_first_token", where) if "time_to_first_token" in metrics else None
    return Row(
        where,
        arrival_ns,
        None if first_ns is None else arrival_ns + first_ns,
        arrival_ns + _duration_ns(metrics, "request_latency", where),
        *(
            tokens(_value(metrics, name, where), name, where)
            for name in ("input_sequence_length", "output_sequence_length")
        ),
    )


def _value(metrics: dict[str, Any], name: str, where: str) -> Any:
    return present(section(metrics, f"metrics.{name}", where), f"metrics.{name}.value", where)


def _duration_ns(metrics: dict[str, Any], name: str, where: str) -> int:
    field = f"metrics.{name}"
    unit = section(metrics, field, where).get("unit", "ms")
    if unit not in UNITS_NS:
        raise InputError(f"{where}: {field}.unit: found {unit!r:.60}; allowed: {', '.join(UNITS_NS)}")
    return span_ns(_value(metrics, name, where), f"{field}.value", where, UNITS_NS[unit], unit)
