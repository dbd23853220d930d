"""What a trace is like, in figures: rates, lengths, bursts, shared prefixes, sessions, and what looks odd."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from twotower_sim.fingerprint.bursts import FEWEST_WINDOWS, dispersion
from twotower_sim.kv_cache import seen_before
from twotower_sim.readers import Trace
from twotower_sim.requests import Prefixes, Requests
from twotower_sim.workload import quantum_ns, spread

QUANTILES = (1, 10, 50, 90, 99, 100)
WINDOWS_S = (1, 10, 60)
MOST_WINDOWS = 1_000_000
MINUTE_NS, DAY_NS = 60 * 10**9, 86_400 * 10**9
MANY = 0.01
"""Share of requests from which something about them is worth a word."""
LONG_GAP = 10
"""Mean gaps; of Poisson arrivals one gap in 22,000 is longer."""
CAPPED, NEAR_MOST = 10, 0.9
"""So many lengths that are the longest, and most of those that are nearly so: a limit cut them off."""
FASTEST_RPS, SHORTEST_NS, LONGEST_NS = 10_000, 10**9, 366 * DAY_NS
"""Beyond these the units of time are probably others."""


class Spread(NamedTuple):
    mean: float
    quantiles: tuple[float, ...]  # of QUANTILES


class Gap(NamedTuple):
    after_s: float
    lasts_s: float


@dataclass(frozen=True)
class Arrivals:
    """Of time stamps that are spread over their bin where they are bunched, as a scenario spreads them."""

    span_s: float
    rate_rps: float | None  # None: all at one time
    peak: tuple[int, int]  # minute, requests in it
    bin_s: float | None  # over which they are spread; None: they are not bunched
    gap_cv: float | None
    dispersion: dict[int, float]  # by window; without those of which the span holds too few, or too many
    long_gaps: int
    longest_gap: Gap | None


@dataclass(frozen=True)
class Reuse:
    block_tokens: int
    hit_ratio: float  # of input tokens, in a cache without bounds
    shared_tokens: int  # the longest prefix of those that most requests share,
    shared_by: int  # and how many do


@dataclass(frozen=True)
class Sessions:
    count: int
    turns: Spread
    think_s: Spread | None  # from the end of what a request waits for; None: none is said
    waiting: int  # requests that wait for others
    joins: int  # for several


@dataclass(frozen=True)
class TraceStats:
    arrivals: Arrivals | None  # None: the trace does not say when sessions start
    input_tokens: Spread
    output_tokens: Spread
    rank_correlation: float | None  # Spearman's, of input and output; None: one of them is always the same
    reuse: Reuse | None
    sessions: Sessions | None
    oddities: list[str]


def describe(trace: Trace) -> TraceStats:
    requests = trace.requests
    arrivals = None if trace.relative else _arrivals(requests.arrival_ns)
    return TraceStats(
        arrivals,
        _spread(requests.input_tokens),
        _spread(requests.output_tokens),
        rank_correlation(requests.input_tokens, requests.output_tokens),
        _reuse(requests, requests.prefixes) if requests.prefixes else None,
        _sessions(requests, requests.sessions) if requests.sessions is not None else None,
        [*(_odd_times(trace, arrivals) if arrivals else ()), *_odd_lengths(requests)],
    )


def _spread(values: np.ndarray) -> Spread:
    return Spread(float(values.mean()), tuple(np.percentile(values, QUANTILES).tolist()))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's, with ties at their mean rank."""
    if (a == a[0]).all() or (b == b[0]).all():
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


# ---------------------------------------------------------------------- time


def spread_arrivals(arrival_ns: np.ndarray) -> tuple[np.ndarray, int | None]:
    """As a scenario replays them, and the bin of bunched ones."""
    bin_ns = quantum_ns(arrival_ns)
    return (spread(arrival_ns, bin_ns, seed=0), bin_ns) if bin_ns else (arrival_ns, None)


def by_minute(arrival_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minutes in which something arrives, and how many requests."""
    return np.unique(arrival_ns // MINUTE_NS, return_counts=True)


def _arrivals(recorded_ns: np.ndarray) -> Arrivals:
    arrival_ns, bin_ns = spread_arrivals(recorded_ns)
    span_s = float(arrival_ns[-1] - arrival_ns[0]) / 1e9
    minutes, counts = by_minute(arrival_ns)
    busiest = int(counts.argmax())
    gaps_s = np.diff(arrival_ns) / 1e9
    mean_s = float(gaps_s.mean()) if len(gaps_s) else 0.0
    longest = int(gaps_s.argmax()) if mean_s else None
    return Arrivals(
        span_s,
        len(arrival_ns) / span_s if span_s else None,
        (int(minutes[busiest]), int(counts[busiest])),
        bin_ns / 1e9 if bin_ns else None,
        float(gaps_s.std()) / mean_s if mean_s else None,
        {w: dispersion(arrival_ns / 1e9, w, span_s) for w in WINDOWS_S if FEWEST_WINDOWS <= span_s / w <= MOST_WINDOWS},
        int((gaps_s > LONG_GAP * mean_s).sum()) if mean_s else 0,
        None if longest is None else Gap(float(arrival_ns[longest]) / 1e9, float(gaps_s[longest])),
    )


def _odd_times(trace: Trace, of: Arrivals) -> Iterator[str]:
    arrival_ns, count = trace.requests.arrival_ns, len(trace.requests)
    if of.bin_s:
        alone = 1 - len(np.unique(arrival_ns)) / count
        yield f"time stamps are bunched: {alone:.1%} are those of another request, in steps of {of.bin_s:g} s"
    if trace.late:
        yield f"out of order: {trace.late:,} requests arrived before the one that stands before them"
    if of.longest_gap and of.long_gaps:
        after_s, lasts_s = of.longest_gap
        longest = f"the longest {lasts_s:,.4g} s, after {after_s:,.0f} s"
        yield f"nothing for more than {LONG_GAP} mean gaps: {of.long_gaps:,} times, {longest}"
    if count > 1 and of.span_s * 1e9 < SHORTEST_NS:
        yield f"spans {of.span_s:.3g} s: are time stamps in another unit?"
    elif of.span_s * 1e9 > LONGEST_NS:
        yield f"spans {of.span_s * 1e9 / DAY_NS:,.0f} days: are time stamps in another unit?"
    elif of.rate_rps and of.rate_rps > FASTEST_RPS:
        yield f"{of.rate_rps:,.0f} requests/s: are time stamps in another unit?"


# ---------------------------------------------------------------------- lengths


def _odd_lengths(requests: Requests) -> Iterator[str]:
    columns = {"input": requests.input_tokens, "output": requests.output_tokens}
    count = len(requests)
    rows = np.stack((requests.arrival_ns, *columns.values()), axis=1)
    if (again := count - len(np.unique(rows, axis=0))) > MANY * count:
        yield f"identical rows: {again:,} requests ({again / count:.1%}) have time and lengths of another"
    for name, tokens in columns.items():
        most = int(tokens.max())
        at_most, near = int((tokens == most).sum()), int((tokens >= NEAR_MOST * most).sum())
        if at_most == count > 1:
            yield f"every {name} has {most:,} tokens"
        elif at_most >= CAPPED and 2 * at_most > near:
            yield f"a cap: {at_most:,} {name}s ({at_most / count:.1%}) have {most:,} tokens, and none has more"
    ones = int((requests.output_tokens == 1).sum())
    if MANY * count < ones < count:
        yield f"outputs of one token: {ones:,} ({ones / count:.1%})"


# ---------------------------------------------------------------------- prefixes and sessions


def reused_tokens(requests: Requests) -> np.ndarray:
    """Input tokens (n,) that a cache without bounds would hold when a request comes."""
    assert requests.prefixes is not None
    prefixes = requests.prefixes
    blocks = np.diff(prefixes.first)
    request = np.repeat(np.arange(len(blocks)), blocks)
    begins = (np.arange(len(request)) - prefixes.first[request]) * prefixes.block_tokens
    held = np.minimum(requests.input_tokens[request] - begins, prefixes.block_tokens) * seen_before(prefixes)
    return np.bincount(request, held, len(blocks)).astype(np.int64)


def _reuse(requests: Requests, prefixes: Prefixes) -> Reuse:
    ratio = float(reused_tokens(requests).sum() / requests.input_tokens.sum())
    sharing = np.flatnonzero(np.diff(prefixes.first) > 0)
    depth, shared_by = 0, len(sharing)
    while len(sharing := sharing[np.diff(prefixes.first)[sharing] > depth]):
        hashes = prefixes.hashes[prefixes.first[sharing] + depth]
        values, counts = np.unique(hashes, return_counts=True)
        if depth and counts.max() < shared_by:
            break
        shared_by = int(counts.max())
        sharing = sharing[hashes == values[counts.argmax()]]
        depth += 1
    return Reuse(prefixes.block_tokens, ratio, depth * prefixes.block_tokens, shared_by)


def _sessions(requests: Requests, sessions: np.ndarray) -> Sessions:
    turns = _spread(np.unique(sessions, return_counts=True)[1])
    count, after = len(np.unique(sessions)), requests.after
    if after is None:
        return Sessions(count, turns, None, 0, 0)
    waits = np.diff(after.first)
    thought = ~after.dispatch & ~np.repeat(after.binding, waits)
    think_s = _spread(after.delay_ns[thought] / 1e9) if thought.any() else None
    return Sessions(count, turns, think_s, int((waits > 0).sum()), int((waits > 1).sum()))
