"""Traces that say when requests finished, as measurements: logs of real engines and of their load generators."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from twotower_sim.errors import InputError
from twotower_sim.measurements import Measurements
from twotower_sim.readers import Rows, columns
from twotower_sim.readers.rows import Row
from twotower_sim.records import NOT_YET
from twotower_sim.requests import LATEST_NS


class Log(NamedTuple):
    measurements: Measurements
    format: str  # a name of FORMATS
    skipped: dict[str, int]  # requests that are not in it, by why


def read_log(path: Path, format: str = "auto") -> Log:
    """As ``read_trace``."""
    of = Rows(path, format, "fail")
    if of.relative:
        raise InputError(f"{path}: format {of.format} does not say when sessions start; a log says when requests came")
    if of.family is columns:
        of.need([columns.FINISH])
    rows = []
    for place, row in of:
        if row.finish_ns is None:
            of.skipped["unfinished"] += 1
        elif row.arrival_ns is None:
            of.bad(place, "nothing says when it came")
        else:
            rows.append(row)
    if not rows:
        raise InputError(f"{path}: holds no request that finished{of.why_not}")
    return Log(_measurements(rows, path), of.format, dict(of.skipped))


def _measurements(rows: Iterable[Row], path: Path) -> Measurements:
    times = [
        (row.arrival_ns, NOT_YET if row.first_ns is None else row.first_ns, row.finish_ns, *row[:2]) for row in rows
    ]
    columns = np.array(times, np.int64).T
    arrival_ns, first_ns, finish_ns, input_tokens, output_tokens = columns[:, columns[0].argsort(kind="stable")]
    start_ns = arrival_ns[0]
    if (span_ns := int(finish_ns.max()) - int(start_ns)) > LATEST_NS:
        raise InputError(f"{path}: spans {span_ns / 3.156e16:.0f} years; at most 146 are replayed")
    first_ns = np.where(first_ns == NOT_YET, NOT_YET, first_ns - start_ns)
    return Measurements(arrival_ns - start_ns, first_ns, finish_ns - start_ns, input_tokens, output_tokens)
