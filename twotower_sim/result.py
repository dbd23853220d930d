"""Files of a run: summary.json (deterministic), requests.csv.gz, run.json (when, where, how long), timeline.

Everything is written beside its final name first and renamed at the end, so that an interrupted or failed run
leaves earlier results as they were.
"""

import json
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import simpy

from twotower_sim import __version__
from twotower_sim.errors import InputError
from twotower_sim.metrics import Columns, Results
from twotower_sim.records import NOT_YET
from twotower_sim.saturation import doubts
from twotower_sim.simulation import Run

if TYPE_CHECKING:
    import pandas

REQUEST_COLUMNS = (
    "request_id", "arrival_s", "admit_s", "first_token_s", "finish_s", "input_tokens",
    "output_tokens", "replica", "nfe", "blocks", "preemptions", "measured",
)  # fmt: skip
ROWS = 65536
_ROW = "%d" + ",%d.%09d" * 4 + ",%d" * 6 + ",%s\n"  # the fastest of Python's ways to format millions
_NEVER = f"{NOT_YET // 10**9}.{NOT_YET % 10**9:09d}"


def summary(run: Run, results: Results) -> dict[str, Any]:
    """The truth of a run as plain JSON: the same bytes for the same scenario and seed, wherever it runs."""
    scenario = run.scenario
    return {
        "name": scenario.name,
        "metrics": results.metrics,
        "counts": results.counts,
        "blocks": results.blocks,
        "utilisation": results.utilisation,
        "memory": results.memory,
        "cost": results.cost,
        "quality": results.quality,
        "classes": results.classes,
        "saturation": results.saturation,
        "provenance": run.provenance,
        "warnings": [*run.warnings, *doubts(results.saturation)],
        "scenario": scenario.model_dump(by_alias=True),
    }


@contextmanager
def all_or_nothing() -> Iterator[Callable[[Path], Path]]:
    """Gives a function from a file to the path to write it to; puts all in place at the end, removes all on failure.

    The function makes the file's folder, and raises InputError at once where the file could not be written later.
    """
    staged: dict[Path, Path] = {}
    made: list[Path] = []  # folders

    def stage(target: Path) -> Path:
        made.extend(folder for folder in target.parents if not folder.exists())
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.resolve()
        if file.exists() and not file.is_file():
            raise InputError(f"{target}: cannot be written: it is no regular file")
        if file in staged:
            raise InputError(f"{target}: cannot be written: another result goes there")
        written = file.with_name(f".{file.name}.{os.getpid()}")
        staged[file] = written
        written.touch()
        written.unlink()
        return written

    try:
        yield stage
        for target, written in staged.items():
            written.replace(target)
    except OSError as error:  # that of a full disk names no file
        targets = {str(written): target for target, written in staged.items()}
        where = targets.get(str(error.filename), error.filename) or ", ".join(map(str, staged))
        raise InputError(f"{where}: cannot be written: {error.strerror}") from None
    finally:
        for written in staged.values():
            with suppress(OSError):
                written.unlink()
        for folder in sorted(made, reverse=True):  # what is inside first
            with suppress(OSError):  # it holds results
                folder.rmdir()


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False, default=_plain) + "\n", encoding="utf-8")


def plain_json(data: dict[str, Any]) -> dict[str, Any]:
    """As it is after it was written and read."""
    return json.loads(json.dumps(data, allow_nan=False, default=_plain))


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._started, self._clock = datetime.now(UTC), time.perf_counter()

    def circumstances(self, **more: Any) -> dict[str, Any]:
        """What the results do not depend on: when, where, with which versions, ``more``, and how long it took."""
        return {
            "command": sys.argv,
            "started": self._started.isoformat(timespec="seconds"),
            "versions": {
                "twotower-sim": __version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "simpy": simpy.__version__,
            },
            "machine": {"system": platform.platform(), "processor": platform.machine()},
            **more,
            "wall_s": time.perf_counter() - self._clock,
        }


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON")


def write_requests(path: Path, columns: Columns) -> None:
    """One row a request, in order of arrival; times in seconds to the nanosecond, empty where there is none;
    ``measured``, true or false: whether it counts in the figures."""
    c = columns
    times = [c.arrival_ns, c.admit_ns, c.first_ns, c.finish_ns]
    other = [c.input_tokens, c.output_tokens, c.replica, c.nfe, c.blocks, c.preemptions]
    other.append(np.where(c.measured, "true", "false"))
    with path.open("wb") as file:
        packed = _Gzip(file)
        packed.write(",".join(REQUEST_COLUMNS) + "\n")
        for low in range(0, len(c.arrival_ns), ROWS):
            part = slice(low, low + ROWS)
            seconds = [figure.tolist() for time_ns in times for figure in np.divmod(time_ns[part], 10**9)]
            rows = zip(count(low), *seconds, *(column[part].tolist() for column in other), strict=False)
            packed.write("".join([_ROW % row for row in rows]).replace(_NEVER, ""))
        packed.close()


def requests_frame(columns: Columns) -> "pandas.DataFrame":
    """The table of ``write_requests``: times in seconds as float64, NaN where there is none; ``measured`` is bool, all
    else int64."""
    import pandas  # takes a while to import

    c = columns
    times = [np.where(of == NOT_YET, np.nan, of / 1e9) for of in (c.arrival_ns, c.admit_ns, c.first_ns, c.finish_ns)]
    counts = [c.input_tokens, c.output_tokens, c.replica, c.nfe, c.blocks, c.preemptions]
    data = [np.arange(len(c.arrival_ns)), *times, *(of.astype(np.int64) for of in counts), c.measured]
    return pandas.DataFrame(dict(zip(REQUEST_COLUMNS, data, strict=True)))


class _Gzip:
    """A gzip stream without a time stamp, so that equal content gives equal bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._pack = file, zlib.compressobj(1, wbits=31)

    def write(self, text: str) -> None:
        self._file.write(self._pack.compress(text.encode()))

    def close(self) -> None:
        self._file.write(self._pack.flush())
