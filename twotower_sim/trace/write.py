"""Requests as trace files that are read again as the same requests: Mooncake JSONL, Azure CSV or Parquet, by the ending
of the file's name. What such a file cannot hold is said."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from twotower_sim.errors import InputError
from twotower_sim.readers.azure import COLUMNS
from twotower_sim.readers.table import HASH_TOKENS
from twotower_sim.requests import Prefixes, Requests
from twotower_sim.text_file import zstd

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".csv.gz", ".csv.zst", ".parquet")
ROWS = 65536
NONE = -1


def ending(path: Path) -> str:
    """One of ENDINGS. Raises InputError, also where Parquet is asked for and pyarrow is missing."""
    found = next((ending for ending in ENDINGS if path.name.endswith(ending)), None)
    if found is None:
        raise InputError(f"{path}: found ending {path.suffix!r}; allowed: {', '.join(ENDINGS)}")
    if found == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ModuleNotFoundError:
            raise InputError(f"{path}: Parquet files need pyarrow: pip install 'twotower-sim[parquet]'") from None
    return found


def write_trace(requests: Requests, path: Path, ending: str) -> list[str]:
    """Writes to ``path`` what ``ending`` says; times count from the first request. Gives what is lost."""
    arrival_ns = requests.arrival_ns - requests.arrival_ns[0]
    if ending.startswith(".jsonl"):
        lost = _write(path, ending, *_mooncake(requests, arrival_ns))
    elif ending == ".parquet":
        lost = _write_parquet(path, requests, arrival_ns)
    else:
        lost = _write(path, ending, _azure(requests, arrival_ns), _beyond_lengths(requests))
    return lost


def _write(path: Path, ending: str, chunks: Iterator[bytes], lost: list[str]) -> list[str]:
    with path.open("wb") as file, _packed(file, ending) as packed:
        for chunk in chunks:
            packed.write(chunk)
    return lost


def _packed(file: IO[bytes], ending: str) -> Any:
    """The same bytes for the same content."""
    if ending.endswith(".gz"):
        return gzip.GzipFile("", "wb", 6, file, mtime=0)
    return zstd().open(file, "wb") if ending.endswith(".zst") else file


# ---------------------------------------------------------------------- lengths and times


def _azure(requests: Requests, arrival_ns: np.ndarray) -> Iterator[bytes]:
    yield (",".join(COLUMNS) + "\n").encode()
    stamps = _stamps(arrival_ns)
    for low in range(0, len(stamps), ROWS):
        part = slice(low, low + ROWS)
        columns = stamps[part], requests.input_tokens[part].tolist(), requests.output_tokens[part].tolist()
        yield "".join([f"{at},{input_},{output}\n" for at, input_, output in zip(*columns, strict=True)]).encode()


def _stamps(arrival_ns: np.ndarray) -> list[str]:
    """From the beginning of 1970 on; with seven decimals, as Azure's, unless nanoseconds ask for nine."""
    stamps = np.datetime_as_string(arrival_ns.astype("datetime64[ns]"), unit="ns")
    width = len("1970-01-01T00:00:00.0000000") + 2 * bool((arrival_ns % 100).any())
    return [stamp[:width].replace("T", " ") for stamp in stamps.tolist()]


def _write_parquet(path: Path, requests: Requests, arrival_ns: np.ndarray) -> list[str]:
    from pyarrow import parquet, table

    columns = _stamps(arrival_ns), requests.input_tokens, requests.output_tokens
    parquet.write_table(table(dict(zip(COLUMNS, columns, strict=True))), path)
    return _beyond_lengths(requests)


def _beyond_lengths(requests: Requests) -> list[str]:
    lost = []
    if requests.prefixes:
        lost.append("what prompts share: this format has times and lengths only; .jsonl holds it")
    if (waiting := _waiting(requests)) or requests.sessions is not None:
        lost.append(
            f"sessions: {waiting:,} requests that wait for others come at their recorded times; .jsonl holds turns"
        )
    return lost


def _waiting(requests: Requests) -> int:
    return int((np.diff(requests.after.first) > 0).sum()) if requests.after else 0


# ---------------------------------------------------------------------- Mooncake


def _mooncake(requests: Requests, arrival_ns: np.ndarray) -> tuple[Iterator[bytes], list[str]]:
    in_session, delay_ns, lost = _turns(requests)
    prefixes = requests.prefixes
    if prefixes and prefixes.block_tokens not in HASH_TOKENS:
        allowed = ", ".join(map(str, sorted(HASH_TOKENS)))
        lost.append(f"what prompts share: found blocks of {prefixes.block_tokens} tokens; readers know {allowed}")
        prefixes = None
    if prefixes:
        prefixes = _all_hashed(prefixes, requests.input_tokens)
        if prefixes.block_tokens != (read := _block_tokens_read(prefixes, requests.input_tokens)):
            lost.append(f"the size of hashed blocks, {prefixes.block_tokens}: no prompt is longer, and {read} is read")
    times, delays = _milliseconds(arrival_ns), _milliseconds(delay_ns)
    off_ns = max(_off_ns(arrival_ns, times), _off_ns(delay_ns, delays))
    if off_ns:
        lost.append(f"up to {off_ns:,} ns of times, which are written in milliseconds")
    return _rows(requests, times, delays, in_session, prefixes), lost


def _rows(
    requests: Requests, times: list, delays: list, in_session: np.ndarray, prefixes: Prefixes | None
) -> Iterator[bytes]:
    sessions = requests.sessions if requests.sessions is not None else np.zeros(len(requests), np.int64)
    columns = requests.input_tokens.tolist(), requests.output_tokens.tolist()
    turns = zip(in_session.tolist(), sessions.tolist(), strict=True)
    for row, (time, input_, output, (turn, session), delay) in enumerate(
        zip(times, *columns, turns, delays, strict=True)
    ):
        item = {"timestamp": time, "input_length": input_, "output_length": output}
        if prefixes:
            item["hash_ids"] = prefixes.of(row).tolist()
        if turn:
            item["session_id"] = str(session)
        if delay >= 0:
            item["delay"] = delay
        yield orjson.dumps(item, option=orjson.OPT_APPEND_NEWLINE)


def _milliseconds(time_ns: np.ndarray) -> list[int | float]:
    """Whole ones as such."""
    whole, rest = np.divmod(time_ns, 10**6)
    return np.where(rest == 0, whole.astype(object), (time_ns / 1e6).astype(object)).tolist()


def _off_ns(time_ns: np.ndarray, milliseconds: list[int | float]) -> int:
    """By how much they are off when read, as double precision allows."""
    return int(np.abs(np.rint(np.array(milliseconds, float) * 1e6).astype(np.int64) - time_ns).max())


def _turns(requests: Requests) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Which requests are written with their session; after which delay they come, NONE where at their time; what is
    lost. A session is written if each turn waits for the end of the one before, and then a delay or for its time."""
    count = len(requests)
    none = np.zeros(count, bool), np.full(count, NONE)
    if requests.sessions is None or requests.after is None:
        waits = requests.sessions is not None and len(np.unique(requests.sessions)) < count
        lost = ["sessions: their turns wait for nothing, and in this format they would"] if waits else []
        return *none, lost + ([_cannot_wait(_waiting(requests))] if _waiting(requests) else [])
    after, before = requests.after, _turn_before(requests.sessions)
    waits_for = np.diff(after.first)
    if not len(after.on):
        return *none, []
    wait = np.minimum(after.first[:-1], len(after.on) - 1)  # the first, where there is one
    follows = (waits_for == 1) & (after.on[wait] == before) & ~after.dispatch[wait]
    follows &= ~after.binding | (after.delay_ns[wait] == 0)
    fits = np.where(before == NONE, waits_for == 0, follows)
    _, session, turns = np.unique(requests.sessions, return_inverse=True, return_counts=True)
    whole = (np.bincount(session, ~fits) == 0)[session]
    delay_ns = np.where(whole & follows & ~after.binding, after.delay_ns[wait], NONE)
    others = int((~whole & (waits_for > 0)).sum())
    return whole & (turns[session] > 1), delay_ns, [_cannot_wait(others)] if others else []


def _cannot_wait(count: int) -> str:
    return (
        f"what {count:,} requests wait for beside the end of the turn before (joins, branches): they come at their "
        "recorded times, out of their sessions"
    )


def _turn_before(sessions: np.ndarray) -> np.ndarray:
    """The request before each in its session; NONE for the first."""
    order = sessions.argsort(kind="stable")
    before = np.full(len(sessions), NONE)
    same = sessions[order[1:]] == sessions[order[:-1]]
    before[order[1:][same]] = order[:-1][same]
    return before


def _all_hashed(prefixes: Prefixes, input_tokens: np.ndarray) -> Prefixes:
    """With a hash for a last block that is not full, as this format has it: one that no other block has."""
    hashes = prefixes.hashes
    if len(hashes) and hashes.min() < 0:
        hashes = np.unique(hashes, return_inverse=True)[1]
    counts, wanted = np.diff(prefixes.first), -(-input_tokens // prefixes.block_tokens)
    first = np.concatenate(([0], np.cumsum(wanted)))
    place = np.arange(first[-1]) - np.repeat(first[:-1], wanted)
    there = place < np.repeat(counts, wanted)
    full = np.empty(first[-1], np.int64)
    full[there] = hashes
    full[~there] = hashes.max(initial=-1) + 1 + np.arange((~there).sum())
    return Prefixes(first, full, prefixes.block_tokens)


def _block_tokens_read(prefixes: Prefixes, input_tokens: np.ndarray) -> int:
    return HASH_TOKENS[0] if input_tokens.max() <= min(prefixes.block_tokens, HASH_TOKENS[0]) else prefixes.block_tokens
