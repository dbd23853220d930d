"""Lines of a text file, plain, gzip or Zstandard, in bounded memory whatever the file holds."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from twotower_sim.errors import InputError

CHUNK = 1 << 20
LONGEST_LINE = 64 << 20
"""Bytes, or so."""
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200
"""A file that unpacks to more bytes than this and to so many times its size is no trace; text packs 3 to 50 times."""


def lines(path: Path) -> Iterator[str]:
    """With their ends. Raises InputError where the file cannot be read, is no UTF-8, or is not meant to be read."""
    try:
        with path.open("rb") as file:  # once: it may be a pipe
            unpacked = _unpacked(file)
            yield from _lines(_guarded(unpacked, file, path) if unpacked is not file else _chunks(file), path)
    except (OSError, EOFError, zlib.error, ValueError, zstd().ZstdError) as error:  # ValueError: no UTF-8, or no path
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _unpacked(file: Any) -> Any:
    head = file.peek(4)[:4]
    if head[:2] == b"\x1f\x8b":
        return gzip.open(file)
    return zstd().open(file) if head == b"\x28\xb5\x2f\xfd" else file


def zstd() -> Any:
    from backports import zstd  # compression.zstd from Python 3.14 on

    return zstd


def _chunks(raw: IO[bytes]) -> Iterator[bytes]:
    while chunk := raw.read(CHUNK):
        yield chunk


def _guarded(unpacked: IO[bytes], file: IO[bytes], path: Path) -> Iterator[bytes]:
    """What is unpacked, unless it is out of all proportion to what is read of the file."""
    total = 0
    for chunk in _chunks(unpacked):
        total += len(chunk)
        if total > BOMB_BYTES and file.seekable() and total > BOMB_RATIO * file.tell():
            raise InputError(
                f"{path}: unpacks to more than {BOMB_RATIO} times its size, {total >> 20:,} MiB so far; expected text"
            )
        yield chunk


def _lines(chunks: Iterator[bytes], path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    begun, number = "", 0
    for chunk in chunks:
        text = begun + decoder.decode(chunk)
        whole, end, begun = text.rpartition("\n")
        if end:
            parts = whole.split("\n")
            number += len(parts)
            for part in parts:
                yield part + "\n"
        if len(begun) > LONGEST_LINE:
            raise InputError(f"{path}:{number + 1}: a line of more than {LONGEST_LINE >> 20} MiB; expected a request")
    if begun := begun + decoder.decode(b"", final=True):
        yield begun
