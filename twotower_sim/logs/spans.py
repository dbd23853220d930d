"""OpenTelemetry spans of generative AI, in three shapes: OTLP/JSON (``resourceSpans``), traces
(``{trace_id, spans: […]}``), and a span an object.

A request is a span that generates (gen_ai.operation.name), or, as vLLM's, names no operation but tells tokens. Where
one is around another (a client's around the engine's), the inner one counts.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.logs.entries import Entry
from twotower_sim.logs.fields import Row, present, span_ns, tokens

OPERATIONS = ("chat", "text_completion", "generate_content")
INPUTS = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")  # the second is deprecated, and vLLM's
OUTPUTS = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
TTFT, LATENCY = "gen_ai.latency.time_to_first_token", "gen_ai.latency.e2e"  # vLLM's, in seconds
ERRORS = (2, "2", "STATUS_CODE_ERROR", "ERROR", "error")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
Span = dict[str, Any]


def sniff(first: Any) -> bool:
    if not isinstance(first, dict):
        return False
    return "resourceSpans" in first or isinstance(first.get("spans"), list) or _is_span(first)


def _is_span(of: Span) -> bool:
    return "attributes" in of and ("startTimeUnixNano" in of or "start_time" in of)


def read(entries: Iterable[Entry]) -> Iterator[Row | str]:
    """Rows, or why a request is none."""
    spans = [
        (where, span, _attributes(span, where)) for where, entry in entries for where, span in _spans(entry, where)
    ]
    requests = [item for item in spans if _generates(item[2])]
    parents = {
        key: _id(span, "parentSpanId", "parent_span_id", "parent_id") for _, span, _ in spans if (key := _key(span))
    }
    around = {above for _, span, _ in requests for above in _above(_key(span), parents)}
    for where, span, attributes in requests:
        if _key(span) in around:
            yield "around another span"
        elif _failed(span, attributes):
            yield "failed"
        else:
            yield _row(span, attributes, where)


# ---------------------------------------------------------------------- shapes


def _spans(entry: Span, where: str) -> Iterator[tuple[str, Span]]:
    if "resourceSpans" in entry:
        for i, resource in enumerate(_list(entry, "resourceSpans", where)):
            for j, scope in enumerate(_list(resource, "scopeSpans", f"{where}: resourceSpans[{i}]")):
                at = f"{where}: resourceSpans[{i}].scopeSpans[{j}]"
                yield from ((f"{at}.spans[{k}]", span) for k, span in enumerate(_list(scope, "spans", at)))
    elif "spans" in entry:
        for k, span in enumerate(_list(entry, "spans", where)):
            yield f"{where}: spans[{k}]", {"trace_id": entry.get("trace_id")} | span
    elif _is_span(entry):
        yield where, entry
    else:
        raise InputError(
            f"{where}: found keys {', '.join(entry):.60}; expected a span: start_time, end_time, attributes"
        )


def _list(of: Span, field: str, where: str) -> list[Span]:
    items = of.get(field, [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{where}: {field}: found {items!r:.60}; expected a list of JSON objects")
    return items


def _attributes(span: Span, where: str) -> dict[str, Any]:
    """By name; OTLP/JSON writes a list of ``{key, value: {intValue: "12"}}``."""
    found = span.get("attributes") or {}
    if isinstance(found, dict):
        return found
    try:
        return {item["key"]: _plain(item.get("value") or {}) for item in found}
    except (TypeError, KeyError, AttributeError, ValueError):
        raise InputError(
            f"{where}: attributes: found {found!r:.60}; expected a JSON object or a list of {{key, value: {{type: …}}}}"
        ) from None


def _plain(value: dict[str, Any]) -> Any:
    if "intValue" in value:
        return int(value["intValue"])
    return next(iter(value.values()), None)


# ---------------------------------------------------------------------- which spans


def _id(span: Span, *names: str) -> tuple[Any, Any] | None:
    """A span's identity under one of several names; spans of different traces may share an id."""
    found = next((span[name] for name in names if span.get(name)), None)
    trace = span.get("traceId") or span.get("trace_id")
    return None if found is None else (str(trace), str(found))


def _key(span: Span) -> tuple[Any, Any] | None:
    return _id(span, "spanId", "span_id", "id")


def _above(key: Any, parents: dict) -> Iterator[Any]:
    """The spans around one; a loop ends where it closes."""
    seen = {key}
    while (key := parents.get(key)) is not None and key not in seen:
        seen.add(key)
        yield key


def _generates(attributes: dict[str, Any]) -> bool:
    operation = attributes.get("gen_ai.operation.name")
    if operation is None:
        return any(name in attributes for name in OUTPUTS)
    return operation in OPERATIONS


def _failed(span: Span, attributes: dict[str, Any]) -> bool:
    status = span.get("status")
    code = status.get("code", status.get("status_code")) if isinstance(status, dict) else status
    return code in ERRORS or bool(attributes.get("error.type"))


# ---------------------------------------------------------------------- a request


def _row(span: Span, attributes: dict[str, Any], where: str) -> Row:
    arrival_ns = _time_ns(span, "startTimeUnixNano", "start_time", where)
    ttft, latency = attributes.get(TTFT), attributes.get(LATENCY)
    if latency is None:
        finish_ns = _time_ns(span, "endTimeUnixNano", "end_time", where)
    else:
        finish_ns = arrival_ns + span_ns(latency, LATENCY, where)
    return Row(
        where,
        arrival_ns,
        None if ttft is None else arrival_ns + span_ns(ttft, TTFT, where),
        finish_ns,
        _tokens(attributes, INPUTS, where),
        _tokens(attributes, OUTPUTS, where),
    )


def _tokens(attributes: dict[str, Any], names: tuple[str, ...], where: str) -> int:
    name = next((name for name in names if attributes.get(name) is not None), names[0])
    if attributes.get(name) is None:
        raise InputError(f"{where}: attributes: {' or '.join(names)} is missing")
    return tokens(attributes[name], name, where)


def _time_ns(span: Span, nanoseconds: str, iso: str, where: str) -> int:
    """Since 1970, from whichever of the two the span has."""
    if (found := span.get(nanoseconds)) is not None:
        whole = int(found) if isinstance(found, str) and found.isascii() and found.isdigit() else found
        return span_ns(whole, nanoseconds, where, 1, "nanoseconds")
    found = present(span, iso, where)
    try:
        time = datetime.fromisoformat(found)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {iso}: found {found!r:.60}; expected YYYY-MM-DDTHH:MM:SS.ffffffZ") from None
    since = (time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH
    return since // _MICROSECOND * 1000
