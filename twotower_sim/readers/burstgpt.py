"""BurstGPT (HPMLL/BurstGPT): CSV with the columns Timestamp (seconds since the first day began), Request tokens and
Response tokens (0 where the request failed) and, in later files, Session ID and Elapsed time (seconds)."""

from collections.abc import Callable

from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Row, span_text, token_text

COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
SESSION, ELAPSED = "Session ID", "Elapsed time"


def sniff(head: Head) -> bool:
    return isinstance(head, list) and set(COLUMNS) <= set(head)


def reader(head: list[str]) -> Callable[[list[str]], Row | str]:
    time, input_, output = (head.index(name) for name in COLUMNS)
    session, elapsed = (head.index(name) if name in head else None for name in (SESSION, ELAPSED))

    def read(cells: list[str]) -> Row | str:
        output_tokens = token_text(cells[output], COLUMNS[2], 0)
        input_tokens = token_text(cells[input_], COLUMNS[1], 1 if output_tokens else 0)
        arrival_ns = span_text(cells[time], COLUMNS[0])
        if not output_tokens:
            return "failed"
        latency = cells[elapsed].strip() if elapsed is not None else ""
        return Row(
            input_tokens,
            output_tokens,
            arrival_ns,
            session=(cells[session].strip() or None) if session is not None else None,
            finish_ns=arrival_ns + span_text(latency, ELAPSED) if latency else None,
        )

    return read
