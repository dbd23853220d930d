"""Mooncake JSONL (kvcache-ai/Mooncake, FAST'25): one object a line with ``timestamp`` (ms since the trace's start),
``input_length`` and ``output_length`` (tokens) and, in every row or in none, ``hash_ids``: a whole number for each
block of the prompt, equal where prompts are equal up to there. Blocks have 512 tokens, or what else fits all rows.
Other keys are allowed."""

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from twotower_sim.errors import InputError
from twotower_sim.requests import LATEST_NS, MOST_TOKENS, Prefixes, Requests

LATEST_MS = LATEST_NS // 10**6
HASH_TOKENS = (512, 16, 32, 64, 128, 256, 1024, 2048, 4096)  # of a hashed block


def sniff(first: str) -> bool:
    return first.lstrip().startswith("{") and '"input_length"' in first


def read(lines: Iterator[str], path: Path) -> Requests:
    times, inputs, outputs, numbers = [], [], [], []
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
        numbers.append(number)
        if (ids := row.get("hash_ids")) is not None:
            try:
                hashes.fromlist(ids)
            except (TypeError, OverflowError):
                raise InputError(f"{path}:{number}: hash_ids: expected a list of whole numbers of 64 bits") from None
            first.append(len(hashes))
    arrival_ns = np.rint(np.array(times, float) * 1e6).astype(np.int64)
    input_tokens = np.array(inputs)
    prefixes = _prefixes(np.array(first), np.array(hashes), input_tokens, numbers, path)
    return Requests(arrival_ns, input_tokens, np.array(outputs), prefixes)


def _prefixes(
    first: np.ndarray, hashes: np.ndarray, input_tokens: np.ndarray, numbers: list[int], path: Path
) -> Prefixes | None:
    if len(first) == 1:
        return None
    if len(first) != len(numbers) + 1:
        raise InputError(f"{path}: hash_ids stand in {len(first) - 1} of {len(numbers)} rows; expected all or none")
    counts = np.diff(first)
    for size in HASH_TOKENS:
        if (counts == -(-input_tokens // size)).all():
            return Prefixes(first, hashes, size)
    size = HASH_TOKENS[0]
    expected = -(-input_tokens // size)
    at = int((counts != expected).argmax())
    raise InputError(
        f"{path}:{numbers[at]}: hash_ids: found {counts[at]} for {input_tokens[at]} tokens; expected one for each "
        f"block of {size}, {expected[at]} (or of {', '.join(map(str, HASH_TOKENS[1:]))} in all rows)"
    )


def _what(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return f"not a JSON object: {error}"


def _wrong(row: dict[str, Any]) -> str:
    for field in ("input_length", "output_length"):
        if type(row[field]) is not int or not 0 < row[field] <= MOST_TOKENS:
            return f"{field}: found {row[field]!r}; expected a whole number of tokens from 1 to {MOST_TOKENS}"
    return f"timestamp: found {row['timestamp']!r}; expected milliseconds from 0 to {LATEST_MS}"
