"""Results kept by what they follow from, one packed file each, so that nothing is computed twice.

Files appear whole under their names, whoever else writes; one that is damaged counts as not there.
"""

import json
import os
import tempfile
import zlib
from contextlib import suppress
from gzip import compress, decompress
from pathlib import Path
from typing import Any

from twotower_sim.errors import InputError

CACHE = Path("out/cache")
"""Where results are kept unless another folder is asked for."""


class ResultCache:
    def __init__(self, folder: Path | None) -> None:
        """``folder``: made when it is needed; None: nothing is kept."""
        self.folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        try:
            entry = json.loads(decompress(self._file(self.folder, key).read_bytes()))
            return entry["result"] if entry["key"] == key else None
        except (OSError, EOFError, zlib.error, ValueError, RecursionError, LookupError, TypeError):
            return None

    def put(self, key: str, result: dict[str, Any]) -> None:
        """``result``: plain JSON. Raises InputError where it cannot be kept."""
        if self.folder is None:
            return
        file = self._file(self.folder, key)
        packed = compress(json.dumps({"key": key, "result": result}, allow_nan=False).encode(), mtime=0)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(prefix=f".{key[:8]}.", dir=file.parent)
            try:
                with os.fdopen(handle, "wb") as opened:
                    opened.write(packed)
                os.replace(beside, file)
            except BaseException:
                with suppress(OSError):
                    os.unlink(beside)
                raise
        except OSError as error:
            raise InputError(f"{file}: cannot be written: {error.strerror}") from None

    def _file(self, folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json.gz"
