"""Any table (CSV or Parquet) or JSONL, by the names of its columns. Without a mapping these are arrival_s,
input_tokens, output_tokens and, where they are known, first_token_s, finish_s and session, among others, in any order;
times in seconds. A run's own requests.csv.gz is one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from twotower_sim.errors import InputError
from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import (
    UNITS_NS,
    Row,
    answered,
    iso_ns,
    name,
    span_ns,
    span_text,
    token_text,
    tokens,
)

TimeUnit = Literal["s", "ms", "us", "ns", "iso"]
COLUMNS = ("arrival_s", "input_tokens", "output_tokens")
FINISH = "finish_s"
OPTIONAL = ("first_token_s", FINISH, "session")
JSON = True


def sniff(head: Head) -> bool:
    """Of a table one column will do, so that it can be said which is missing."""
    return set(COLUMNS) <= head.keys() if isinstance(head, dict) else not {*COLUMNS, FINISH}.isdisjoint(head)


def reader(head: Head) -> Callable[[Any], Row | str]:
    first_token, finish, session = (name if name in head else None for name in OPTIONAL)
    return Columns(*COLUMNS, first_token, finish, session).reader(head)


@dataclass(frozen=True)
class Columns:
    """A family by names of columns, or keys of objects; None: there is none. All times are in ``time_unit``. Requests
    without tokens are malformed, or, where the file says when requests finished, were not answered."""

    arrival: str
    input_tokens: str
    output_tokens: str
    first_token: str | None = None
    finish: str | None = None
    session: str | None = None
    time_unit: TimeUnit = "s"
    JSON: ClassVar[bool] = True

    @property
    def COLUMNS(self) -> list[str]:  # noqa: N802
        asked = self.arrival, self.first_token, self.finish, self.input_tokens, self.output_tokens, self.session
        return [name for name in asked if name]

    def sniff(self, head: Head) -> bool:
        return False

    def reader(self, head: Head) -> Callable[[Any], Row | str]:
        return self._read if isinstance(head, dict) else lambda cells: self._read(dict(zip(head, cells, strict=True)))

    def _read(self, of: dict[str, Any]) -> Row | str:
        arrival_ns = self._time_ns(_there(of, self.arrival), self.arrival)
        first_ns, finish_ns = (
            None if field is None or of.get(field) in (None, "") else self._time_ns(of[field], field)
            for field in (self.first_token, self.finish)
        )
        least = 0 if self.finish else 1
        input_tokens, output_tokens = (_tokens(of, field, least) for field in (self.input_tokens, self.output_tokens))
        session = name(of.get(self.session), self.session) if self.session else None
        row = Row(input_tokens, output_tokens, arrival_ns, session=None if session == "" else session)
        return answered(row._replace(first_ns=first_ns, finish_ns=finish_ns))

    def _time_ns(self, value: Any, field: str) -> int:
        if self.time_unit == "iso":
            return iso_ns(value, field)
        of, unit = (span_text if isinstance(value, str) else span_ns), self.time_unit
        return of(value, field, UNITS_NS[unit], "seconds" if unit == "s" else unit)


def _tokens(of: dict[str, Any], field: str, least: int) -> int:
    value = _there(of, field)
    return token_text(value, field, least) if isinstance(value, str) else tokens(value, field, least)


def _there(of: dict[str, Any], field: str) -> Any:
    if (value := of.get(field)) is None:
        raise InputError(f"{field} is missing")
    return value
