"""AIBrix' workloads: an object an instant with ``timestamp`` (ms) and ``requests``, each with ``prompt_length`` and
``output_length`` (or "Prompt Length" and "Output Length") and, where there is one, ``session_id``."""

from collections.abc import Callable
from functools import partial
from typing import Any

from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Found, Row, each, name, objects, present, span_ns, tokens

_NAMES = (("prompt_length", "Prompt Length"), ("output_length", "Output Length"))


def sniff(head: Head) -> bool:
    return isinstance(head, dict) and {"timestamp", "requests"} <= head.keys() and "block_size" not in head


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Found]:
    return _read


def _read(of: dict[str, Any]) -> Found:
    time_ns = span_ns(of.get("timestamp"), "timestamp", 1_000_000, "milliseconds")
    parts = ((f"requests[{index}]", part) for index, part in enumerate(objects(of, "requests")))
    return each(parts, partial(_row, time_ns))


def _row(time_ns: int, of: dict[str, Any]) -> Row:
    input_, output = (next((name for name in names if name in of), names[0]) for names in _NAMES)
    return Row(
        tokens(present(of, input_), input_),
        tokens(present(of, output), output),
        time_ns,
        session=name(of.get("session_id"), "session_id"),
    )
