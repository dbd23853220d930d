"""APEX' JSONL: an object a request with ``ContextTokens``, ``GeneratedTokens`` and ``StartTimeOffset`` (ns)."""

from collections.abc import Callable
from typing import Any

from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Row, span_ns, tokens


def sniff(head: Head) -> bool:
    return isinstance(head, dict) and {"ContextTokens", "GeneratedTokens", "StartTimeOffset"} <= head.keys()


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Row]:
    return lambda of: Row(
        tokens(of.get("ContextTokens"), "ContextTokens"),
        tokens(of.get("GeneratedTokens"), "GeneratedTokens"),
        span_ns(of.get("StartTimeOffset"), "StartTimeOffset", 1, "nanoseconds"),
    )
