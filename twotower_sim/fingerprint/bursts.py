"""When requests arrive: a Cox process. The rate is a smooth curve over the span (which repeats) times a noise, the
weighted sum of independent gamma noises, each constant over cells of its own time scale. Their variances are fitted to
the index of dispersion (variance / mean of the counts in windows), which for Poisson arrivals is 1 at every window."""

import numpy as np
from pydantic import Field, model_validator

from twotower_sim.draws import generator, uniform
from twotower_sim.errors import InputError
from twotower_sim.fingerprint.quantiles import Part, Point
from twotower_sim.requests import LATEST_NS

MOST_BINS = 180
BINS_S = (60, 120, 300, 600, 1800, 3600, 7200, 14_400, 86_400)
WINDOWS_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
FEWEST_WINDOWS = 50  # of a length in the span, for its dispersion to be a figure
BANDWIDTHS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, np.inf)  # bins, of the kernel that smooths the curve
UNSEEN = 0.01
"""Noise that raises the index of dispersion by no more is left out: at low rates its cells are many."""
REGULAR = 0.9
"""Index of dispersion below which, and by three standard errors below 1, arrivals are more regular than Poisson."""


class Arrivals(Part):
    """``counts``: requests of each kind that are expected in each bin (with sessions: sessions that start).
    ``dispersion``: [window_s, index]. ``noise``: [scale_s, variance of the relative rate]."""

    bin_s: float = Field(ge=1e-6, le=1e9)
    counts: list[list[float]] = Field(min_length=1, max_length=16)
    dispersion: list[Point] = Field(default=[])
    noise: list[Point] = Field(default=[])

    @model_validator(mode="after")
    def _is_a_rate(self) -> "Arrivals":
        lengths = sorted({len(counts) for counts in self.counts})
        if len(lengths) != 1 or not lengths[0]:
            raise ValueError(f"counts: found {lengths} bins; expected as many of every kind")
        flat = [count for counts in self.counts for count in counts]
        if min(flat) < 0 or not 1e-3 < sum(flat) < 1e12:
            raise ValueError("counts: expected numbers from 0 on, and not only zeros")
        for name in ("dispersion", "noise"):
            if any(scale <= 0 or value < 0 for scale, value in getattr(self, name)):
                raise ValueError(f"{name}: expected [seconds above 0, number from 0 on]")
        return self

    @property
    def rate_rps(self) -> np.ndarray:
        """(kinds, bins)"""
        return np.array(self.counts) / self.bin_s


def bins_of(arrival_s: np.ndarray) -> tuple[np.ndarray, float, int]:
    """Bin of each arrival, the width that divides the span evenly, and how many there are."""
    span_s = float(arrival_s[-1]) * len(arrival_s) / (len(arrival_s) - 1)  # from 0: one mean gap beyond the last
    wanted_s = next((bin_s for bin_s in BINS_S if span_s / bin_s <= MOST_BINS), span_s / MOST_BINS)
    count = max(round(span_s / wanted_s), 1)
    return np.minimum((arrival_s / span_s * count).astype(int), count - 1), span_s / count, count


def measure_arrivals(arrival_s: np.ndarray, counts: np.ndarray, bin_s: float) -> tuple[Arrivals, list[str]]:
    """Of counts (kinds, bins) in bins of the arrivals' span; and what cannot be matched."""
    curves = np.array([_smooth(of_kind) for of_kind in counts])
    rate_rps = curves.sum(axis=0) / bin_s
    span_s = len(rate_rps) * bin_s
    windows = [w for w in WINDOWS_S if w <= max(bin_s, 60) and span_s >= FEWEST_WINDOWS * w]
    found = [dispersion(arrival_s, w, span_s) for w in windows]
    noise = _fit_noise(windows, np.array(found), rate_rps, bin_s) if windows else []
    notes = []
    bounds = [min(REGULAR, 1 - 3 * _error(w, span_s)) for w in windows]
    if regular := [f"{w}" for w, index, bound in zip(windows, found, bounds, strict=True) if index < bound]:
        notes.append(
            f"arrivals are more regular than Poisson over windows of {', '.join(regular)} s; drawn ones are not"
        )
    table = [(float(w), round(index, 4)) for w, index in zip(windows, found, strict=True)]
    rounded = [[round(float(count), 2 if count < 100 else 1) for count in curve] for curve in curves]
    return Arrivals(bin_s=round(bin_s, 6), counts=rounded, dispersion=table, noise=noise), notes


def dispersion(arrival_s: np.ndarray, window_s: float, span_s: float) -> float:
    """Index of dispersion of counts in windows that overlap by three quarters."""
    starts = np.arange(0, span_s - window_s, window_s / 4)
    counts = np.searchsorted(arrival_s, starts + window_s) - np.searchsorted(arrival_s, starts)
    return float(counts.var() / max(counts.mean(), 1e-9))


def _error(window_s, span_s):
    """Standard error of an index of dispersion of 1, relative of others."""
    return (2 * window_s / span_s) ** 0.5


def _smooth(counts: np.ndarray) -> np.ndarray:
    """Counts by bin without their own noise, which drawing adds again: a Gaussian kernel, as wide as predicts every bin
    best from the others (Poisson likelihood)."""
    if len(counts) < 4 or not counts.any():
        return counts.astype(float)
    apart = np.abs(np.subtract.outer(np.arange(len(counts)), np.arange(len(counts))))

    def curve(bandwidth: float, own: bool) -> np.ndarray:
        weights = np.exp(-0.5 * (apart / bandwidth) ** 2) * (own | (apart > 0))
        return weights @ counts / np.maximum(weights.sum(axis=1), 1e-300)

    def loss(bandwidth: float) -> float:
        expected = curve(bandwidth, own=False) + 1e-3
        return float((expected - counts * np.log(expected)).sum())

    smooth = curve(min(BANDWIDTHS, key=loss), own=True)
    return smooth * (counts.sum() / smooth.sum())


def _fit_noise(windows: list[int], found: np.ndarray, rate_rps: np.ndarray, bin_s: float) -> list[Point]:
    """Variances, none below 0, that fit the dispersion which the curve leaves unexplained by weighted least squares."""
    from scipy.optimize import nnls

    w = np.array(windows, float)
    missing = found - 1 - np.array([_dispersion_of_curve(rate_rps, bin_s, window) for window in windows])
    strength = (rate_rps**2).mean() / rate_rps.mean()
    weight = 1 / (found * _error(w, len(rate_rps) * bin_s) + 1e-9)
    variances, _ = nnls(strength * _seen(w[:, None], w[None, :]) * weight[:, None], missing * weight)
    return [(scale, float(f"{v:.4g}")) for scale, v in zip(w.tolist(), variances, strict=True) if v > 1e-6]


def _seen(window, scale):
    """Seconds by which noise of variance 1 on cells of ``scale``, at any phase, raises the index of dispersion at 1/s:
    the mean over phases of the squared overlaps, by the window."""
    return np.where(window <= scale, window - window**2 / (3 * scale), scale - scale**2 / (3 * window))


def _dispersion_of_curve(rate_rps: np.ndarray, bin_s: float, window_s: float) -> float:
    edges = np.arange(len(rate_rps) + 1) * bin_s
    total = np.concatenate(([0], np.cumsum(rate_rps * bin_s)))
    starts = np.arange(0, edges[-1] - window_s, window_s / 4)
    means = np.interp(starts + window_s, edges, total) - np.interp(starts, edges, total)
    return float(means.var() / means.mean())


# ---------------------------------------------------------------------- drawing


def draw_arrivals(arrivals: Arrivals, count: int, rate_scale: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Times in seconds and kinds of so many arrivals. ``rate_scale`` multiplies the rate at every moment, curve and
    noise alike: the curve takes as long as before, and the index of dispersion less 1 grows with the rate. Raises
    InputError."""
    rate_rps = arrivals.rate_rps.sum(axis=0) * rate_scale
    unit = np.cumsum(generator(seed, "arrivals").exponential(1.0, count))
    span_s = 1.1 * unit[-1] / rate_rps.mean() + arrivals.bin_s
    if span_s * 1e9 > LATEST_NS:
        raise InputError(f"the last request would arrive after {span_s / 3.15e7:.3g} years; raise rate_scale")
    seen = [i for i, (scale, variance) in enumerate(arrivals.noise) if rate_rps.mean() * variance * scale > UNSEEN]
    while True:
        edges, expected = _cumulative(arrivals, rate_rps, seen, span_s, seed)
        if expected[-1] >= unit[-1]:
            break
        span_s *= 1.5
    times_s = np.interp(unit, expected, edges)
    bins = (times_s / arrivals.bin_s).astype(int) % len(rate_rps)
    upto = np.cumsum(arrivals.rate_rps, axis=0)[:, bins]
    kinds = (uniform(seed, "kind", np.arange(count)) * upto[-1] >= upto).sum(axis=0)
    return times_s, np.minimum(kinds, len(upto) - 1)


def _cumulative(
    arrivals: Arrivals, rate_rps: np.ndarray, noise: list[int], span_s: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Times between which the rate is constant, and the arrivals expected until each of them; with these entries of
    ``arrivals.noise``."""
    phases = uniform(seed, "noise", np.arange(len(arrivals.noise)))
    cells = [_cells(arrivals.noise[i][0], phases[i], span_s) for i in noise]
    edges = np.unique(np.concatenate([_cells(arrivals.bin_s, 0.0, span_s), *cells]))
    middle = (edges[1:] + edges[:-1]) / 2
    rate = rate_rps[(middle / arrivals.bin_s).astype(int) % len(rate_rps)]
    if noise:
        rate = rate * _noise({i: arrivals.noise[i] for i in noise}, phases, middle, seed)
    return edges, np.concatenate(([0], np.cumsum(rate * np.diff(edges))))


def _cells(scale_s: float, phase: float, span_s: float) -> np.ndarray:
    return np.maximum((np.arange(int(span_s / scale_s) + 3) - phase) * scale_s, 0.0)


def _noise(noise: dict[int, Point], phases: np.ndarray, at_s: np.ndarray, seed: int) -> np.ndarray:
    """Relative rate at rising times: with weights in proportion to the standard deviations that are asked for, all
    gammas have the same variance, and the variances add up exactly."""
    total = sum(variance**0.5 for _, variance in noise.values())
    relative = np.zeros(len(at_s))
    for i, (scale, variance) in noise.items():
        cell = (at_s / scale + phases[i]).astype(int)
        gamma = generator(seed, "noise", i).gamma(1 / total**2, total**2, int(cell[-1]) + 1)
        relative += variance**0.5 / total * gamma[cell]
    return relative
