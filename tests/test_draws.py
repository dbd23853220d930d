"""Keyed random numbers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twotower_sim.draws import STREAMS, uniform, uniform_one


def test_uniform_and_independent_along_every_part_of_the_key():
    u = uniform(1, "steps", np.arange(2000)[:, None], np.arange(200))
    n = u.size
    assert abs(u.mean() - 0.5) < 4 / (12 * n) ** 0.5
    counts = np.bincount((u * 100).astype(int).ravel(), minlength=100)
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * (2 * 99) ** 0.5  # chi squared
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / n**0.5


def test_seeds_and_streams_share_nothing():
    keys = np.arange(1000)
    assert not np.isin(uniform(1, "steps", keys), uniform(2, "steps", keys)).any()
    assert not np.isin(uniform(1, "steps", keys), uniform(1, "sizes", keys)).any()
    assert len(set(STREAMS.values())) == len(STREAMS)


@given(st.integers(0, 2**63), st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_one_draw_is_the_same_in_plain_integers(seed, key):
    assert uniform_one(seed, "router", *key) == uniform(seed, "router", *key)


def test_draws_are_pinned():
    """Results must not change between versions without notice."""
    assert uniform_one(0, "steps", 0, 0) == float(uniform(0, "steps", 0, 0))
    assert [round(uniform_one(7, "steps", r, 1), 12) for r in range(3)] == PINNED


PINNED = [0.724812010109, 0.719903430163, 0.640071618355]
