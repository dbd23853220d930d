"""Traces of splitwise-sim (Mutinifni/splitwise-sim): CSV with the columns arrival_timestamp (seconds), prompt_size and
token_size (of the answer)."""

from collections.abc import Callable

from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Row, span_text, token_text

COLUMNS = ("arrival_timestamp", "prompt_size", "token_size")


def sniff(head: Head) -> bool:
    return isinstance(head, list) and set(COLUMNS) <= set(head)


def reader(head: list[str]) -> Callable[[list[str]], Row]:
    time, input_, output = (head.index(name) for name in COLUMNS)
    return lambda cells: Row(
        token_text(cells[input_], COLUMNS[1]), token_text(cells[output], COLUMNS[2]), span_text(cells[time], COLUMNS[0])
    )
