"""Is a run's load one that its deployment can bear? Percentiles of a run that falls behind are those of its length.

All figures are dimensionless, and of the window in which the measured requests arrived:

- queue_growth: the slope of the work that waits for admission, as a share of the rate at which work arrived. Work of a
  request is its output tokens. Below capacity it is about 0; at a load of rho > 1 it tends to 1 - 1 / rho.
- outstanding_growth: the same of all work that is not finished, once the first requests had time to come and go. Where
  seats bound the batch it says what queue_growth does; where they do not, the batch grows instead of the queue.
- wait_growth: how much longer the last tenth of the requests waited for admission than the first tenth, as a share of
  the window. First come, first served at a load of rho > 1 it tends to rho - 1.
- limit: what these may reach by chance: the relative standard deviation of the work that arrives in the window. It
  is that of as many Poisson arrivals at least, and 2 %; what uneven arrivals add is taken up to 6 %.

BACKLOGGED: one of them is beyond the limit (outstanding_growth only if the last requests also took 1.5 times as long as
the first, wait_growth only if they waited three times as long: else a short run is filling up, or was slow throughout).
OVERLOADED: moreover the growth went on for the whole window, so that the queue was never empty in its second half (or,
without a queue, outstanding work never fell to what it was in the first quarter), and after the last arrival it took
more than the limit, as a share of the window, to finish what was left. STABLE: all else, and every closed loop, whose
users wait for it.

Turns that wait for others come later where work piles up: they hide it. So the work of a conversation counts from its
start on, and the window ends when the last one starts.

``settled``: the window is at least 5 times as long as the median request took (2 times as long as the median
conversation). In a shorter one a batch may fill up without end, and STABLE says little: in trials with 16 replicas a
load of 1.5 times what they bear was never found out in windows of 1.5 latencies, and always in windows of 3.7.

Near capacity the verdict is one of luck. A load 10 % below or above it is told apart from some 2,000 requests on, if it
is as steady as Poisson arrivals; the more uneven, the more requests it takes.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from twotower_sim.occupancy import mean_level

STABLE, BACKLOGGED, OVERLOADED = "STABLE", "BACKLOGGED", "OVERLOADED"
BINS = 20
LEAST_LIMIT, MOST_UNEVEN = 0.02, 0.06
LATENCY_RATIO, WAIT_RATIO = 1.5, 3.0
REQUESTS_LONG, CONVERSATIONS_LONG = 5.0, 2.0  # of a window that settles


@dataclass(frozen=True)
class Saturation:
    """A verdict and what it was judged by; None of a closed loop, and where all requests arrive at once."""

    verdict: str
    queue_growth: float | None = None
    outstanding_growth: float | None = None
    wait_growth: float | None = None
    limit: float | None = None
    window_s: float | None = None
    drain_s: float | None = None
    settled: bool | None = None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def doubts(of: dict[str, Any]) -> list[str]:
    """What to say of a plain Saturation beside its verdict."""
    if of["verdict"] != STABLE or of["settled"] is not False:
        return []
    return ["the load arrived in too short a time to settle, so that STABLE says little: take more requests"]


def judge_conversations(
    arrival_ns: np.ndarray,
    admit_ns: np.ndarray,
    finish_ns: np.ndarray,
    work: np.ndarray,
    measured: np.ndarray,
    starts: np.ndarray,
    sessions: np.ndarray,
) -> Saturation:
    """Of open load in which turns wait for others, as ``judge_open``; ``starts``: bool (n,), of requests that wait for
    nothing; ``sessions``: number of the conversation of each, from 0."""
    if not (starts & measured).any():
        return judge_open(arrival_ns, admit_ns, finish_ns, work, measured)
    first_ns = np.full(sessions.max() + 1, arrival_ns.max())
    np.minimum.at(first_ns, sessions, arrival_ns)
    since_ns = first_ns[sessions]
    last_ns = arrival_ns[starts & measured].max()
    judged = judge_open(arrival_ns, admit_ns, finish_ns, work, measured & (arrival_ns <= last_ns), since_ns)
    if not judged.window_s:
        return judged
    lasted_ns = np.zeros(len(first_ns), np.int64)
    np.maximum.at(lasted_ns, sessions, finish_ns - since_ns)
    lasted_s = float(np.median(lasted_ns[sessions[starts & measured]])) / 1e9
    return replace(judged, settled=judged.window_s >= CONVERSATIONS_LONG * lasted_s)


def judge_open(
    arrival_ns: np.ndarray,
    admit_ns: np.ndarray,
    finish_ns: np.ndarray,
    work: np.ndarray,
    measured: np.ndarray,
    since_ns: np.ndarray | None = None,
) -> Saturation:
    """Of open load: columns (n,) of all requests that were served, in any order; ``measured``: bool, one at least;
    ``since_ns``: when a request's work was certain to come, if that was before it arrived."""
    origin = arrival_ns[measured].min()
    arrival_s, admit_s, finish_s = ((of - origin) / 1e9 for of in (arrival_ns, admit_ns, finish_ns))
    since_s = arrival_s if since_ns is None else (since_ns - origin) / 1e9
    window_s = float(arrival_s[measured].max())
    drain_s = float(finish_s.max() - arrival_s.max())
    if not window_s:
        return Saturation(
            OVERLOADED if (admit_s > arrival_s)[measured].any() else STABLE, window_s=0.0, drain_s=drain_s
        )
    edges = np.linspace(0, window_s, BINS + 1)
    arrived = np.histogram(since_s, edges, weights=work)[0]
    rate = arrived.sum() / window_s
    limit = _limit(arrived, int(measured.sum()) if since_ns is None else len(np.unique(since_ns[measured])))

    order = np.flatnonzero(measured)[np.argsort(since_s[measured], kind="stable")]
    tenth = max(len(order) // 10, 1)
    first, last = order[:tenth], order[-tenth:]
    wait_s, latency_s = admit_s - arrival_s, finish_s - since_s
    waited, took = ([float(of[part].mean()) for part in (first, last)] for of in (wait_s, latency_s))

    filled_s = min(2 * float(np.median(latency_s[first])), window_s / 2)
    late = np.linspace(filled_s, window_s, BINS + 1)
    outstanding = mean_level(late, since_s, finish_s, work)
    queue_growth = _slope(mean_level(edges, arrival_s, admit_s, work), window_s) / rate
    outstanding_growth = _slope(outstanding, window_s - filled_s) / rate
    wait_growth = (waited[1] - waited[0]) / window_s

    queues = queue_growth > limit
    batch_grows = outstanding_growth > limit and took[1] > LATENCY_RATIO * took[0]
    waits_grow = wait_growth > limit and waited[1] > WAIT_RATIO * waited[0]
    throughout = (queues and not _emptied(arrival_s, admit_s, window_s / 2, window_s)) or (
        batch_grows and outstanding[BINS // 2 :].min() > outstanding[: BINS // 4].mean()
    )
    verdict = STABLE
    if queues or batch_grows or waits_grow:
        verdict = OVERLOADED if throughout and drain_s > limit * window_s else BACKLOGGED
    settled = window_s >= REQUESTS_LONG * float(np.median(latency_s[measured]))
    return Saturation(verdict, queue_growth, outstanding_growth, wait_growth, limit, window_s, drain_s, settled)


def _limit(arrived: np.ndarray, requests: int) -> float:
    """From the work that arrived in each bin."""
    uneven = float(arrived.std(ddof=1) / arrived.mean() / len(arrived) ** 0.5)
    return max(LEAST_LIMIT, requests**-0.5, min(uneven, MOST_UNEVEN))


def _slope(level: np.ndarray, span_s: float) -> float:
    """Of a straight line through averages over equal bins that make up a span, by least squares."""
    middle_s = (np.arange(len(level)) + 0.5) * (span_s / len(level))
    middle_s -= middle_s.mean()
    return float(middle_s @ level / (middle_s @ middle_s))


def _emptied(arrival_s: np.ndarray, admit_s: np.ndarray, low_s: float, high_s: float) -> bool:
    """Whether nobody waited at some moment of [low_s, high_s)."""
    arrivals, admissions = np.sort(arrival_s), np.sort(admit_s)
    if np.searchsorted(arrivals, low_s, "right") == np.searchsorted(admissions, low_s, "right"):
        return True
    within = np.flatnonzero((admissions >= low_s) & (admissions < high_s))
    return bool((np.searchsorted(arrivals, admissions[within], "right") == within + 1).any())
