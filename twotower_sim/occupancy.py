"""How much of something there is over time, from when each part of it begins and ends."""

import numpy as np


def mean_level(edges: np.ndarray, begin: np.ndarray, end: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Averages over the bins between ``edges`` (k + 1,) of the sum of ``amount`` (n,) of all that is there; each from
    ``begin`` until ``end`` (n,). All times have one unit, and lie near 0, lest float64 blurs them."""
    return np.diff(_passed(edges, begin, amount) - _passed(edges, end, amount)) / np.diff(edges)


def _passed(edges: np.ndarray, since: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Integrals up to each edge of what only ever begins (k,)."""
    order = np.argsort(since, kind="stable")
    since, amount = since[order].astype(float), amount[order].astype(float)
    there = np.searchsorted(since, edges)
    total, moment = (np.concatenate([[0.0], np.cumsum(of)])[there] for of in (amount, amount * since))
    return edges * total - moment
