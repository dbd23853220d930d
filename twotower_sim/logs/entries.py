"""A log file's entries: JSON objects where it holds JSON, one or many, else lines of text."""

import gzip
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import orjson

from twotower_sim.errors import InputError

Entry = tuple[str, Any]
"""Where it stands, as "file:line"; a JSON object as dict, or a line as str."""


def entries(path: Path) -> Iterator[Entry]:
    """Plain or gzip. JSON is one document (an object, or a list of them) or an object a line. Raises InputError."""
    text = _text(path)
    first = text.lstrip()[:1]
    if first not in ("{", "["):
        yield from ((f"{path}:{number}", line) for number, line in enumerate(text.splitlines(True), 1))
        return
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        yield from _lines(path, text, error)
        return
    if isinstance(document, dict):
        yield str(path), document
        return
    for index, item in enumerate(document):
        where = f"{path}: entry {index}"
        yield where, _object(where, item)


def _lines(path: Path, text: str, whole: orjson.JSONDecodeError) -> Iterator[Entry]:
    """An object a line; ``whole`` is what is wrong with the file as one document."""
    started = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            item = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if not started:  # no object a line, then
                raise InputError(f"{path}:{whole.lineno}: not JSON: {whole.msg}") from None
            raise InputError(f"{where}: not JSON: {error.msg}") from None
        started = True
        yield where, _object(where, item)


def _object(where: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InputError(f"{where}: found {item!r:.60}; expected a JSON object")
    return item


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(file) if packed else file as raw, TextIOWrapper(raw, "utf-8-sig") as text:
                return text.read()
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: no UTF-8, or no path
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
