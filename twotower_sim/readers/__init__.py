"""Trace files in the formats that users have; each family is one small file with ``sniff`` and ``read``."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import replace
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

from twotower_sim.errors import InputError
from twotower_sim.readers import azure, mooncake
from twotower_sim.requests import LATEST_NS, Requests

FORMATS = {"mooncake": mooncake, "azure": azure}


def read_trace(path: Path, format: str = "auto") -> Requests:
    """Requests in order of arrival (ties keep the file's order), the first at time 0.

    ``format`` is a name of FORMATS, or "auto" to go by the first line. Plain or gzip. Raises InputError that
    names file, line and field.
    """
    lines = _lines(path)
    head = []
    for line in lines:
        head.append(line)
        if not line.isspace():
            break
    else:
        raise InputError(f"{path}: is empty")
    reader = FORMATS[_sniff(line, len(head), path) if format == "auto" else format]
    requests = reader.read(chain(head, lines), path)
    if not len(requests):
        raise InputError(f"{path}: holds no requests")
    order = requests.arrival_ns.argsort(kind="stable")
    requests = requests.take(order)
    first_ns, last_ns = int(requests.arrival_ns[0]), int(requests.arrival_ns[-1])
    if last_ns - first_ns > LATEST_NS:
        raise InputError(f"{path}: spans {(last_ns - first_ns) / 3.156e16:.0f} years; at most 146 are replayed")
    return replace(requests, arrival_ns=requests.arrival_ns - first_ns)


def _sniff(first: str, number: int, path: Path) -> str:
    for name, reader in FORMATS.items():
        if reader.sniff(first):
            return name
    found = first[:60].strip()
    raise InputError(
        f"{path}:{number}: not a known trace format ({', '.join(FORMATS)}); the file starts with {found!r}"
    )


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:  # once: it may be a pipe
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(file) if packed else file as raw, TextIOWrapper(raw, "utf-8-sig") as text:
                yield from text
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: no UTF-8, or no path
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
