"""When requests arrive: drawn by the gaps between them, or by a rate that changes with time.

A Poisson process of a changing rate is one of rate 1 whose time is changed: request k arrives when the integral of the
rate reaches the k-th arrival of the latter (Çinlar, 1975). The integrals are inverted exactly, so nothing is thinned
out, and more requests do not change the first ones.
"""

from collections.abc import Callable, Sequence

import numpy as np

from twotower_sim.draws import generator
from twotower_sim.errors import InputError
from twotower_sim.requests import LATEST_NS

STAYS = 4096
MOST_STAYS = 10_000_000
"""Stays in states are drawn so many at once, and in all."""


def arrivals(count: int, seed: int, kind: str, **options) -> np.ndarray:
    """Arrival times in nanoseconds (count,), int64, never falling, of a kind in GAPS or RATES. Raises InputError."""
    if kind in GAPS:
        rate_rps = options.pop("rate_rps")
        return nanoseconds(np.cumsum(GAPS[kind](generator(seed, "arrivals"), count, **options)) * (1e9 / rate_rps))
    unit = np.cumsum(generator(seed, "arrivals").exponential(1.0, count))
    times_s = RATES[kind](unit, generator(seed, "states"), **options)
    return nanoseconds(np.maximum.accumulate(times_s) * 1e9)  # neighbours may have changed places by rounding


def nanoseconds(times: np.ndarray) -> np.ndarray:
    """Times (n,), never falling, to whole nanoseconds. Raises InputError beyond the end of the clock."""
    if times[-1] > LATEST_NS:
        raise InputError(
            f"workload: the last request would arrive after {times[-1] / 3.15e16:.3g} years; raise the rate"
        )
    return np.rint(times).astype(np.int64)


GAPS: dict[str, Callable[..., np.ndarray]] = {
    "constant": lambda rng, count: np.minimum(np.arange(count), 1.0),  # the first request comes at once
    "poisson": lambda rng, count: rng.exponential(1.0, count),
    "gamma": lambda rng, count, cv: rng.gamma(1 / cv**2, cv**2, count),
}
"""Gaps between arrivals in units of the mean gap."""


def _steps(unit: np.ndarray, rng: np.random.Generator, steps: Sequence[dict]) -> np.ndarray:
    """Constant rates one after the other, over and over; a last one without ``for_s`` stays for ever."""
    rate = np.array([step["rate_rps"] for step in steps])
    if steps[-1]["for_s"] is None:
        return _reached(unit, rate, np.zeros(len(rate)), np.array([step["for_s"] for step in steps[:-1]]))
    lasts_s = np.array([step["for_s"] for step in steps])
    rounds, unit = np.divmod(unit, rate @ lasts_s)
    return rounds * lasts_s.sum() + _reached(unit, rate, np.zeros(len(rate)), lasts_s[:-1])


def _ramp(unit: np.ndarray, rng: np.random.Generator, from_rps: float, to_rps: float, over_s: float) -> np.ndarray:
    slope = (to_rps - from_rps) / over_s
    return _reached(unit, np.array([from_rps, to_rps]), np.array([slope, 0.0]), np.array([over_s]))


def _markov(unit: np.ndarray, rng: np.random.Generator, states: Sequence[dict]) -> np.ndarray:
    """The jumps to any other state alike visit all states equally often, so a state's share of time is as its stay."""
    rates, means_s = (np.array([state[key] for state in states]) for key in ("rate_rps", "mean_s"))
    if (stays := unit[-1] * len(states) / (rates @ means_s)) > MOST_STAYS:
        raise InputError(
            f"workload.arrivals.states: the state would change {stays:.3g} times until the last request; at most "
            f"{MOST_STAYS} times are drawn: raise mean_s, or the rates"
        )
    at, passed = rng.choice(len(states), p=means_s / means_s.sum()), 0.0
    rate, lasts_s = [], []
    while passed < unit[-1]:
        path = np.concatenate(([at], at + np.cumsum(rng.integers(1, len(states), STAYS)))) % len(states)
        rate.append(rates[path[:-1]])
        lasts_s.append(rng.exponential(means_s[path[:-1]]))
        passed, at = passed + float(rate[-1] @ lasts_s[-1]), path[-1]
    return _reached(unit, np.concatenate(rate), np.zeros(len(rate) * STAYS), np.concatenate(lasts_s)[:-1])


def _diurnal(
    unit: np.ndarray,
    rng: np.random.Generator,
    rate_rps: float,
    peak_to_mean: float,
    period_s: float,
    peak_at_s: float,
) -> np.ndarray:
    """A cosine around the mean. By the angle x since the trough the rate is as 1 - a cos x, its integral x - a sin x:
    to invert it is to solve Kepler's equation."""
    swing, per_s = peak_to_mean - 1, 2 * np.pi / period_s
    start = np.pi - per_s * peak_at_s
    angle = _eccentric(start - swing * np.sin(start) + unit * (per_s / rate_rps), swing)
    return (angle - start) / per_s


def _eccentric(mean: np.ndarray, e: float) -> np.ndarray:
    """x of x - e sin x = ``mean``, 0 <= e <= 1. From a start above the solution Newton's steps on this function, convex
    from 0 to pi, come down on it; x - sin x >= x^3 / pi^2 there, so that the start is near where steps are slow."""
    turns = np.rint(mean / (2 * np.pi))
    rest = mean - turns * (2 * np.pi)
    target = np.abs(rest)
    x = np.minimum(target + e, np.cbrt(np.pi**2 * target))
    for _ in range(8):
        slope = 1 - e * np.cos(x)
        x = x - np.divide(x - e * np.sin(x) - target, slope, out=np.zeros_like(x), where=slope > 0)
    return turns * (2 * np.pi) + np.copysign(x, rest)


RATES: dict[str, Callable[..., np.ndarray]] = {
    "steps": _steps,
    "ramp": _ramp,
    "markov": _markov,
    "diurnal": _diurnal,
}
"""Seconds at which the integral of a rate reaches given values (n,), rising."""


def _reached(unit: np.ndarray, rate: np.ndarray, slope: np.ndarray, lasts_s: np.ndarray) -> np.ndarray:
    """When the integral of a rate that is linear in pieces reaches ``unit`` (n,): the pieces' rates at their beginnings
    (m,), slopes (m,), and how long all but the last take (m - 1,)."""
    begins_s = np.concatenate(([0.0], np.cumsum(lasts_s)))
    integral = (rate[:-1] + slope[:-1] * lasts_s / 2) * lasts_s
    before = np.concatenate(([0.0], np.cumsum(integral)))
    piece = np.maximum(np.searchsorted(before, unit) - 1, 0)  # never one of rate 0: nothing is reached there
    rest, rate, slope = unit - before[piece], rate[piece], slope[piece]
    end_rate = np.sqrt(np.maximum(rate**2 + 2 * slope * rest, 0.0))
    return begins_s[piece] + 2 * rest / (rate + end_rate)
