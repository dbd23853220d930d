"""What prompts share with earlier ones, by hashes of their blocks: *common* beginnings that many prompts have (system
prompts), and prompts that *continue* an earlier one (conversations): how much of them is old, and how long ago that was
last used, which is what decides whether a cache still has it."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from pydantic import Field, field_validator, model_validator

from twotower_sim.draws import uniform
from twotower_sim.fingerprint.lengths import ranks
from twotower_sim.fingerprint.quantiles import COARSE, Part, Table, at, between, quantiles
from twotower_sim.requests import Prefixes

COMMON, FEWEST = 0.01, 10
"""Blocks are common that this share of requests begin with, and at least so many."""
MOST_COMMON = 16
SHARES = 11  # quantiles of the reused share, evenly spaced
WARM = 0.9  # of the ages: reuse is measured once so many would be seen, at the latest from half of the span on
REACH = 16_384  # latest requests among which a donor is looked for
BESIDE = 0.05
"""Of a donor: how much one more e-fold of blocks beyond the shared ones counts against an e-fold of the wrong age."""


class Common(Part):
    """A beginning of ``blocks`` blocks, of which the first ``as_previous`` are those of the entry before;
    ``shares``: of the requests that continue nothing, for each stratum of their input length."""

    blocks: int = Field(ge=1, le=1_000_000)
    as_previous: int = Field(ge=0, le=1_000_000)
    shares: list[float] = Field(min_length=1)


class Reuse(Part):
    """Lists go over strata of input length, of equally many requests. ``continues``: share of requests that continue
    an earlier one (with sessions: of later turns). ``reused``: of these, quantiles (evenly spaced from 0 to 1) of the
    share of full blocks that is old (with sessions: of the blocks of the turn before that could be).
    ``age_s``: since the old blocks were last used."""

    block_tokens: int = Field(ge=1, le=1_000_000)
    common: list[Common] = Field(default=[])
    continues: list[float] = Field(min_length=1)
    reused: list[list[float]]
    age_s: Table | None = None

    @field_validator("age_s")
    @classmethod
    def _ages(cls, table: Table | None) -> Table | None:
        return between(0, 1e9)(table) if table else table

    @model_validator(mode="after")
    def _fits_together(self) -> "Reuse":
        strata = len(self.continues)
        if len(self.reused) != strata or any(len(entry.shares) != strata for entry in self.common):
            raise ValueError(f"continues has {strata} strata; expected as many in reused and in shares of every entry")
        shares = [*self.continues, *(share for row in self.reused for share in row)]
        sums = [sum(entry.shares[s] for entry in self.common) for s in range(strata)]
        every = [share for entry in self.common for share in entry.shares]
        if min(shares + every, default=0) < 0 or max(shares + sums) > 1.001:
            raise ValueError("expected shares from 0 to 1, those of common entries in sum too")
        if any(not row or any(a > b for a, b in pairwise(row)) for row in self.reused):
            raise ValueError("reused: expected quantiles that never fall")
        if any(entry.as_previous > min(entry.blocks, before) for before, entry in self._after_one_another()):
            raise ValueError("common: as_previous is longer than an entry")
        if any(self.continues) and not self.age_s:
            raise ValueError("age_s: is missing")
        return self

    def _after_one_another(self) -> list[tuple[int, Common]]:
        return list(zip([0, *(entry.blocks for entry in self.common)], self.common, strict=False))


@dataclass(frozen=True)
class _Found:
    """Of each request: leading blocks that an earlier one had, the latest that had them all (-1: none), and leading
    blocks that are common."""

    shared: np.ndarray
    donor: np.ndarray
    common: np.ndarray
    entries: list[tuple[int, ...]]  # common beginnings, sorted
    entry: np.ndarray  # -1: none


def measure_reuse(
    prefixes: Prefixes, arrival_s: np.ndarray, input_tokens: np.ndarray, previous: np.ndarray | None, strata: int
) -> Reuse:
    """``previous``: the turn before of each request, -1 for a first one; None where sessions are not known."""
    found = _find(prefixes)
    full = input_tokens // prefixes.block_tokens
    continues = (found.shared > found.common) & (full > found.common)
    later = np.ones(len(full), bool) if previous is None else previous >= 0
    continues &= later
    age_s = arrival_s - arrival_s[found.donor]
    warm_s = min(np.quantile(age_s[continues], WARM), arrival_s[-1] / 2) if continues.any() else 0.0
    counted = arrival_s >= warm_s
    stratum = (ranks(input_tokens) * strata).astype(int)
    of_stratum = [stratum == s for s in range(strata)]
    most = _most(full, previous)
    share = np.minimum(found.shared, most) / np.maximum(most, 1)
    new = ~continues if previous is None else ~later
    entries = []
    for i, (before, path) in enumerate(pairwise([(), *found.entries])):
        shares = [_mean((found.entry == i)[of & new]) for of in of_stratum]
        entries.append(Common(blocks=len(path), as_previous=_alike(before, path), shares=shares))
    return Reuse(
        block_tokens=prefixes.block_tokens,
        common=entries,
        continues=[_mean(continues[of & counted & later]) for of in of_stratum],
        reused=[_evenly(share[of & continues & counted]) for of in of_stratum],
        age_s=quantiles(np.round(age_s[continues & counted], 3), COARSE) if continues[counted].any() else None,
    )


def _most(full: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """Blocks that a request may share: its full ones, with sessions those of the turn before at most."""
    return full if previous is None else np.where(previous >= 0, np.minimum(full, full[previous]), 0)


def _mean(of: np.ndarray) -> float:
    return round(float(of.mean()), 4) if len(of) else 0.0


def _evenly(shares: np.ndarray) -> list[float]:
    if not len(shares):
        return [0.0]
    return np.quantile(shares, np.linspace(0, 1, SHARES)).round(3).tolist()


def _alike(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _find(prefixes: Prefixes) -> _Found:
    first, hashes = prefixes.first.tolist(), prefixes.hashes.tolist()
    count = len(first) - 1
    last: dict[tuple[int, int], int] = {}
    touched: Counter[tuple[int, int]] = Counter()
    shared, donor = np.zeros(count, np.int64), np.full(count, -1)
    keys = [list(enumerate(hashes[a:b])) for a, b in pairwise(first)]
    for request, of in enumerate(keys):
        for depth, key in enumerate(of):
            if key not in last:
                break
            shared[request], donor[request] = depth + 1, last[key]
        last.update(dict.fromkeys(of, request))
        touched.update(of)
    many = {key for key, times in touched.items() if times >= max(COMMON * count, FEWEST)}
    paths = [tuple(hash for _, hash in of[: next((i for i, key in enumerate(of) if key not in many), len(of))])
             for of in keys]  # fmt: skip
    ends = Counter(path for path in paths if path)
    entries = sorted(path for path, _ in ends.most_common(MOST_COMMON))
    index = {path: i for i, path in enumerate(entries)}
    nearest = {path: next((path[:n] for n in range(len(path), 0, -1) if path[:n] in index), ()) for path in {*ends, ()}}
    entry = np.array([index.get(nearest[path], -1) for path in paths])
    return _Found(shared, donor, np.array([len(nearest[path]) for path in paths]), entries, entry)


# ---------------------------------------------------------------------- drawing


def draw_prefixes(
    reuse: Reuse,
    arrival_s: np.ndarray,
    input_tokens: np.ndarray,
    input_rank: np.ndarray,
    previous: np.ndarray | None,
    seed: int,
) -> Prefixes:
    """Of requests in order of arrival. ``previous``: the turn before of each request, -1 for a first one; None where
    sessions are not known: a request that continues one then gets, as the one that it continues, the earlier request
    whose age and length fit best and of which nobody has reused as much since."""
    count, ids = len(arrival_s), np.arange(len(arrival_s))
    blocks, full = -(-input_tokens // reuse.block_tokens), input_tokens // reuse.block_tokens
    stratum = np.minimum((input_rank * len(reuse.continues)).astype(int), len(reuse.continues) - 1)
    entry = _draw_entries(reuse, stratum, uniform(seed, "reuse", ids, 0))
    common = np.minimum([*(e.blocks for e in reuse.common), 0], full[:, None])[ids, entry]
    wanted = uniform(seed, "reuse", ids, 1) < np.array(reuse.continues)[stratum]
    share = _draw_shares(reuse, stratum, uniform(seed, "reuse", ids, 2))
    most = _most(full, previous)
    shared = np.where(wanted, np.minimum(np.maximum(np.rint(share * most).astype(np.int64), 1), most), 0)
    if previous is None:
        age_s = at(reuse.age_s or [(0, 0), (1, 0)], uniform(seed, "age", ids))
        age_s[~wanted | (age_s > arrival_s)] = np.inf  # what would be continued is from before the first request
        donor, shared = _donors(age_s, arrival_s, shared, full, common)
    else:
        donor = np.where(wanted, previous, -1)
    return _hashes(reuse, blocks, entry, common, donor, shared, count)


def _draw_entries(reuse: Reuse, stratum: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Common beginning of each request that continues nothing; len(common): none."""
    shares = np.array([entry.shares for entry in reuse.common]).reshape(len(reuse.common), len(reuse.continues))
    return (u >= np.cumsum(shares, axis=0)[:, stratum]).sum(axis=0)


def _draw_shares(reuse: Reuse, stratum: np.ndarray, u: np.ndarray) -> np.ndarray:
    share = np.zeros(len(stratum))
    for s, row in enumerate(reuse.reused):
        of = stratum == s
        share[of] = np.interp(u[of], np.linspace(0, 1, len(row)), row)
    return share


def _donors(
    age_s: np.ndarray, arrival_s: np.ndarray, shared: np.ndarray, full: np.ndarray, common: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whom each request continues (-1: nobody, as where the age is infinite), and how many blocks it shares. A donor
    that gave some blocks was used later than it arrived, so it can only give more; common blocks always were."""
    donor, since = np.full(len(age_s), -1), common.copy()
    for request in np.flatnonzero(np.isfinite(age_s)).tolist():
        near, blocks = slice(max(request - REACH, 0), request), shared[request]
        fits = np.flatnonzero((full[near] >= blocks) & (since[near] < blocks)) + near.start
        if not len(fits):
            continue
        apart = np.abs(np.log((arrival_s[request] - arrival_s[fits] + 1) / (age_s[request] + 1)))
        best = fits[(apart + BESIDE * np.log(full[fits] - blocks + 1)).argmin()]
        donor[request], since[best], since[request] = best, blocks, common[best]
    return donor, np.where(donor >= 0, shared, 0)


def _hashes(reuse: Reuse, blocks, entry, common, donor, shared, count: int) -> Prefixes:
    """A new hash for every block that is neither a donor's nor a common beginning's."""
    first = np.concatenate(([0], np.cumsum(blocks)))
    beginnings, unused = [np.empty(0, np.int64)], 0
    for each in reuse.common:
        own = np.arange(unused, unused + each.blocks - each.as_previous)
        beginnings.append(np.concatenate((beginnings[-1][: each.as_previous], own)))
        unused += len(own)
    beginnings = [*beginnings[1:], beginnings[0]]
    hashes = np.arange(unused, unused + first[-1])
    for request in range(count):
        start = first[request]
        if donor[request] >= 0:
            old = hashes[first[donor[request]] :][: shared[request]]
        else:
            old = beginnings[entry[request]][: common[request]]
        hashes[start : start + len(old)] = old
    return Prefixes(first, hashes, reuse.block_tokens)
