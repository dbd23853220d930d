"""CSV with a header and the columns arrival_s, finish_s, input_tokens, output_tokens and, where it is known,
first_token_s, among others, in any order; times in seconds. A run's own requests.csv.gz is one."""

import csv
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.logs.entries import Entry
from twotower_sim.logs.fields import Row
from twotower_sim.requests import LATEST_NS, MOST_TOKENS

NEEDED = ("arrival_s", "finish_s", "input_tokens", "output_tokens")
FIRST = "first_token_s"
_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]{1,2})?")
_TOKENS = re.compile(r"[0-9]{1,10}")


def sniff(first: Any) -> bool:
    return isinstance(first, str) and not set(NEEDED).isdisjoint(_names(first))


def _names(line: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line]), [])]
    except csv.Error:
        return []


def read(entries: Iterable[Entry]) -> Iterator[Row | str]:
    """Rows, or why a request is none."""
    places: list[str] = []  # where the lines that were read stand; the last is the latest

    def lines() -> Iterator[str]:
        for where, line in entries:
            places[:] = [where]
            yield line

    rows = csv.reader(lines(), strict=True)
    try:
        header = [name.strip() for name in next(rows)]
        for name in NEEDED:
            if name not in header:
                raise InputError(f"{places[-1]}: column {name} is missing; found {', '.join(header):.99}")
        for row in rows:
            if row:
                yield _row(header, row, places[-1])
    except csv.Error as error:
        raise InputError(f"{places[-1]}: not CSV: {error}") from None


def _row(header: list[str], row: list[str], where: str) -> Row | str:
    if len(row) != len(header):
        raise InputError(f"{where}: found {len(row)} columns; expected {len(header)}")
    of = {name: text.strip() for name, text in zip(header, row, strict=True)}
    if not of["finish_s"]:
        return "unfinished"
    first = of.get(FIRST)
    return Row(
        where,
        _seconds_ns(of["arrival_s"], "arrival_s", where),
        _seconds_ns(first, FIRST, where) if first else None,
        _seconds_ns(of["finish_s"], "finish_s", where),
        _tokens(of["input_tokens"], "input_tokens", where),
        _tokens(of["output_tokens"], "output_tokens", where),
    )


def _seconds_ns(text: str, field: str, where: str) -> int:
    """Exact: seconds since 1970 with nine decimals are more than a float holds."""
    if _SECONDS.fullmatch(text) and (time := Decimal(text) * 10**9) <= LATEST_NS:
        return int(time.to_integral_value())
    raise InputError(f"{where}: {field}: found {text!r:.60}; expected seconds from 0 to {LATEST_NS / 1e9:.3g}")


def _tokens(text: str, field: str, where: str) -> int:
    if _TOKENS.fullmatch(text) and (tokens := int(text)) <= MOST_TOKENS:
        return tokens
    raise InputError(f"{where}: {field}: found {text!r:.60}; expected a whole number of tokens up to {MOST_TOKENS}")
