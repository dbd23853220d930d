"""Azure LLM inference traces (Azure/AzurePublicDataset): CSV with the columns TIMESTAMP ("YYYY-MM-DD HH:MM:SS.fffffff",
the zone, if any, UTC), ContextTokens and GeneratedTokens; that of 2025 has NumImages, too."""

import re
from collections.abc import Callable
from datetime import UTC, datetime

from twotower_sim.errors import InputError
from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Row, shown, token_text

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_STAMP = re.compile(r"((?:19|20|21)\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:\+00:00)?", re.ASCII)


def sniff(head: Head) -> bool:
    return isinstance(head, list) and set(COLUMNS) <= set(head)


def reader(head: list[str]) -> Callable[[list[str]], Row]:
    time, input_, output = (head.index(name) for name in COLUMNS)
    times_ns = _Times()
    return lambda cells: Row(
        token_text(cells[input_], COLUMNS[1]), token_text(cells[output], COLUMNS[2]), times_ns(cells[time])
    )


class _Times:
    """Time stamps in nanoseconds since 1970; a second is worked out once for the requests that come in it."""

    def __init__(self) -> None:
        self._second, self._second_ns = "", 0

    def __call__(self, text: str) -> int:
        if text[:20] == self._second + "." and len(text) == 27 and text[20:].isdecimal() and text.isascii():
            return self._second_ns + int(text[20:]) * 100
        match = _STAMP.fullmatch(text.strip())
        if not match:
            raise _wrong(text)
        second, fraction = match.groups()
        if second != self._second:
            try:
                seconds = datetime.fromisoformat(second).replace(tzinfo=UTC).timestamp()
            except ValueError:
                raise _wrong(text) from None
            self._second, self._second_ns = second, int(seconds) * 10**9
        return self._second_ns + (int(fraction.ljust(9, "0")) if fraction else 0)


def _wrong(text: str) -> InputError:
    return InputError(f"{COLUMNS[0]}: found {shown(text)}; expected YYYY-MM-DD HH:MM:SS.fffffff")
