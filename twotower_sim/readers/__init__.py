"""Trace files in the formats that users have; each family is one small file.

A family has ``sniff(head)``, whether a file that starts so is one of it, and ``reader(head)``, a function from an item
of the file to what is read of it; both raise InputError without saying where. It may have

- ``COLUMNS``: of tables, the names of those that have to be there (``JSON`` true: objects will do as well);
- ``parts(items)``: other items, where what is one request does not show item by item;
- ``RELATIVE`` true: arrivals count from the start of each session, and nobody knows when sessions start;
- ``PARTIAL_BLOCKS``: whether a last block that is not full has a hash, as ``table.Partial``.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from twotower_sim.errors import InputError
from twotower_sim.readers import (
    agentic_mooncake,
    aibrix,
    aiperf,
    apex,
    applied_compute_agentic,
    azure,
    bailian,
    bench,
    burstgpt,
    columns,
    copilot,
    dynamo,
    llmservingsim,
    mooncake,
    mooncake_delta,
    otlp,
    splitwise,
    tracelab,
    vidur,
    weka,
)
from twotower_sim.readers.items import Items, items
from twotower_sim.readers.rows import Found, Row, in_order, shown
from twotower_sim.readers.table import Partial, Table
from twotower_sim.requests import Requests


class Family(Protocol):
    @property
    def sniff(self) -> Callable[[Any], bool]: ...
    @property
    def reader(self) -> Callable[[Any], Callable[[Any], Found]]: ...


FORMATS: dict[str, Family] = {
    "mooncake": mooncake,
    "mooncake_delta": mooncake_delta,
    "agentic_mooncake": agentic_mooncake,
    "azure": azure,
    "burstgpt": burstgpt,
    "bailian": bailian,
    "vidur": vidur,
    "weka": weka,
    "aiperf": aiperf,
    "otlp": otlp,
    "bench": bench,
    "columns": columns,
    "dynamo": dynamo,
    "applied_compute_agentic": applied_compute_agentic,
    "llmservingsim": llmservingsim,
    "splitwise": splitwise,
    "aibrix": aibrix,
    "apex": apex,
    "copilot": copilot,
    "tracelab": tracelab,
}
MALFORMED = "malformed"
OnError = Literal["fail", "skip"]
Format = str | columns.Columns
"""A name of FORMATS, "auto" to go by the content, or which columns to read."""


@dataclass(frozen=True)
class Trace:
    """What a file holds. ``relative``: its times count from the start of each session, and nobody knows when sessions
    start. ``skipped``: rows that are not in it, by why; ``first_bad``: what was wrong with the first malformed one;
    ``late``: requests that arrived before the one that stands before them in the file."""

    requests: Requests
    format: str
    relative: bool = False
    skipped: dict[str, int] = field(default_factory=dict)
    first_bad: str | None = None
    late: int = 0


def read_trace(path: Path, format: Format = "auto", on_error: OnError = "fail") -> Trace:
    """Plain, gzip, Zstandard, or Parquet. Raises InputError that names file, line and field; with ``on_error`` "skip",
    malformed rows are counted instead."""
    rows = Rows(path, format, on_error)
    table = Table()
    for place, row in rows:
        try:
            table.add(row, place)
        except InputError as error:
            rows.bad(place, str(error))
    partial: Partial = getattr(rows.family, "PARTIAL_BLOCKS", "hashed")
    try:
        requests = table.requests(rows.relative, partial, not rows.skipped, rows.bad)
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from None
    if not len(requests):
        raise InputError(f"{path}: holds no requests{rows.why_not}")
    return Trace(requests, rows.format, rows.relative, dict(rows.skipped), rows.first_bad, table.late)


class Rows:
    """The rows of a file with their places, one by one; what is skipped is counted."""

    def __init__(self, path: Path, format: Format, on_error: OnError) -> None:
        self._items, self._skip = items(path), on_error == "skip"
        self.format = _sniff(self._items) if format == "auto" else format if isinstance(format, str) else "columns"
        self.family: Family = FORMATS[self.format] if isinstance(format, str) else format
        self._check_kind()
        self.relative: bool = getattr(self.family, "RELATIVE", False)
        self.skipped: Counter[str] = Counter()
        self.first_bad: str | None = None

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        of, bad = self._items, self.bad
        try:
            read = self.family.reader(of.head)
        except InputError as error:
            raise InputError(f"{of.where(of.start)}: {error}") from None
        for place, item in self.family.parts(of.rest) if hasattr(self.family, "parts") else of.rest:
            if isinstance(item, InputError):
                bad(place, str(item))
                continue
            try:
                found = read(item)
                if isinstance(found, Row):
                    yield place, found if found.finish_ns is None and found.first_ns is None else in_order(found)
                    continue
            except InputError as error:
                bad(place, str(error))
                continue
            for row in [found] if isinstance(found, str) else found:
                if isinstance(row, InputError):
                    bad(place, str(row))
                elif isinstance(row, str):
                    self.skipped[row] += 1
                else:
                    yield place, row

    def bad(self, place: int, why: str) -> None:
        """A malformed row: an error, or one more that is skipped."""
        said = f"{self._items.where(place)}: {why}"
        if not self._skip:
            raise InputError(said)
        self.skipped[MALFORMED] += 1
        self.first_bad = self.first_bad or said

    @property
    def why_not(self) -> str:
        return "".join(f"; {count} {why}" for why, count in self.skipped.items()) + (
            f", the first at {self.first_bad}" if self.first_bad else ""
        )

    def _check_kind(self) -> None:
        """A format that was asked for, against what the file is."""
        of, needed = self._items, getattr(self.family, "COLUMNS", None)
        where = of.where(of.start)
        if isinstance(of.head, list):
            if needed is None:
                raise InputError(f"{where}: not a JSON object: {shown(', '.join(of.head))}")
            self.need(needed)
        elif needed and not getattr(self.family, "JSON", False):
            found = f"found JSON; format {self.format} is a table with the columns"
            raise InputError(f"{where}: {found} {', '.join(needed)}")

    def need(self, names: Iterable[str]) -> None:
        """Columns of a table."""
        of = self._items
        if isinstance(of.head, list):
            for name in names:
                if name not in of.head:
                    raise InputError(f"{of.where(of.start)}: column {name} is missing; found {', '.join(of.head):.99}")


def _sniff(of: Items) -> str:
    for name, family in FORMATS.items():
        if family.sniff(of.head):
            return name
    found = f"keys {', '.join(of.head)}" if isinstance(of.head, dict) else repr(",".join(of.head))
    raise InputError(
        f"{of.where(of.start)}: not a known trace format: the file starts with {found:.99}{_nearest(of)}; "
        f"known are {', '.join(FORMATS)}"
    )


def _nearest(of: Items) -> str:
    """What a table lacks of the format of which it has most."""
    lacks = {}
    for name, family in FORMATS.items():
        needed = set(getattr(family, "COLUMNS", ()))
        if len(needed - set(of.head)) < len(needed) / 2:
            lacks[name] = sorted(needed - set(of.head))
    if isinstance(of.head, dict) or not lacks:
        return ""
    name = min(lacks, key=lambda name: len(lacks[name]))
    return f"; {name} has the column {', '.join(lacks[name])} too"
