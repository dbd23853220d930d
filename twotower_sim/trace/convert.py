"""A trace, or a part of it, in another format."""

import sys
from math import inf
from pathlib import Path

from twotower_sim.errors import InputError
from twotower_sim.readers import Format, OnError, read_trace
from twotower_sim.result import all_or_nothing
from twotower_sim.trace.write import ending, write_trace
from twotower_sim.workload import skipped, window


def convert_trace(
    path: Path,
    out: Path,
    format: Format,
    on_error: OnError,
    limit: int | None,
    window_s: tuple[float, float] | None,
) -> None:
    """Write the requests of a window [from, to), the first ``limit`` of them, as ``out``'s ending says. What is lost on
    the way is said on stderr. Raises InputError."""
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
    for line in said:
        print(f"Warning: {line}", file=sys.stderr)
    print(f"{out}: {len(requests):,} requests of {path} ({found.format})")
