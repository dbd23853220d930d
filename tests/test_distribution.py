"""Summaries of samples against numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower_sim import distribution
from twotower_sim.distribution import PERCENTILES, Distribution, of, scalar

SAMPLES = st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=1, max_size=60)


def reference(samples):
    std = np.std(samples)
    percentiles = {f"p{p}": np.percentile(samples, p) for p in PERCENTILES}
    return {"avg": np.mean(samples), "min": min(samples), "max": max(samples), "std": std} | percentiles


def assert_close(summary, samples, rel=1e-9):
    for key, value in reference(samples).items():
        assert summary[key] == pytest.approx(value, rel=rel, abs=1e-6 * max(samples))


@given(SAMPLES)
def test_small_samples_are_exact(samples):
    summary = of(np.array(samples), "ms")
    assert (summary["unit"], summary["count"]) == ("ms", len(samples))
    assert_close(summary, samples)


@given(st.lists(st.tuples(st.floats(0.001, 1e6), st.integers(0, 5)), min_size=1, max_size=30))
def test_weights_are_repetitions(pairs):
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    weighted = Distribution()
    weighted.add(values, weights)
    repeated = np.repeat(values, weights)
    if len(repeated):
        assert_close(weighted.summary("ms"), repeated)
    else:
        assert weighted.summary("ms")["avg"] is None


def test_many_samples_in_bounded_memory(monkeypatch):
    """Beyond the limit percentiles are within 0.1 %; the other figures stay exact."""
    monkeypatch.setattr(distribution, "EXACT_SAMPLES", 1000)
    samples = np.random.default_rng(0).lognormal(3, 2, 50_000)
    samples[:10] = 0
    kept = Distribution()
    for part in np.array_split(samples, 77):
        kept.add(part)
    summary = kept.summary("ms")
    assert_close(summary, samples, rel=1e-3)
    for key in ("avg", "min", "max", "std"):
        assert summary[key] == pytest.approx(reference(samples)[key], rel=1e-9)
    assert kept._held < 20_000


def test_nothing_gives_nulls():
    empty = of(np.zeros(0), "ms")
    assert empty["count"] == 0
    assert empty["avg"] is empty["p99"] is None
    assert of(np.array([3.0]), "ms")["std"] == 0


def test_a_figure_of_the_whole_run_has_no_distribution():
    assert scalar(2.5, "requests/sec") == {"unit": "requests/sec", "avg": 2.5} | dict.fromkeys(
        ["min", "max", "std", "p50", "p75", "p90", "p95", "p99"]
    )
