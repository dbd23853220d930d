"""Bailian JSONL (alibaba-edu/qwen-bailian-usagetraces-anon): an object a request with ``chat_id``, ``parent_chat_id``
(of the turn before; -1 where there is none), ``timestamp`` (seconds), ``input_length`` and ``output_length`` (of the
whole context) and ``hash_ids`` of blocks of 16 tokens.

A turn waits for its parent; a session is all that goes back to one first turn. A parent that is not in the file is
taken to have finished."""

from collections.abc import Callable, Hashable
from typing import Any

from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import After, Row, name, present, span_ns, tokens

PARTIAL_BLOCKS = "either"
BLOCK_TOKENS = 16


def sniff(head: Head) -> bool:
    return isinstance(head, dict) and "chat_id" in head and "input_length" in head


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Row]:
    first_turns: dict[Hashable, Hashable] = {}

    def read(of: dict[str, Any]) -> Row:
        chat, parent = name(present(of, "chat_id"), "chat_id"), name(of.get("parent_chat_id"), "parent_chat_id")
        row = Row(
            tokens(of.get("input_length"), "input_length"),
            tokens(of.get("output_length"), "output_length"),
            span_ns(of.get("timestamp"), "timestamp"),
            of.get("hash_ids"),
            session=first_turns.get(parent, chat),
            id=chat,
            after=(After(parent),) if parent in first_turns else None,
            block_tokens=BLOCK_TOKENS,
        )
        first_turns.setdefault(chat, row.session)
        return row

    return read
