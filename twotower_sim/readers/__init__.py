"""Trace files in the formats that users have; each family is one small file with ``sniff`` and ``reader``."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from twotower_sim.errors import InputError
from twotower_sim.readers import azure, mooncake
from twotower_sim.readers.items import Items, items
from twotower_sim.readers.rows import Row
from twotower_sim.readers.table import Partial, Table
from twotower_sim.requests import Requests

FORMATS: dict[str, ModuleType] = {"mooncake": mooncake, "azure": azure}
MALFORMED = "malformed"
OnError = Literal["fail", "skip"]


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


def read_trace(path: Path, format: str = "auto", on_error: OnError = "fail") -> Trace:
    """``format`` is a name of FORMATS, or "auto" to go by the content. Plain, gzip, Zstandard, or Parquet. Raises
    InputError that names file, line and field; with ``on_error`` "skip", malformed rows are counted instead."""
    rows = Rows(path, format, on_error)
    table = Table()
    for place, row in rows:
        try:
            table.add(row, place)
        except InputError as error:
            rows.bad(place, str(error))
    relative: bool = getattr(rows.family, "RELATIVE", False)
    partial: Partial = getattr(rows.family, "PARTIAL_BLOCKS", "hashed")
    try:
        requests = table.requests(relative, partial, rows.bad)
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from None
    if not len(requests):
        raise InputError(f"{path}: holds no requests{rows.why_not}")
    return Trace(requests, rows.format, relative, dict(rows.skipped), rows.first_bad, table.late)


class Rows:
    """The rows of a file with their places, one by one; what is skipped is counted."""

    def __init__(self, path: Path, format: str, on_error: OnError) -> None:
        self._items = items(path)
        self.format = _sniff(self._items) if format == "auto" else format
        self.family, self._skip = FORMATS[self.format], on_error == "skip"
        self._check_kind()
        self.skipped: Counter[str] = Counter()
        self.first_bad: str | None = None

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        head = self._items
        try:
            read: Callable[[Any], Row | list[Row | str]] = self.family.reader(head.head)
        except InputError as error:
            raise InputError(f"{head.where(head.start)}: {error}") from None
        for place, value in head.rest:
            if isinstance(value, InputError):
                self.bad(place, str(value))
                continue
            try:
                found = read(value)
            except InputError as error:
                self.bad(place, str(error))
                continue
            if isinstance(found, Row):
                yield place, found
                continue
            for row in found:
                if isinstance(row, str):
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
        if isinstance(of.head, dict):
            if needed:
                raise InputError(
                    f"{where}: found JSON; format {self.format} is a table with the columns {', '.join(needed)}"
                )
        elif needed is None:
            raise InputError(f"{where}: not a JSON object: {', '.join(of.head)!r:.60}")
        elif missing := [name for name in needed if name not in of.head]:
            raise InputError(f"{where}: column {missing[0]} is missing; found {', '.join(of.head):.99}")


def _sniff(of: Items) -> str:
    for name, family in FORMATS.items():
        if family.sniff(of.head):
            return name
    found = f"keys {', '.join(of.head)}" if isinstance(of.head, dict) else repr(",".join(of.head))
    raise InputError(
        f"{of.where(of.start)}: not a known trace format ({', '.join(FORMATS)}); the file starts with {found:.99}"
    )
