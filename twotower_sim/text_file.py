"""Lines of a text file, plain or gzip."""

import gzip
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from twotower_sim.errors import InputError


def lines(path: Path) -> Iterator[str]:
    """With their ends. Raises InputError where the file cannot be read, or is no UTF-8."""
    try:
        with path.open("rb") as file:  # once: it may be a pipe
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(file) if packed else file as raw, TextIOWrapper(raw, "utf-8-sig") as text:
                yield from text
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: no UTF-8, or no path
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
