"""When requests arrive: mean rates, dispersion and inverses against theory, seeds, and bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower_sim.arrivals import RATES, _eccentric, arrivals
from twotower_sim.draws import generator
from twotower_sim.errors import InputError
from twotower_sim.scenario import load_scenario

S = 1_000_000_000
BURSTS = [{"rate_rps": 1.0, "mean_s": 30.0}, {"rate_rps": 20.0, "mean_s": 10.0}]
EVERY = [
    {"kind": "poisson", "rate_rps": 4.0},
    {"kind": "gamma", "rate_rps": 4.0, "cv": 2.0},
    {"kind": "constant", "rate_rps": 4.0},
    {"kind": "markov", "states": BURSTS},
    {"kind": "diurnal", "rate_rps": 4.0, "peak_to_mean": 2.0, "period_s": 60.0, "peak_at_s": 20.0},
    {"kind": "ramp", "from_rps": 9.0, "to_rps": 0.5, "over_s": 30.0},
    {"kind": "steps", "steps": [{"rate_rps": 0.0, "for_s": 5.0}, {"rate_rps": 5.0, "for_s": 20.0}]},
]


def reach(kind: str, unit, **options) -> np.ndarray:
    """Seconds at which the integral of a rate reaches given values."""
    return RATES[kind](np.asarray(unit, float), generator(0, "states"), **options)


def counts(kind: str, count: int, edges_s: np.ndarray, **options) -> np.ndarray:
    """Arrivals between edges, of a process that goes on beyond the last edge."""
    times_s = arrivals(count, 3, kind=kind, **options) / 1e9
    assert times_s[-1] > edges_s[-1]
    return np.histogram(times_s, edges_s)[0]


def assert_poisson(found: np.ndarray, expected: np.ndarray) -> None:
    """Counts of independent Poisson numbers: chi squared within five standard deviations."""
    chi = ((found - expected) ** 2 / expected).sum()
    assert abs(chi - len(found)) < 5 * (2 * len(found)) ** 0.5


def test_poisson():
    gaps = np.diff(arrivals(50_000, 1, kind="poisson", rate_rps=4.0)) / 1e9
    assert gaps.mean() == pytest.approx(0.25, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gamma(cv):
    gaps = np.diff(arrivals(100_000, 1, kind="gamma", rate_rps=4.0, cv=cv)) / 1e9
    assert gaps.mean() == pytest.approx(0.25, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_constant_starts_at_once():
    assert arrivals(3, 1, kind="constant", rate_rps=8.0).tolist() == [0, S // 8, S // 4]


@pytest.mark.parametrize("options", EVERY, ids=lambda options: options["kind"])
def test_seeds_order_and_longer_draws(options):
    """More requests do not change the first ones; another seed changes all that is drawn."""
    few, many = arrivals(10, 5, **options), arrivals(30_000, 5, **options)
    assert few.tolist() == many[:10].tolist()
    assert (np.diff(many) >= 0).all()
    assert many[0] >= 0
    other = arrivals(30_000, 6, **options)
    assert (options["kind"] == "constant") == (other.tolist() == many.tolist())


# ---------------------------------------------------------------------- steps


def test_steps_have_their_rates():
    steps = [{"rate_rps": 50.0, "for_s": 40.0}, {"rate_rps": 0.0, "for_s": 10.0}, {"rate_rps": 5.0, "for_s": 50.0}]
    found = counts("steps", 230_000, np.arange(0, 10_001, 10), steps=steps).reshape(100, 10)
    assert not found[:, 4].any()
    assert_poisson(found[:, :4].ravel(), np.full(400, 500.0))
    assert_poisson(found[:, 5:].ravel(), np.full(500, 50.0))


def test_steps_are_inverted_exactly():
    steps = [{"rate_rps": 2.0, "for_s": 10.0}, {"rate_rps": 0.0, "for_s": 5.0}, {"rate_rps": 4.0, "for_s": 5.0}]
    at = [1, 20, 20.5, 40, 41, 60, 61]
    assert reach("steps", at, steps=steps).tolist() == [0.5, 10, 15.125, 20, 20.5, 30, 35.25]
    last = [*steps[:2], {"rate_rps": 4.0, "for_s": None}]
    assert reach("steps", at, steps=last).tolist() == [0.5, 10, 15.125, 20, 20.25, 25, 25.25]


def test_one_step_for_ever_is_poisson():
    steps = [{"rate_rps": 4.0, "for_s": None}]
    assert arrivals(99, 1, kind="steps", steps=steps).tolist() == arrivals(99, 1, kind="poisson", rate_rps=4.0).tolist()


# ---------------------------------------------------------------------- ramp


@pytest.mark.parametrize(("low", "high"), [(0.0, 40.0), (40.0, 2.0)])
def test_a_ramp_has_its_rate(low, high):
    edges = np.arange(0, 1001, 10.0)
    rate = np.where(edges < 500, low + (high - low) * edges / 500, high)
    expected = (rate[1:] + rate[:-1]) / 2 * 10
    assert_poisson(counts("ramp", 40_000, edges, from_rps=low, to_rps=high, over_s=500.0), expected)


def test_a_ramp_is_inverted_exactly():
    """From 0 to 10 in 5 s the integral is t^2, then 25 + 10 (t - 5); back again 10 t - t^2."""
    assert reach("ramp", [1, 4, 25, 35], from_rps=0.0, to_rps=10.0, over_s=5.0).tolist() == [1, 2, 5, 6]
    down = reach("ramp", [9, 16, 24], from_rps=10.0, to_rps=2.0, over_s=4.0)
    assert down == pytest.approx([1, 2, 4], rel=1e-12)


# ---------------------------------------------------------------------- diurnal


@pytest.mark.parametrize("peak_to_mean", [1.0, 1.6, 2.0])
def test_a_day_has_its_rate(peak_to_mean):
    edges = np.arange(0, 2001, 5.0)
    options = {"rate_rps": 20.0, "peak_to_mean": peak_to_mean, "period_s": 100.0, "peak_at_s": 30.0}
    angle = 2 * np.pi * (edges - 30) / 100
    integral = 20 * (edges + (peak_to_mean - 1) * 100 / (2 * np.pi) * np.sin(angle))
    assert_poisson(counts("diurnal", 42_000, edges, **options), np.diff(integral))


def test_a_day_has_its_peak_where_it_is_said():
    found = counts(
        "diurnal", 90_000, np.arange(0, 86_401, 3600.0), rate_rps=1.0, peak_to_mean=2.0, period_s=86_400.0,
        peak_at_s=14.5 * 3600,
    )  # fmt: skip
    assert found.argmax() in (13, 14, 15)
    assert found.argmin() in (1, 2, 3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20), st.sampled_from([0.0, 0.3, 0.9, 0.999999, 1.0]))
def test_keplers_equation(mean, e):
    x = _eccentric(np.array(mean), e)
    assert x - e * np.sin(x) == pytest.approx(mean, abs=1e-12)


# ---------------------------------------------------------------------- Markov


def test_states_have_their_shares_of_time():
    """30 s at 1/s and 10 s at 20/s are 5.75/s. Of 16,000 cycles the mean has a relative standard error of 1 %."""
    times_s = arrivals(4_000_000, 1, kind="markov", states=BURSTS) / 1e9
    assert len(times_s) / times_s[-1] == pytest.approx(5.75, rel=0.03)


def test_states_of_three_have_their_shares_of_time():
    states = [{"rate_rps": 5.0, "mean_s": 1.0}, {"rate_rps": 0.0, "mean_s": 2.0}, {"rate_rps": 20.0, "mean_s": 4.0}]
    times_s = arrivals(500_000, 2, kind="markov", states=states) / 1e9
    assert len(times_s) / times_s[-1] == pytest.approx((5 * 1 + 20 * 4) / 7, rel=0.03)


def test_states_disperse_counts_as_theory_says():
    """Index of dispersion of counts of a two-state process (Heffes & Lucantoni, 1986): variance / mean of the counts in
    t seconds is 1 + A (1 - (1 - exp(-r t)) / (r t)), r the rates of leaving both states together."""
    leave = np.array([1 / state["mean_s"] for state in BURSTS])
    rate, r = np.array([state["rate_rps"] for state in BURSTS]), leave.sum()
    share = leave[::-1] / r
    times_s = arrivals(2_000_000, 4, kind="markov", states=BURSTS) / 1e9
    for t in (1.0, 10.0, 60.0):
        found = np.histogram(times_s, np.arange(0, times_s[-1], t))[0]
        limit = 2 * share.prod() * (rate[0] - rate[1]) ** 2 / (r * (share @ rate))
        expected = 1 + limit * (1 - (1 - np.exp(-r * t)) / (r * t))
        assert found.var() / found.mean() == pytest.approx(expected, rel=0.06)  # of 5,800 windows: 2 % standard error


def test_equal_states_are_poisson():
    """However the state jumps, times differ by rounding only."""
    states = [{"rate_rps": 4.0, "mean_s": 0.1}, {"rate_rps": 4.0, "mean_s": 3.0}]
    moved = arrivals(5000, 1, kind="markov", states=states) - arrivals(5000, 1, kind="poisson", rate_rps=4.0)
    assert abs(moved).max() <= 2


def test_the_first_state_is_drawn_as_time_shares():
    """A state of 9 s in 10 is the first one in nine of ten seeds: standard error 1.5 %."""
    states = [{"rate_rps": 1000.0, "mean_s": 9.0}, {"rate_rps": 1e-3, "mean_s": 1.0}]
    first_s = np.array([arrivals(1, seed, kind="markov", states=states)[0] / 1e9 for seed in range(400)])
    assert (first_s < 0.02).mean() == pytest.approx(0.9, abs=0.06)


def test_too_many_states_are_refused():
    states = [{"rate_rps": 1e-6, "mean_s": 0.01}, {"rate_rps": 0.0, "mean_s": 0.01}]
    with pytest.raises(InputError, match=r"workload.arrivals.states: the state would change .* raise mean_s"):
        arrivals(1000, 1, kind="markov", states=states)


def test_a_rate_too_low_for_the_clock_is_refused():
    with pytest.raises(InputError, match="would arrive after .* years; raise the rate"):
        arrivals(100_000, 1, kind="ramp", from_rps=1.0, to_rps=1e-6, over_s=1.0)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{kind: markov, states: [{rate_rps: 1, mean_s: 1}]}", ".states: found ["),
        ("{kind: markov, states: [{rate_rps: 0, mean_s: 1}, {rate_rps: 0, mean_s: 1}]}", ": states: every rate_rps is 0"),
        ("{kind: markov, states: [{rate_rps: 0, mean_s: 0}, {rate_rps: 1, mean_s: 1}]}", ".states.0.mean_s: found 0"),
        (
            "{kind: markov, states: [{rate_rps: 1, mean_s: 1}, {rate: 1, mean_s: 1}]}",
            ".states.1.rate: unknown key (did you mean rate_rps?); allowed: rate_rps, mean_s",
        ),
        ("{kind: diurnal, rate_rps: 1, peak_to_mean: 2.1}", ".peak_to_mean: found 2.1"),
        ("{kind: diurnal, rate_rps: 1, peak_to_mean: 2, period_s: 0}", ".period_s: found 0"),
        ("{kind: diurnal, rate_rps: 1, peak_to_mean: 2, peak_at_s: -1}", ".peak_at_s: found -1"),
        ("{kind: ramp, from_rps: 1, to_rps: 0, over_s: 1}", ".to_rps: found 0"),
        ("{kind: ramp, from_rps: 1e-7, to_rps: 1, over_s: 1}", ".from_rps: found 1e-07; expected 0, or 1e-6 and more"),
        ("{kind: ramp, from_rps: 0, to_rps: 1}", ".over_s: is missing"),
        ("{kind: steps, steps: []}", ".steps: found []"),
        ("{kind: steps, steps: [{rate_rps: -1, for_s: 1}]}", ".steps.0.rate_rps: found -1"),
        ("{kind: steps, steps: [{rate_rps: 1}, {rate_rps: 2}]}", ": steps.0.for_s: is missing; only the last"),
        ("{kind: steps, steps: [{rate_rps: 1, for_s: 3}, {rate_rps: 0}]}", ": steps.1.rate_rps: the rate would be 0 for"),
        ("{kind: steps, steps: [{rate_rps: 0, for_s: 3}]}", ": steps.0.rate_rps: the rate would be 0 for ever"),
        ("{kind: stairs}", ".kind: found 'stairs'; allowed: poisson, gamma, constant, markov, diurnal, ramp, steps"),
    ],
)  # fmt: skip
def test_bad_arrivals_are_named(tmp_path, given, said):
    (tmp_path / "case.yaml").write_text(
        "workload:\n  kind: synthetic\n  requests: 9\n  input_tokens: {kind: constant, value: 9}\n"
        f"  output_tokens: {{kind: constant, value: 9}}\n  arrivals: {given}\n"
    )
    with pytest.raises(InputError) as error:
        load_scenario(tmp_path / "case.yaml")
    assert f"case.yaml:6: workload.arrivals{said}" in str(error.value)
