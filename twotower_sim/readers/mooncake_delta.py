"""Mooncake JSONL of sessions in which ``input_length`` and ``hash_ids`` are of the new tokens of a turn only (Dynamo's
mooncake-delta); its prompt is these after all that came before in its session. Nothing in the file says so, therefore
it is read only if asked for."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import count
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.readers import mooncake
from twotower_sim.readers.hashes import LocalHashes
from twotower_sim.readers.items import Head, Item
from twotower_sim.readers.rows import Row
from twotower_sim.readers.table import HASH_TOKENS
from twotower_sim.requests import MOST_TOKENS

PARTIAL_BLOCKS = "unhashed"
Sized = tuple[dict[str, Any], int]
"""A row, and of how many tokens the hashed blocks are."""


def sniff(head: Head) -> bool:
    return False


def parts(rest: Iterator[Item]) -> Iterator[Item]:
    items = list(rest)
    rows = [(value["input_length"], len(value["hash_ids"])) for _, value in items if _hashed(value)]
    size = max(HASH_TOKENS, key=lambda size: sum(-(-length // size) == ids for length, ids in rows))
    for place, value in items:
        yield place, value if isinstance(value, InputError) else (value, size)


def _hashed(value: Any) -> bool:
    return (
        isinstance(value, dict) and type(value.get("input_length")) is int and isinstance(value.get("hash_ids"), list)
    )


def reader(head: dict[str, Any]) -> Callable[[Sized], Row]:
    context: dict[Hashable, tuple[int, list[int]]] = {}  # of each session: its tokens, the ids of their blocks
    chained, new = LocalHashes(), count(-1, -1)

    def read(sized: Sized) -> Row:
        value, size = sized
        row = mooncake.read(value)
        before, blocks = context.get(row.session, (0, [])) if row.session is not None else (0, [])
        length = before + row.input_tokens
        if length + row.output_tokens > MOST_TOKENS:
            raise InputError(f"input_length: the session comes to {length} tokens; at most {MOST_TOKENS} are replayed")
        if row.hash_ids is not None:
            told = _checked(row.hash_ids, row.input_tokens, size)
            blocks = [*blocks, *(told[: length // size] if not before else ())]
            blocks += [next(new) for _ in range(length // size - len(blocks))]  # answers are in them
        if row.session is not None:
            context[row.session] = length + row.output_tokens, blocks
        hashes = None if row.hash_ids is None else chained(None, blocks)
        return row._replace(input_tokens=length, hash_ids=hashes, block_tokens=size)

    return read


def _checked(ids: Sequence[int], tokens: int, size: int) -> Sequence[int]:
    if not isinstance(ids, list):
        raise InputError("hash_ids: expected a list of whole numbers of 64 bits")
    if len(ids) != (expected := -(-tokens // size)):
        raise InputError(
            f"hash_ids: found {len(ids)} for {tokens} new tokens; expected one for each block of {size}, {expected}"
        )
    return ids
