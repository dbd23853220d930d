"""Mooncake JSONL (kvcache-ai/Mooncake, FAST'25): one object a line with ``timestamp`` (ms since the trace's start),
``input_length`` and ``output_length`` (tokens); other keys, such as ``hash_ids``, are allowed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from twotower_sim.errors import InputError
from twotower_sim.requests import LATEST_NS, MOST_TOKENS, Requests

LATEST_MS = LATEST_NS // 10**6


def sniff(first: str) -> bool:
    return first.lstrip().startswith("{") and '"input_length"' in first


def read(lines: Iterator[str], path: Path) -> Requests:
    times, inputs, outputs = [], [], []
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
    return Requests(np.rint(np.array(times, float) * 1e6).astype(np.int64), np.array(inputs), np.array(outputs))


def _what(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return f"not a JSON object: {error}"


def _wrong(row: dict[str, Any]) -> str:
    for field in ("input_length", "output_length"):
        if type(row[field]) is not int or not 0 < row[field] <= MOST_TOKENS:
            return f"{field}: found {row[field]!r}; expected a whole number of tokens from 1 to {MOST_TOKENS}"
    return f"timestamp: found {row['timestamp']!r}; expected milliseconds from 0 to {LATEST_MS}"
