"""A trace, or a part of it, in another format."""

import sys
from math import inf
from pathlib import Path
from typing import NamedTuple

from twotower_sim.errors import InputError
from twotower_sim.readers import Format, OnError, read_trace
from twotower_sim.result import all_or_nothing
from twotower_sim.trace.write import ending, write_trace
from twotower_sim.workload import skipped, window


class Converted(NamedTuple):
    """How many requests were written, the format that they were read in, and what did not come along."""

    requests: int
    format: str
    warnings: list[str]


def convert_trace(
    path: Path,
    out: Path,
    format: Format,
    on_error: OnError,
    limit: int | None,
    window_s: tuple[float, float] | None,
) -> None:
    """Convert, and print what happened; what is lost on the way is said on stderr. Raises InputError."""
    done = converted(path, out, format, on_error, limit, window_s)
    for line in done.warnings:
        print(f"Warning: {line}", file=sys.stderr)
    print(f"{out}: {done.requests:,} requests of {path} ({done.format})")


def converted(
    path: Path,
    out: Path,
    format: Format,
    on_error: OnError,
    limit: int | None,
    window_s: tuple[float, float] | None,
) -> Converted:
    """Write the requests of a window [from, to), the first ``limit`` of them, as ``out``'s ending says. Raises
    InputError."""
    kind = ending(out)
    if window_s and not (0 <= window_s[0] < inf and window_s[0] < window_s[1]):
        raise InputError(f"--window: found {window_s[0]:g} {window_s[1]:g}; expected seconds from 0 on, rising")
    with all_or_nothing() as stage:
        staged = stage(out)
        found = read_trace(path, format, on_error)
        if found.relative:
            raise InputError(
                f"{path}: says when turns come after the start of their session, but not when sessions start, which "
                "other formats hold; replay it with workload.session_starts"
            )
        requests = window(found.requests, window_s, path) if window_s else found.requests
        requests = requests.take(slice(limit))
        said = skipped(found) + [f"not in {out}: {lost}" for lost in write_trace(requests, staged, kind)]
    return Converted(len(requests), found.format, said)
