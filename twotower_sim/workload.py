"""The requests of a run: read from a trace or drawn."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log, log1p
from pathlib import Path

import numpy as np

from twotower_sim.arrivals import nanoseconds
from twotower_sim.draws import generator, uniform
from twotower_sim.errors import InputError
from twotower_sim.readers import read_trace
from twotower_sim.requests import MOST_TOKENS, Requests

BUNCHED = 0.1
"""Share of requests with the time stamp of another from which a trace counts as quantised."""


@dataclass(frozen=True)
class Trace:
    """A part of a trace, ready to be replayed, and what was done to it."""

    requests: Requests
    spread_over_s: float | None  # the bin over which bunched time stamps were spread


def trace(
    path: Path,
    format: str,
    limit: int | None,
    window_s: tuple[float, float] | None,
    rate_scale: float,
    spread_quantised: bool,
    seed: int,
) -> Trace:
    """Read, spread bunched time stamps, cut the window [from, to), take the first ``limit``, scale the rate."""
    requests = read_trace(path, format)
    bin_ns = quantum_ns(requests.arrival_ns) if spread_quantised else None
    arrival_ns = spread(requests.arrival_ns, bin_ns, seed) if bin_ns else requests.arrival_ns
    span_s = arrival_ns[-1] / 1e9
    if window_s is not None:
        inside = (arrival_ns >= window_s[0] * 1e9) & (arrival_ns < window_s[1] * 1e9)
        if not inside.any():
            raise InputError(f"{path}: no requests in window_s {list(window_s)}; the trace spans {span_s:.3f} s")
        requests, arrival_ns = requests.take(inside), arrival_ns[inside] - round(window_s[0] * 1e9)
    arrival_ns = nanoseconds(arrival_ns[:limit] / rate_scale) if rate_scale != 1 else arrival_ns[:limit]
    requests = replace(requests.take(slice(limit)), arrival_ns=arrival_ns)
    return Trace(requests, bin_ns / 1e9 if bin_ns else None)


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
