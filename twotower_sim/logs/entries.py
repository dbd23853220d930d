"""A log file's entries: JSON objects where it holds JSON, one or many, else lines of text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from twotower_sim.errors import InputError
from twotower_sim.text_file import lines

Entry = tuple[str, Any]
"""Where it stands, as "file:line"; a JSON object as dict, or a line as str."""


def entries(path: Path) -> Iterator[Entry]:
    """Plain or gzip. JSON is one document (an object, or a list of them) or an object a line. Raises InputError."""
    text = "".join(lines(path))
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
