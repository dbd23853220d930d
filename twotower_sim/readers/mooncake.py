"""Mooncake JSONL (kvcache-ai/Mooncake, FAST'25): one object a line with ``timestamp`` (ms since the trace's start),
``input_length`` and ``output_length`` (tokens) and, in every row or in none, ``hash_ids``: a whole number for each 512
tokens of the prompt, equal where prompts are equal up to there. Other keys are allowed."""

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from twotower_sim.errors import InputError
from twotower_sim.requests import LATEST_NS, MOST_TOKENS, Prefixes, Requests

LATEST_MS = LATEST_NS // 10**6
HASH_TOKENS = 512
LARGEST_HASH = 2**31 - 1


def sniff(first: str) -> bool:
    return first.lstrip().startswith("{") and '"input_length"' in first


def read(lines: Iterator[str], path: Path) -> Requests:
    times, inputs, outputs = [], [], []
    first, hashes = array("q", [0]), array("q")
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            row = orjson.loads(line)
            time, input_, output = row["timestamp"], row["input_length"], row["output_length"]
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: {_what(error)}") from None
        whole = type(input_) is type(output) is int and 0 < input_ <= MOST_TOKENS and 0 < output <= MOST_TOKENS
        if not (whole and type(time) in (int, float) and 0 <= time <= LATEST_MS):
            raise InputError(f"{path}:{number}: {_wrong(row)}")
        times.append(time)
        inputs.append(input_)
        outputs.append(output)
        if (ids := row.get("hash_ids")) is not None:
            _append(hashes, ids, -(-input_ // HASH_TOKENS), f"{path}:{number}")
            first.append(len(hashes))
    if len(first) not in (1, len(times) + 1):
        raise InputError(f"{path}: hash_ids stand in {len(first) - 1} of {len(times)} rows; expected all or none")
    prefixes = Prefixes(np.array(first), np.array(hashes), HASH_TOKENS) if len(first) > 1 else None
    arrival_ns = np.rint(np.array(times, float) * 1e6).astype(np.int64)
    return Requests(arrival_ns, np.array(inputs), np.array(outputs), prefixes)


def _append(hashes: array, ids: Any, expected: int, where: str) -> None:
    if not isinstance(ids, list) or len(ids) != expected:
        found = f"{len(ids)} of them" if isinstance(ids, list) else repr(ids)
        raise InputError(f"{where}: hash_ids: found {found}; expected one for each {HASH_TOKENS} tokens, {expected}")
    try:
        hashes.extend(ids)
    except (TypeError, OverflowError):
        raise InputError(f"{where}: hash_ids: expected whole numbers from 0 to {LARGEST_HASH}") from None


def _what(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return f"not a JSON object: {error}"


def _wrong(row: dict[str, Any]) -> str:
    for field in ("input_length", "output_length"):
        if type(row[field]) is not int or not 0 < row[field] <= MOST_TOKENS:
            return f"{field}: found {row[field]!r}; expected a whole number of tokens from 1 to {MOST_TOKENS}"
    return f"timestamp: found {row['timestamp']!r}; expected milliseconds from 0 to {LATEST_MS}"
