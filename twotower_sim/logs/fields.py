"""Fields of a log, checked: errors name where they stand, what was found and what is allowed."""

from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

from twotower_sim.errors import InputError
from twotower_sim.requests import LATEST_NS, MOST_TOKENS


class Row(NamedTuple):
    """A request that finished; times on whatever clock the log has."""

    where: str
    arrival_ns: int
    first_ns: int | None  # None: the log does not say
    finish_ns: int
    input_tokens: int
    output_tokens: int


def present(of: Mapping[str, Any], field: str, where: str) -> Any:
    """The value of a field that has to be there; the last part of a dotted name is its key."""
    value = of.get(field.rpartition(".")[2])
    if value is None:
        raise InputError(f"{where}: {field} is missing")
    return value


def section(of: Mapping[str, Any], field: str, where: str) -> dict[str, Any]:
    value = present(of, field, where)
    if not isinstance(value, dict):
        raise InputError(f"{where}: {field}: found {value!r:.60}; expected a JSON object")
    return value


def tokens(value: Any, field: str, where: str) -> int:
    if type(value) in (int, float) and value == value // 1 and 0 <= value <= MOST_TOKENS:
        return int(value)
    raise InputError(f"{where}: {field}: found {value!r:.60}; expected a whole number of tokens up to {MOST_TOKENS}")


def span_ns(value: Any, field: str, where: str, unit_ns: float = 1e9, unit: str = "seconds") -> int:
    """A time or a duration, in nanoseconds."""
    if type(value) in (int, float) and isfinite(value) and 0 <= value * unit_ns <= LATEST_NS:
        return round(value * unit_ns)
    raise InputError(f"{where}: {field}: found {value!r:.60}; expected {unit} from 0 to {LATEST_NS / unit_ns:.3g}")
