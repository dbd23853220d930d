"""The requests of a run: read from a trace or drawn."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log, log1p
from pathlib import Path
from typing import Literal

import numpy as np

from twotower_sim import readers
from twotower_sim.arrivals import nanoseconds
from twotower_sim.draws import generator, uniform
from twotower_sim.errors import InputError
from twotower_sim.readers import Format, OnError, read_trace
from twotower_sim.requests import MOST_TOKENS, Requests
from twotower_sim.sessions import grown_prefixes, started, stretched

BUNCHED = 0.1
"""Share of requests with the time stamp of another from which a trace counts as quantised."""


@dataclass(frozen=True)
class Trace:
    """A part of a trace, ready to be replayed, and what was done to it."""

    requests: Requests
    notes: list[str]


def trace(
    path: Path,
    *,
    format: Format = "auto",
    on_error: OnError = "fail",
    limit: int | None = None,
    window_s: tuple[float, float] | None = None,
    rate_scale: float = 1.0,
    spread_quantised: bool = True,
    sessions: Literal["closed", "open"] = "closed",
    starts: Callable[[int], np.ndarray] | None = None,
    block_tokens: int = 16,
    seed: int = 0,
) -> Trace:
    """Read, spread bunched time stamps, cut the window [from, to), take the first ``limit``, scale the rate (of
    sessions in which a turn waits for the one before it: how often they start). ``starts`` gives when that many
    sessions start, for traces that do not say; ``sessions`` "open": nothing waits, all come at their recorded times.
    What conversations share, where a trace does not say, is taken in blocks of ``block_tokens``."""
    found = read_trace(path, format, on_error)
    requests, notes = found.requests, skipped(found)
    if found.relative:
        requests = _with_starts(requests, starts, path)
    if sessions == "open":
        requests = replace(requests, after=None)
    bin_ns = quantum_ns(requests.arrival_ns) if spread_quantised and not found.relative else None
    if bin_ns:
        requests = replace(requests, arrival_ns=spread(requests.arrival_ns, bin_ns, seed))
        notes.append(f"time stamps are bunched: spread over bins of {bin_ns / 1e9:g} s")
    if window_s is not None:
        requests = window(requests, window_s, path)
    requests = requests.take(slice(limit))
    if rate_scale != 1:
        requests = scaled(requests, rate_scale)
    if requests.sessions is not None and requests.prefixes is None:
        requests = replace(requests, prefixes=grown_prefixes(requests, block_tokens))
        notes.append("prefixes are assumed: each turn's prompt repeats the one before it and its answer")
    return Trace(requests, notes)


def skipped(found: readers.Trace) -> list[str]:
    if not found.skipped:
        return []
    first = f"; the first at {found.first_bad}" if found.first_bad else ""
    return [f"rows skipped: {', '.join(f'{count} {why}' for why, count in found.skipped.items())}{first}"]


def _with_starts(requests: Requests, starts: Callable[[int], np.ndarray] | None, path: Path) -> Requests:
    if starts is None:
        raise InputError(
            f"{path}: says when turns come after the start of their session, but not when sessions start; give "
            "workload.session_starts, as in {kind: poisson, rate_rps: 0.1}"
        )
    assert requests.sessions is not None
    return started(requests, starts(len(np.unique(requests.sessions))))


def window(requests: Requests, window_s: tuple[float, float], path: Path) -> Requests:
    inside = (requests.arrival_ns >= window_s[0] * 1e9) & (requests.arrival_ns < window_s[1] * 1e9)
    if not inside.any():
        span_s = requests.arrival_ns[-1] / 1e9
        raise InputError(f"{path}: no requests in window_s {list(window_s)}; the trace spans {span_s:.3f} s")
    requests = requests.take(inside)
    return replace(requests, arrival_ns=requests.arrival_ns - round(window_s[0] * 1e9))


def scaled(requests: Requests, rate_scale: float) -> Requests:
    """The same requests, ``rate_scale`` times as often; of sessions with turns that wait, how often they start."""
    times = requests.arrival_ns / rate_scale if requests.after is None else stretched(requests, rate_scale)
    requests = replace(requests, arrival_ns=nanoseconds(times))
    return requests.take(requests.arrival_ns.argsort(kind="stable")) if requests.after else requests


def quantum_ns(arrival_ns: np.ndarray) -> int | None:
    """The bin of bunched time stamps: a low quantile of the gaps between different ones; None if not bunched."""
    distinct = np.unique(arrival_ns)
    if len(distinct) < 2 or 1 - len(distinct) / len(arrival_ns) < BUNCHED:
        return None
    return int(np.quantile(np.diff(distinct), 0.1))


def spread(arrival_ns: np.ndarray, bin_ns: int, seed: int) -> np.ndarray:
    """Spread requests of one time stamp uniformly from it to the bin's end (or the next time stamp), in file order."""
    distinct, group = np.unique(arrival_ns, return_inverse=True)
    width = np.minimum(np.append(np.diff(distinct), bin_ns), bin_ns)
    offset = uniform(seed, "spread", np.arange(len(arrival_ns)))
    within = offset[np.lexsort((offset, group))]  # sorted inside each group; groups are contiguous already
    return arrival_ns + (within * width[group]).astype(np.int64)


def lengths(count: int, seed: int, stream: str, kind: str, **options) -> np.ndarray:
    """Token counts (count,), int64 >= 1, of a kind in LENGTHS."""
    drawn = LENGTHS[kind](generator(seed, stream), count, **options)
    if (longest := drawn.max()) > MOST_TOKENS:
        raise InputError(f"workload.{stream}_tokens: drew {longest:.3g} tokens; a request has at most {MOST_TOKENS}")
    return drawn.astype(np.int64)


def _lognormal(rng: np.random.Generator, count: int, mean: float, cv: float, max: int | None) -> np.ndarray:
    variance = log1p(cv**2)
    return np.clip(np.rint(rng.lognormal(log(mean) - variance / 2, variance**0.5, count)), 1, max)


LENGTHS: dict[str, Callable[..., np.ndarray]] = {
    "constant": lambda rng, count, value: np.full(count, value),
    "lognormal": _lognormal,
}
