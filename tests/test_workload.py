"""Drawn load, and what is done to traces before they are replayed."""

import numpy as np
import pytest
from conftest import ROOT

from twotower_sim.arrivals import arrivals
from twotower_sim.errors import InputError
from twotower_sim.workload import lengths, quantum_ns, spread, trace

EXAMPLE = ROOT / "traces" / "examples" / "azure.csv"
S = 1_000_000_000


def part(**options):
    return trace(EXAMPLE, **options).requests


def test_lognormal_lengths():
    drawn = lengths(100_000, 1, "input", kind="lognormal", mean=1000.0, cv=0.8, max=None)
    assert drawn.mean() == pytest.approx(1000, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(0.8, rel=0.03)
    assert drawn.min() >= 1
    cut = lengths(100_000, 1, "input", kind="lognormal", mean=1000.0, cv=0.8, max=1500)
    assert cut.max() == 1500


def test_longer_draws_begin_as_shorter_ones():
    """More requests do not change the first ones."""
    options = {"kind": "lognormal", "mean": 100.0, "cv": 1.0, "max": None}
    few, many = (lengths(n, 5, "output", **options) for n in (10, 1000))
    assert few.tolist() == many[:10].tolist()
    few, many = (arrivals(n, 5, kind="poisson", rate_rps=3.0) for n in (10, 1000))
    assert few.tolist() == many[:10].tolist()


def test_limit_window_and_rate():
    assert part().arrival_ns.tolist() == [0, 4_314_579_000, 4_500_000_000]
    assert part(limit=2).input_tokens.tolist() == [374, 396]
    assert part(window_s=(4, 5)).arrival_ns.tolist() == [314_579_000, 500_000_000]
    assert part(window_s=(4, 4.5)).input_tokens.tolist() == [396]  # the end is not inside
    assert part(rate_scale=2.0).arrival_ns.tolist() == [0, 2_157_289_500, 2_250_000_000]
    with pytest.raises(InputError, match=r"no requests in window_s \[10, 20\]; the trace spans 4.500 s"):
        part(window_s=(10, 20))


def bunched(requests=3000, bin_s=3, jitter_ms=3):
    """Stamps like Mooncake's: a bunch every three seconds, give or take some milliseconds."""
    rng = np.random.default_rng(0)
    bunch = np.sort(rng.integers(0, requests // 10, requests))
    jitter = rng.integers(0, jitter_ms, requests // 10)
    return (bunch * bin_s * 1000 + jitter[bunch]) * 1_000_000


def test_bunched_stamps_are_found_and_spread_over_their_bin():
    stamps = bunched()
    quantum = quantum_ns(stamps)
    assert 2.99 * S < quantum <= 3.003 * S
    moved = spread(stamps, quantum, seed=1)
    assert (np.diff(moved) >= 0).all()
    assert ((moved - stamps >= 0) & (moved - stamps < quantum)).all()
    assert (moved - stamps).mean() == pytest.approx(1.5 * S, rel=0.03)
    gaps = np.diff(moved)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.1)  # as good as Poisson


def test_stamps_that_are_not_bunched_stay():
    assert quantum_ns(arrivals(5000, 1, kind="poisson", rate_rps=100.0)) is None
    assert quantum_ns(np.zeros(100, np.int64)) is None  # all at once is a batch, not a clock


def test_the_real_traces(data):
    mooncake = trace(data / "traces" / "mooncake_conversation_trace.jsonl.gz")
    assert mooncake.notes == ["time stamps are bunched: spread over bins of 2.999 s"]
    assert len(np.unique(mooncake.requests.arrival_ns)) > 12_000
    azure = trace(data / "traces" / "AzureLLMInferenceTrace_conv.csv.gz")
    assert not azure.notes
