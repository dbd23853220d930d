"""OpenTelemetry spans of generative AI, in three shapes: OTLP/JSON (``resourceSpans``), traces
(``{trace_id, spans: […]}``), and a span an object.

A request is a span that generates (gen_ai.operation.name), or, as vLLM's, names no operation but tells tokens. Where
one is around another (a client's around the engine's), the inner one counts. Spans of one gen_ai.conversation.id are a
session.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

from twotower_sim.errors import InputError
from twotower_sim.readers.items import Head, Item
from twotower_sim.readers.rows import Row, answered, in_order, iso_ns, name, objects, present, shown, span_ns, tokens

OPERATIONS = ("chat", "text_completion", "generate_content")
INPUTS = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")  # the second is deprecated, and vLLM's
OUTPUTS = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
SESSION = "gen_ai.conversation.id"
TTFT, LATENCY = "gen_ai.latency.time_to_first_token", "gen_ai.latency.e2e"  # vLLM's, in seconds
ERRORS = ("2", "STATUS_CODE_ERROR", "ERROR", "error")
Span = dict[str, Any]


class Request(NamedTuple):
    within: str  # where in its item it stands, as "spans[3]: "
    span: Span
    attributes: dict[str, Any]


def sniff(head: Head) -> bool:
    if not isinstance(head, dict):
        return False
    return "resourceSpans" in head or isinstance(head.get("spans"), list) or _is_span(head)


def _is_span(of: Span) -> bool:
    return "attributes" in of and ("startTimeUnixNano" in of or "start_time" in of)


def parts(rest: Iterator[Item]) -> Iterator[Item]:
    """A request each, or why it is none. Which spans are around others is known when all are read."""
    requests: list[tuple[int, Request]] = []
    parents: dict[Hashable, Hashable] = {}
    for place, value in rest:
        try:
            for request in _spans(value):
                if isinstance(request, InputError):
                    yield place, request
                    continue
                if key := _key(request.span):
                    parents[key] = _id(request.span, "parentSpanId", "parent_span_id", "parent_id")
                if _generates(request.attributes):
                    requests.append((place, request))
        except InputError as error:
            yield place, error
    around = {above for _, request in requests for above in _above(_key(request.span), parents)}
    for place, request in requests:
        yield place, "around another span" if _key(request.span) in around else request


def reader(head: dict[str, Any]) -> Callable[[Request | str], Row | str]:
    return _read


def _read(of: Request | str) -> Row | str:
    if isinstance(of, str) or _failed(of.span, of.attributes):
        return of if isinstance(of, str) else "failed"
    try:
        return answered(in_order(_row(of.span, of.attributes)))
    except InputError as error:
        raise InputError(f"{of.within}{error}") from None


# ---------------------------------------------------------------------- shapes


def _spans(item: Any) -> Iterator[Request | InputError]:
    if isinstance(item, InputError):
        raise item
    if "resourceSpans" in item:
        for i, resource in enumerate(objects(item, "resourceSpans")):
            try:
                scopes = objects(resource, f"resourceSpans[{i}].scopeSpans")
            except InputError as error:
                yield error
                continue
            for j, scope in enumerate(scopes):
                yield from _listed(scope, f"resourceSpans[{i}].scopeSpans[{j}].spans", {})
    elif "spans" in item:
        yield from _listed(item, "spans", {"trace_id": item.get("trace_id")})
    elif _is_span(item):
        yield Request("", item, _attributes(item))
    else:
        raise InputError(f"found keys {', '.join(item):.60}; expected a span: start_time, end_time, attributes")


def _listed(of: dict[str, Any], field: str, more: Span) -> Iterator[Request | InputError]:
    try:
        spans = objects(of, field)
    except InputError as error:
        yield error
        return
    for k, span in enumerate(spans):
        within = f"{field}[{k}]: "
        try:
            yield Request(within, more | span, _attributes(span))
        except InputError as error:
            yield InputError(f"{within}{error}")


def _attributes(span: Span) -> dict[str, Any]:
    """By name; OTLP/JSON writes a list of ``{key, value: {intValue: "12"}}``."""
    found = span.get("attributes") or {}
    if isinstance(found, dict):
        return found
    try:
        return {item["key"]: _plain(item.get("value") or {}) for item in found}
    except (TypeError, KeyError, AttributeError, ValueError):
        raise InputError(
            f"attributes: found {shown(found)}; expected a JSON object or a list of {{key, value: {{type: …}}}}"
        ) from None


def _plain(value: dict[str, Any]) -> Any:
    if "intValue" in value:
        return int(value["intValue"])
    return next(iter(value.values()), None)


# ---------------------------------------------------------------------- which spans


def _id(span: Span, *names: str) -> Hashable:
    """A span's identity under one of several names; spans of different traces may share an id."""
    found = next((span[name] for name in names if span.get(name)), None)
    trace = span.get("traceId") or span.get("trace_id")
    return None if found is None else (shown(trace, 99), shown(found, 99))


def _key(span: Span) -> Hashable:
    return _id(span, "spanId", "span_id", "id")


def _above(key: Hashable, parents: dict[Hashable, Hashable]) -> Iterator[Hashable]:
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
    return str(code) in ERRORS if type(code) in (int, str) else False or bool(attributes.get("error.type"))


# ---------------------------------------------------------------------- a request


def _row(span: Span, attributes: dict[str, Any]) -> Row:
    arrival_ns = _time_ns(span, "startTimeUnixNano", "start_time")
    ttft, latency = attributes.get(TTFT), attributes.get(LATENCY)
    if latency is None:
        finish_ns = _time_ns(span, "endTimeUnixNano", "end_time")
    else:
        finish_ns = arrival_ns + span_ns(latency, LATENCY)
    return Row(
        _tokens(attributes, INPUTS),
        _tokens(attributes, OUTPUTS),
        arrival_ns,
        session=name(attributes.get(SESSION), SESSION),
        first_ns=None if ttft is None else arrival_ns + span_ns(ttft, TTFT),
        finish_ns=finish_ns,
    )


def _tokens(attributes: dict[str, Any], names: tuple[str, ...]) -> int:
    field = next((name for name in names if attributes.get(name) is not None), names[0])
    if attributes.get(field) is None:
        raise InputError(f"attributes: {' or '.join(names)} is missing")
    return tokens(attributes[field], field, 0)


def _time_ns(span: Span, nanoseconds: str, iso: str) -> int:
    """Since 1970, from whichever of the two the span has."""
    if (found := span.get(nanoseconds)) is not None:
        text = isinstance(found, str) and len(found) < 20 and found.isascii() and found.isdigit()
        return span_ns(int(found) if text else found, nanoseconds, 1, "nanoseconds")
    return iso_ns(present(span, iso), iso)
