"""Dynamo's agentic Mooncake, version 2: a line ``{"schema": "dynamo.agentic_mooncake", "version": 2, "block_size": …,
"hash_id_scope": "local"}`` and then an object a request with ``request_id``, ``play_id``, ``input_length``,
``output_length``, ``hash_ids``, ``not_before_ms`` (since the trace's start) and ``dependencies``: requests that it
waits for, each ``{request_id, trigger: dispatch | completion, delay_ms}``. Local ids mean something in their play only.
"""

from collections.abc import Callable
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.readers.hashes import LocalHashes
from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import (
    After,
    Found,
    Row,
    array,
    name,
    objects,
    optional_ns,
    present,
    shown,
    span_ns,
    tokens,
)

SCHEMA, VERSION = "dynamo.agentic_mooncake", 2
PARTIAL_BLOCKS = "either"
TRIGGERS = {"dispatch": True, "completion": False}


def sniff(head: Head) -> bool:
    return isinstance(head, dict) and head.get("schema") == SCHEMA


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Found]:
    if head.get("schema") != SCHEMA or head.get("version") != VERSION:
        found = f"{shown(head.get('schema'))} {shown(head.get('version'))}"
        raise InputError(f"schema and version: found {found}; expected {SCHEMA!r} {VERSION}")
    size = tokens(head.get("block_size"), "block_size")
    local, hashes = head.get("hash_id_scope") == "local", LocalHashes()

    def read(of: dict[str, Any]) -> Found:
        if of.get("schema") == SCHEMA:
            if of.get("block_size") != size:
                raise InputError(f"block_size: found {shown(of.get('block_size'))}; the file began with {size}")
            return []
        play, ids = name(present(of, "play_id"), "play_id"), of.get("hash_ids")
        if ids is not None:
            ids = hashes(play if local else None, array(of, "hash_ids"))
        return Row(
            tokens(of.get("input_length"), "input_length"),
            tokens(of.get("output_length"), "output_length"),
            span_ns(of.get("not_before_ms"), "not_before_ms", 1_000_000, "milliseconds"),
            ids,
            play,
            id=name(present(of, "request_id"), "request_id"),
            after=[_after(wait) for wait in objects(of, "dependencies")],
            block_tokens=size,
        )

    return read


def _after(of: dict[str, Any]) -> After:
    trigger = present(of, "dependencies.trigger")
    if not isinstance(trigger, str) or trigger not in TRIGGERS:
        raise InputError(f"dependencies.trigger: found {shown(trigger)}; allowed: {', '.join(TRIGGERS)}")
    delay_ns = optional_ns(of, "dependencies.delay_ms", 1_000_000, "milliseconds")
    on = name(present(of, "dependencies.request_id"), "dependencies.request_id")
    return After(on, delay_ns or 0, TRIGGERS[trigger])
