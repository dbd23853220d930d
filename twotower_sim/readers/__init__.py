"""Trace files in the formats that users have; each family is one small file with ``sniff`` and ``read``."""

import gzip
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from twotower_sim.errors import InputError
from twotower_sim.readers import azure, mooncake
from twotower_sim.requests import Requests

FORMATS = {"mooncake": mooncake, "azure": azure}


def read_trace(path: Path, format: str = "auto") -> Requests:
    """Requests in order of arrival (ties keep the file's order), the first at time 0.

    ``format`` is a name of FORMATS, or "auto" to go by the first line. Plain or gzip. Raises InputError that
    names file, line and field.
    """
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise InputError(f"{path}: is empty")
    reader = FORMATS[_sniff(first, path) if format == "auto" else format]
    requests = reader.read(first, lines, path)
    if not len(requests):
        raise InputError(f"{path}: holds no requests")
    order = requests.arrival_ns.argsort(kind="stable")
    requests = requests.take(order)
    return Requests(requests.arrival_ns - requests.arrival_ns[0], requests.input_tokens, requests.output_tokens)


def _sniff(first: str, path: Path) -> str:
    for name, reader in FORMATS.items():
        if reader.sniff(first):
            return name
    found = first[:60].strip()
    raise InputError(f"{path}:1: not a known trace format ({', '.join(FORMATS)}); the file starts with {found!r}")


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as raw, TextIOWrapper(raw, "utf-8-sig") as text:
            yield from text
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
