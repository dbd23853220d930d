"""What a reader makes of an item of a file, and how it checks fields: errors say what was found and what is allowed."""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from math import isfinite
from typing import Any, NamedTuple, TypeVar

from twotower_sim.errors import InputError
from twotower_sim.requests import LATEST_NS, MOST_TOKENS

UNITS_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
FAR_NS = 1 << 63
"""No time is so late, whatever it counts from."""
UNANSWERED = "without input or output tokens"
_EPOCH, _SECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(seconds=1)
_FRACTION = re.compile(r"[.,](\d+)", re.ASCII)
_DECIMAL = re.compile(r"\d+(\.\d*)?([eE][-+]?\d{1,2})?", re.ASCII)
_WHOLE = re.compile(r"(\d{1,10})(\.0*)?", re.ASCII)
Part = TypeVar("Part")


class After(NamedTuple):
    """A request that another waits for."""

    id: Hashable
    delay_ns: int = 0  # from when it finishes
    dispatch: bool = False  # or from when it arrives


class Row(NamedTuple):
    """A request; times in nanoseconds on whatever clock the file has."""

    input_tokens: int
    output_tokens: int
    arrival_ns: int | None = None  # None: it comes when what it waits for lets it
    hash_ids: Sequence[int] | None = None  # of the prompt's blocks, as ``requests.Prefixes``
    session: Hashable = None  # None: none
    delay_ns: int | None = None  # from the end of the session's request before
    id: Hashable = None
    after: Sequence[After] | None = None  # None: what the session says
    first_ns: int | None = None  # when its first token came; None: the file does not say
    finish_ns: int | None = None
    bound: bool = True  # with ``after``: whether it comes no earlier than ``arrival_ns``
    block_tokens: int | None = None  # of a hashed block; None: what fits all rows


Found = Row | str | list[Row | str | InputError]
"""What is read of an item: a request; why it is none; or some of them, among which errors name the part."""


def answered(row: Row) -> Row | str:
    return row if row.input_tokens and row.output_tokens else UNANSWERED


def in_order(row: Row) -> Row:
    times = (("arrival", row.arrival_ns), ("first token", row.first_ns), ("finish", row.finish_ns))
    known = [(name, time_ns) for name, time_ns in times if time_ns is not None]
    for (before, early_ns), (after, late_ns) in pairwise(known):
        if late_ns < early_ns:
            raise InputError(f"the {after} comes {(early_ns - late_ns) / 1e9:g} s before the {before}")
    if known and known[-1][1] >= FAR_NS:
        raise InputError(f"the {known[-1][0]} comes {known[-1][1] / 3.156e16:.0f} years after time 0")
    return row


def each(parts: Iterable[tuple[str, Part]], read: Callable[[Part], Row | str]) -> list[Row | str | InputError]:
    """What is read of the named parts of an item; one that is malformed spoils no other."""
    found: list[Row | str | InputError] = []
    for name, part in parts:
        try:
            of = read(part)
            found.append(of if isinstance(of, str) else in_order(of))
        except InputError as error:
            found.append(InputError(f"{name}: {error}"))
    return found


# ---------------------------------------------------------------------- fields


def shown(value: Any, length: int = 60) -> str:
    """For a message, whatever it is."""
    try:
        return repr(value)[:length]
    except (RecursionError, ValueError):  # ValueError: a whole number of too many digits
        return f"a very large {type(value).__name__}"


def present(of: Mapping[str, Any], field: str) -> Any:
    """The value of a field that has to be there; the last part of a dotted name is its key."""
    value = of.get(field.rpartition(".")[2])
    if value is None:
        raise InputError(f"{field} is missing")
    return value


def section(of: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = present(of, field)
    if not isinstance(value, dict):
        raise InputError(f"{field}: found {shown(value)}; expected a JSON object")
    return value


def array(of: Mapping[str, Any], field: str) -> list[Any]:
    value = present(of, field)
    if not isinstance(value, list):
        raise InputError(f"{field}: found {shown(value)}; expected a list")
    return value


def objects(of: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """A list of objects; empty where it is missing."""
    items = of.get(field.rpartition(".")[2]) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{field}: found {shown(items)}; expected a list of JSON objects")
    return items


def name(value: Any, field: str) -> Hashable:
    """An identity; None where there is none."""
    if value is None or type(value) in (str, int):
        return value
    raise InputError(f"{field}: found {shown(value)}; expected text or a whole number")


def tokens(value: Any, field: str, least: int = 1) -> int:
    """A JSON number of tokens."""
    if type(value) is int and least <= value <= MOST_TOKENS:
        return value
    if type(value) is float and value == value // 1 and least <= value <= MOST_TOKENS:
        return int(value)
    raise _no_tokens(value, field, least)


def token_text(text: str, field: str, least: int = 1) -> int:
    """A number of tokens in a column of text; int also takes 1_000, +1 and digits of other scripts."""
    if text.isdecimal() and text.isascii() and len(text) < 11 and least <= (count := int(text)) <= MOST_TOKENS:
        return count
    match = _WHOLE.fullmatch(text.strip(" "))
    if match and least <= int(match[1]) <= MOST_TOKENS:
        return int(match[1])
    raise _no_tokens(text, field, least)


def _no_tokens(value: Any, field: str, least: int) -> InputError:
    if value is None:
        return InputError(f"{field} is missing")
    expected = f"a whole number of tokens from {least} to {MOST_TOKENS}"
    return InputError(f"{field}: found {shown(value)}; expected {expected}")


def span_ns(value: Any, field: str, unit_ns: int = 10**9, unit: str = "seconds") -> int:
    """A time or a duration, in nanoseconds."""
    if type(value) is int and 0 <= (time_ns := value * unit_ns) <= LATEST_NS:
        return time_ns
    if type(value) is float and isfinite(value) and 0 <= value * unit_ns <= LATEST_NS:
        return round(value * unit_ns)
    raise _no_span(value, field, unit_ns, unit)


def span_text(text: str, field: str, unit_ns: int = 10**9, unit: str = "seconds") -> int:
    """Exact: seconds since 1970 with nine decimals are more than a float holds."""
    text = text.strip()
    if _DECIMAL.fullmatch(text) and (time := Decimal(text) * unit_ns) <= LATEST_NS:
        return int(time.to_integral_value())
    raise _no_span(text, field, unit_ns, unit)


def _no_span(value: Any, field: str, unit_ns: int, unit: str) -> InputError:
    if value is None:
        return InputError(f"{field} is missing")
    return InputError(f"{field}: found {shown(value)}; expected {unit} from 0 to {LATEST_NS / unit_ns:.3g}")


def optional_ns(of: Mapping[str, Any], field: str, unit_ns: int = 10**9, unit: str = "seconds") -> int | None:
    value = of.get(field.rpartition(".")[2])
    return None if value is None else span_ns(value, field, unit_ns, unit)


def iso_ns(value: Any, field: str) -> int:
    """Nanoseconds since 1970 of an ISO 8601 time; without a zone it is UTC."""
    try:
        fraction = _FRACTION.search(value)
        time = datetime.fromisoformat(value[: fraction.start()] + value[fraction.end() :] if fraction else value)
        seconds = ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH) // _SECOND
        since_ns = seconds * 10**9 + (int(fraction[1][:9].ljust(9, "0")) if fraction else 0)
    except (TypeError, ValueError, OverflowError):
        since_ns = -1
    if not 0 <= since_ns <= LATEST_NS:
        raise InputError(f"{field}: found {shown(value)}; expected YYYY-MM-DDTHH:MM:SS.ffffffZ")
    return since_ns
