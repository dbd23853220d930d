"""Vidur's processed traces (microsoft/vidur): CSV with the columns arrived_at (seconds), num_prefill_tokens and
num_decode_tokens."""

from collections.abc import Callable

from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Row, span_text, token_text

COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


def sniff(head: Head) -> bool:
    return isinstance(head, list) and set(COLUMNS) <= set(head)


def reader(head: list[str]) -> Callable[[list[str]], Row]:
    time, input_, output = (head.index(name) for name in COLUMNS)
    return lambda cells: Row(
        token_text(cells[input_], COLUMNS[1]), token_text(cells[output], COLUMNS[2]), span_text(cells[time], COLUMNS[0])
    )
