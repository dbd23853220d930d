"""What was measured so far, line by line, so that an interrupted calibration goes on where it stopped."""

import json
import os
from pathlib import Path
from typing import Any

from twotower_sim.errors import InputError


class Journal:
    """An append-only file of (key, value) lines below a header that says what they are of.

    Raises InputError where the file belongs to something else or cannot be written; a line that an interruption cut off
    is dropped.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self._entries: dict[str, Any] = {}
        head = json.dumps(header, sort_keys=True)
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            if lines and not lines[-1].endswith("\n"):
                os.truncate(path, sum(len(line.encode()) for line in lines[:-1]))
                lines = lines[:-1]
            if lines and lines[0].rstrip("\n") != head:
                raise InputError(
                    f"{path}: a calibration with other settings stopped here ({_difference(lines[0], header)}); "
                    "repeat it, or drop what it has with --fresh"
                )
            for number, line in enumerate(lines[1:], 2):
                self._read(line, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            if not lines:
                self._write(head)
        except OSError as error:
            raise InputError(f"{path}: cannot be used: {error.strerror}") from None

    def _read(self, line: str, number: int) -> None:
        try:
            key, value = json.loads(line)
        except ValueError:
            raise InputError(f"{self.path}:{number}: not a line of a calibration; drop the file with --fresh") from None
        self._entries[json.dumps(key)] = value

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, *key: Any) -> Any:
        """The value noted under ``key``; None if there is none."""
        return self._entries.get(json.dumps(key))

    def add(self, value: Any, *key: Any) -> None:
        self._entries[json.dumps(key)] = value
        self._write(json.dumps([key, value]))

    def _write(self, line: str) -> None:
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}; what is in it is kept") from None

    def remove(self) -> None:
        """When all of it is in a profile."""
        self._file.close()
        self.path.unlink()


def _difference(line: str, header: dict[str, Any]) -> str:
    try:
        other = json.loads(line)
    except ValueError:
        return "its first line is no header"
    keys = [key for key in header if other.get(key) != header[key]] if isinstance(other, dict) else []
    return "; ".join(f"{key} was {other.get(key)!r:.60}, is {header[key]!r:.60}" for key in keys) or "unlike this one"
