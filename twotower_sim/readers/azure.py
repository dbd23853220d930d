"""Azure LLM inference traces (Azure/AzurePublicDataset, 2023 and 2024): CSV with the columns TIMESTAMP
("YYYY-MM-DD HH:MM:SS.fffffff", the zone, if any, UTC), ContextTokens and GeneratedTokens."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from twotower_sim.errors import InputError
from twotower_sim.requests import MOST_TOKENS, Requests

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_STAMP = re.compile(r"(19|20|21)\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?", re.ASCII)
_DIGITS = re.compile(r"[0-9 ]*")


def sniff(first: str) -> bool:
    try:
        return set(_COLUMNS) <= set(_header(csv.reader([first])))
    except csv.Error:
        return False


def _header(rows: Iterator[list[str]]) -> list[str]:
    """The names in the first row that is not blank."""
    return next(([name.strip() for name in row] for row in rows if "".join(row).strip()), [])


def read(lines: Iterator[str], path: Path) -> Requests:
    rows = csv.reader(lines, strict=True)
    try:
        return _read(rows, path)
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not CSV: {error}") from None


def _read(rows: Any, path: Path) -> Requests:
    header = _header(rows)
    if missing := set(_COLUMNS) - set(header):
        raise InputError(f"{path}:{rows.line_num}: column {min(missing)} is missing; found {', '.join(header):.99}")
    at = [header.index(name) for name in _COLUMNS]
    times, inputs, outputs, numbers = [], [], [], []
    for row in rows:
        if not row:
            continue
        if len(row) != len(header):
            raise InputError(f"{path}:{rows.line_num}: found {len(row)} columns; expected {len(header)}")
        times.append(row[at[0]].strip().removesuffix("+00:00"))
        inputs.append(row[at[1]])
        outputs.append(row[at[2]])
        numbers.append(rows.line_num)
    times_ns = _convert(times, _times_ns, numbers, path, f"{_COLUMNS[0]}: expected YYYY-MM-DD HH:MM:SS.fffffff")
    input_tokens, output_tokens = (
        _convert(column, _tokens, numbers, path, f"{name}: expected a whole number of tokens from 1 to {MOST_TOKENS}")
        for column, name in zip((inputs, outputs), _COLUMNS[1:], strict=True)
    )
    return Requests(times_ns, input_tokens, output_tokens)


def _times_ns(texts: list[str]) -> np.ndarray:
    if not all(map(_STAMP.fullmatch, texts)):  # numpy also takes "today", and years that overflow
        raise ValueError
    return np.array(texts, "datetime64[ns]").astype(np.int64)


def _tokens(texts: list[str]) -> np.ndarray:
    if not _DIGITS.fullmatch("".join(texts)):  # int also takes 1_000, +1 and digits of other scripts
        raise ValueError
    tokens = np.array([int(text) for text in texts])
    if len(tokens) and not 0 < tokens.min() <= tokens.max() <= MOST_TOKENS:
        raise ValueError
    return tokens


def _convert(texts, convert, numbers: list[int], path: Path, expected: str) -> np.ndarray:
    """The whole column at once; on failure, row by row to name the line."""
    try:
        return convert(texts)
    except (ValueError, OverflowError):
        for text, number in zip(texts, numbers, strict=True):
            try:
                convert([text])
            except (ValueError, OverflowError):
                raise InputError(f"{path}:{number}: {expected}; found {text!r:.99}") from None
        raise
