"""Applied Compute's agent templates: an object a session with ``num_turns``, ``input_prompt_length``, then of each turn
``assistant_response_length``, ``tool_call_output_length`` and ``tool_call_latency`` (s), and
``final_assistant_response_length``. Nothing says when sessions start."""

from collections.abc import Callable
from itertools import count
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Found, Row, array, present, span_ns, tokens

RELATIVE = True
TURNS = ("assistant_response_length", "tool_call_output_length", "tool_call_latency")


def sniff(head: Head) -> bool:
    return isinstance(head, dict) and {"num_turns", "input_prompt_length"} <= head.keys()


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Found]:
    numbers = count()
    return lambda of: _session(of, next(numbers))


def _session(of: dict[str, Any], session: int) -> Found:
    turns = tokens(of.get("num_turns"), "num_turns", 0)
    columns = [array(of, field) for field in TURNS]
    for field, column in zip(TURNS, columns, strict=True):
        if len(column) != turns:
            raise InputError(f"{field}: found {len(column)} elements; num_turns is {turns}")
    last = present(of, "final_assistant_response_length"), "final_assistant_response_length"
    answers = [*((answer, f"{TURNS[0]}[{i}]") for i, answer in enumerate(columns[0])), last]
    results = [0, *(tokens(result, f"{TURNS[1]}[{i}]", 0) for i, result in enumerate(columns[1]))]
    delays = [None, *(span_ns(latency, f"{TURNS[2]}[{i}]") for i, latency in enumerate(columns[2]))]
    length = present(of, "input_prompt_length")
    rows: list[Row | str | InputError] = []
    for answer, result, delay_ns in zip(answers, results, delays, strict=True):
        output_tokens = tokens(*answer)
        length = tokens(length, "input_prompt_length") + result
        arrival_ns = None if rows else 0
        rows.append(Row(length, output_tokens, arrival_ns, session=session, delay_ns=delay_ns))
        length += output_tokens
    return rows
