"""Logs of real engines and their load generators; each family is one small file with ``sniff`` and ``read``."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from twotower_sim.errors import InputError
from twotower_sim.logs import aiperf, bench, columns, spans
from twotower_sim.logs.entries import entries
from twotower_sim.logs.fields import Row
from twotower_sim.measurements import Measurements
from twotower_sim.records import NOT_YET
from twotower_sim.requests import LATEST_NS

FORMATS = {"aiperf": aiperf, "bench": bench, "spans": spans, "csv": columns}


class Log(NamedTuple):
    measurements: Measurements
    format: str  # a name of FORMATS
    skipped: dict[str, int]  # requests that are not in it, by why


def read_log(path: Path, format: str = "auto") -> Log:
    """``format`` is a name of FORMATS, or "auto" to go by the content. Plain or gzip. Raises InputError that names
    file, line and field."""
    rest = entries(path)
    first = next((entry for entry in rest if not isinstance(entry[1], str) or entry[1].strip()), None)
    if first is None:
        raise InputError(f"{path}: is empty")
    name = _sniff(*first) if format == "auto" else format
    rows, skipped = [], Counter[str]()
    for row in FORMATS[name].read(chain([first], rest)):
        if isinstance(row, str):
            skipped[row] += 1
        elif not (row.input_tokens and row.output_tokens):
            skipped["without input or output tokens"] += 1
        else:
            rows.append(_in_order(row))
    if not rows:
        why = "".join(f", {count} {reason}" for reason, count in skipped.items())
        raise InputError(f"{path}: holds no request that finished{why}")
    return Log(_measurements(rows, path), name, dict(skipped))


def _sniff(where: str, first: object) -> str:
    for name, family in FORMATS.items():
        if family.sniff(first):
            return name
    found = f"keys {', '.join(first):.60}" if isinstance(first, dict) else repr(first)[:60]
    raise InputError(f"{where}: not a known log ({', '.join(FORMATS)}); it starts with {found}")


def _in_order(row: Row) -> Row:
    times = [("arrival", row.arrival_ns), ("first token", row.first_ns), ("finish", row.finish_ns)]
    known = [(name, time_ns) for name, time_ns in times if time_ns is not None]
    for (before, early_ns), (after, late_ns) in pairwise(known):
        if late_ns < early_ns:
            raise InputError(f"{row.where}: the {after} comes {(early_ns - late_ns) / 1e9:g} s before the {before}")
    return row


def _measurements(rows: Iterable[Row], path: Path) -> Measurements:
    rows = sorted(rows, key=lambda row: row.arrival_ns)  # ties keep the file's order
    start_ns = rows[0].arrival_ns
    if (span_ns := max(row.finish_ns for row in rows) - start_ns) > LATEST_NS:
        raise InputError(f"{path}: spans {span_ns / 3.156e16:.0f} years; at most 146 are replayed")
    times = [(row.arrival_ns, row.first_ns, row.finish_ns) for row in rows]
    arrival, first, finish = (
        np.array([NOT_YET if time is None else time - start_ns for time in column], np.int64)
        for column in zip(*times, strict=True)
    )
    return Measurements(
        arrival,
        first,
        finish,
        np.array([row.input_tokens for row in rows]),
        np.array([row.output_tokens for row in rows]),
    )
