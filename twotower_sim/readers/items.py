"""The items of a file: JSON objects where it holds JSON (a line each, one document, or a list of them), else the rows
of a CSV table or of a Parquet file."""

import csv
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from twotower_sim.errors import InputError
from twotower_sim.readers.rows import shown
from twotower_sim.text_file import lines

Head = dict[str, Any] | list[str]
"""The first object of a JSON file, or the names of the columns of a table."""
PARQUET_ROWS = 8192
"""That are read at once."""
DOCUMENT_BYTES = 1 << 30
"""Of JSON that is not a line an object and has to be read whole."""


Item = tuple[int, Any]
"""The number of its line, entry or row; and an object, the cells of a row, or why it is none (InputError). A family's
``parts`` may have others."""


class Items(NamedTuple):
    path: Path
    unit: str  # that is counted: "line", "entry" or "row"; "" of one document
    start: int  # place of the head
    head: Head
    rest: Iterator[Item]  # after the columns' names; of JSON, all

    def where(self, place: int) -> str:
        if self.unit == "line":
            return f"{self.path}:{place}"
        return f"{self.path}: {self.unit} {place}" if self.unit else str(self.path)


def items(path: Path) -> Items:
    """Raises InputError where a file cannot be read, is empty, or is neither JSON nor a table."""
    if path.suffix == ".parquet" or _is_parquet(path):
        return _parquet(path)
    numbered = enumerate(lines(path), 1)
    first = next(((number, line) for number, line in numbered if not line.isspace()), None)
    if first is None:
        raise InputError(f"{path}: is empty")
    if first[1].lstrip()[0] not in "{[":
        return _table(first, numbered, path)
    return _json(first, numbered, path)


# ---------------------------------------------------------------------- JSON


def _json(first: tuple[int, str], rest: Iterator[tuple[int, str]], path: Path) -> Items:
    second = next(((number, line) for number, line in rest if not line.isspace()), None)
    begun = [first, second] if second else [first]
    heads = [item for number, line in begun if isinstance(item := _object(line), dict)]
    if heads:
        return Items(path, "line", first[0], heads[0], _by_line(chain(begun, rest)))
    return _document("".join(line for _, line in _bounded(chain(begun, rest), path)), path)


def _by_line(numbered: Iterable[tuple[int, str]]) -> Iterator[Item]:
    for number, line in numbered:
        item = _object(line)
        if type(item) is dict or not line.isspace():
            yield number, item


def _object(line: str) -> dict[str, Any] | InputError:
    try:
        item = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return InputError(f"not a JSON object: {error}")
    return item if isinstance(item, dict) else InputError(f"not a JSON object: {shown(item)}")


def _bounded(numbered: Iterable[tuple[int, str]], path: Path) -> Iterator[tuple[int, str]]:
    total = 0
    for number, line in numbered:
        total += len(line)
        if total > DOCUMENT_BYTES:
            raise InputError(f"{path}: one JSON document of more than {DOCUMENT_BYTES >> 20:,} MiB; expected lines")
        yield number, line


def _document(text: str, path: Path) -> Items:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if isinstance(document, dict):
        return Items(path, "", 0, document, iter([(0, document)]))
    if not document or not isinstance(document[0], dict):
        raise InputError(f"{path}: found {text[:60].strip()!r}; expected a list of JSON objects")
    found = (
        (index, item if isinstance(item, dict) else InputError(f"not a JSON object: {shown(item)}"))
        for index, item in enumerate(document)
    )
    return Items(path, "entry", 0, document[0], found)


# ---------------------------------------------------------------------- tables


def _table(first: tuple[int, str], rest: Iterator[tuple[int, str]], path: Path) -> Items:
    offset = first[0] - 1
    rows = csv.reader(chain([first[1]], (line for _, line in rest)), strict=True)
    try:
        columns = [name.strip() for name in next(rows)]
    except csv.Error as error:
        raise InputError(f"{path}:{first[0]}: not CSV: {error}") from None
    return Items(path, "line", first[0], columns, _rows(rows, offset, len(columns)))


def _rows(rows: Any, offset: int, width: int) -> Iterator[Item]:
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield offset + rows.line_num, InputError(f"not CSV: {error}")
            continue
        if len(row) == width:
            yield offset + rows.line_num, row
        elif len(row) > 1 or (row and not row[0].isspace()):
            yield offset + rows.line_num, InputError(f"found {len(row)} columns; expected {width}")


def _is_parquet(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe can be read only once
            return False
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except (OSError, ValueError):  # said where lines are read
        return False


def _parquet(path: Path) -> Items:
    """Row by row, as a table of text would be; needs pyarrow."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise InputError(f"{path}: Parquet files need pyarrow: pip install 'twotower-sim[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError, ArrowException) as error:
        raise _unreadable(path, error) from None

    def rows() -> Iterator[Item]:
        number = 0
        try:
            for batch in file.iter_batches(PARQUET_ROWS):
                columns = [["" if value is None else str(value) for value in column.to_pylist()] for column in batch]
                for row in zip(*columns, strict=True):
                    number += 1
                    yield number, list(row)
        except (OSError, ValueError, ArrowException) as error:
            raise _unreadable(path, error) from None

    return Items(path, "row", 0, list(file.schema_arrow.names), rows())


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read: {(str(error) or type(error).__name__).splitlines()[0]:.200}")
