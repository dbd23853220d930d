"""What a reader makes of an item of a file, and how it checks fields: errors say what was found and what is allowed."""

from collections.abc import Hashable, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

from twotower_sim.errors import InputError
from twotower_sim.requests import LATEST_NS, MOST_TOKENS


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


def present(of: Mapping[str, Any], field: str) -> Any:
    """The value of a field that has to be there; the last part of a dotted name is its key."""
    value = of.get(field.rpartition(".")[2])
    if value is None:
        raise InputError(f"{field} is missing")
    return value


def section(of: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = present(of, field)
    if not isinstance(value, dict):
        raise InputError(f"{field}: found {value!r:.60}; expected a JSON object")
    return value


def objects(of: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """A list of objects; empty where it is missing."""
    items = of.get(field) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{field}: found {items!r:.60}; expected a list of JSON objects")
    return items


def tokens(value: Any, field: str, least: int = 1) -> int:
    """A JSON number of tokens."""
    if type(value) is int and least <= value <= MOST_TOKENS:
        return value
    if type(value) is float and value == value // 1 and least <= value <= MOST_TOKENS:
        return int(value)
    raise InputError(f"{field}: found {value!r:.60}; expected a whole number of tokens from {least} to {MOST_TOKENS}")


def token_text(text: str, field: str, least: int = 1) -> int:
    """A number of tokens in a column of text; int also takes 1_000, +1 and digits of other scripts."""
    digits = text.strip(" ")
    if digits.isascii() and digits.isdigit() and least <= int(digits[:20]) <= MOST_TOKENS:
        return int(digits)
    raise InputError(f"{field}: found {text!r:.60}; expected a whole number of tokens from {least} to {MOST_TOKENS}")


def span_ns(value: Any, field: str, unit_ns: float = 1e9, unit: str = "seconds") -> int:
    """A time or a duration, in nanoseconds."""
    if type(value) in (int, float) and isfinite(value) and 0 <= value * unit_ns <= LATEST_NS:
        return round(value * unit_ns)
    raise InputError(f"{field}: found {value!r:.60}; expected {unit} from 0 to {LATEST_NS / unit_ns:.3g}")
