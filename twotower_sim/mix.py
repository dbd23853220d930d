"""Several loads at once, each with arrivals of its own: chat beside batch work, one trace beside another."""

from dataclasses import dataclass

import numpy as np

from twotower_sim.errors import InputError
from twotower_sim.requests import Requests, merged
from twotower_sim.workload import scaled


@dataclass(frozen=True)
class Mix:
    requests: Requests
    part: np.ndarray  # of each request, an index; the requests of a part are its first ones, in their order
    notes: list[str]


def mix(parts: dict[str, Requests], shares: dict[str, float] | None, rate_rps: float | None, limit: int | None) -> Mix:
    """Requests of all parts, until the first part ends: what comes later would be no mix. ``rate_rps``: of all
    together, else as much as their own; ``shares`` of it that the parts have, else as their own. To that end times are
    stretched (those of sessions: how often they start). ``limit``: only so many requests. Raises InputError."""
    if shares or rate_rps:
        parts = _at_rates(parts, shares, rate_rps)
    try:
        requests, part = merged(list(parts.values()))
    except InputError as error:
        raise InputError(f"workload.parts: {error}") from None
    ends_ns = {name: int(of.arrival_ns[-1]) for name, of in parts.items()}
    first = min(ends_ns, key=ends_ns.__getitem__)
    count = int(np.searchsorted(requests.arrival_ns, ends_ns[first], side="right"))
    notes = _cut_off(list(parts), first, part, count) if limit is None or limit > count else []
    kept = slice(count if limit is None else min(limit, count))
    return Mix(requests.take(kept), part[kept], notes)


def _at_rates(
    parts: dict[str, Requests], shares: dict[str, float] | None, rate_rps: float | None
) -> dict[str, Requests]:
    own = {name: _rate_rps(name, requests) for name, requests in parts.items()}
    total_rps = sum(own.values())
    shares = shares or {name: rate / total_rps for name, rate in own.items()}
    return {
        name: scaled(requests, shares[name] * (rate_rps or total_rps) / own[name]) for name, requests in parts.items()
    }


def _rate_rps(name: str, requests: Requests) -> float:
    """Gaps between requests over the time that they take."""
    span_ns = int(requests.arrival_ns[-1] - requests.arrival_ns[0])
    if not span_ns:
        raise InputError(
            f"workload.parts.{name}: its {len(requests)} requests arrive at one time, so that they have no rate to be "
            "changed; leave share and rate_rps out"
        )
    return (len(requests) - 1) * 1e9 / span_ns


def _cut_off(names: list[str], first: str, part: np.ndarray, count: int) -> list[str]:
    """A warning of what comes after the first ``count`` requests."""
    cut, of = (np.bincount(part[since:], minlength=len(names)).tolist() for since in (count, 0))
    left = [f"{cut[i]:,} of {of[i]:,} of {name}" for i, name in enumerate(names) if cut[i]]
    return [f"the mix ends where {first} does; requests left out: {', '.join(left)}"] if left else []
