"""Fit affine costs of passes to a log of a real engine, and predict what was left out of the fit.

The whole log is replayed, by the scheduling and memory rules of a scenario, whatever the coefficients. Those that fit
best the requests that arrive in the first part then predict the rest. Fitted are the logarithms of coefficients, by
least squares of log(predicted / measured) of the time to the first token and from there to the last (of the request
latency where a log does not say when the first token came).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log, sqrt
from pathlib import Path

import numpy as np

from twotower_sim.errors import InputError
from twotower_sim.fidelity import HEADLINE
from twotower_sim.log_replay import TOGETHER, Coefficients, Replay
from twotower_sim.log_start import first_guess
from twotower_sim.measurements import Measurements, figures
from twotower_sim.records import NOT_YET
from twotower_sim.scenario import Scenario

TRIED, STARTS, SPREAD = 16, 4, 0.5
"""Starts that are simulated, those of least error that are searched from, and the standard deviation of the logarithms
by which they differ."""
AS_GOOD = 1.5
"""Searches that leave at most so many times the error of the best are as good; where they end differs by chance."""
MOST_STEPS, REWEIGHTED = 40, 2  # of a search
FLAT, SHORT = 1e-4, 3e-4  # relative gain and step at which it ends
MARGIN = 0.1  # of a bound, in logarithms: one that ends within it was not found
LEAST_NOISE = 1e-4  # relative error of a time that counts as none
UNCERTAIN = 0.3
"""Standard error of a logarithm beyond which a coefficient counts as not identified."""
NOTHING = 1e-8  # relative
NOT_A_MINIMUM = 0.5  # share of the squared error that seems in reach
FAIR_ERROR, FAIR_SHARE = 0.1, 0.1
"""A fit that leaves more error and explains less of the variance explains nothing."""
LEAST_REQUESTS = 20  # of each part
RESAMPLED, CONFIDENCE, SEED = 400, 0.95, 0


# ---------------------------------------------------------------------- fit


@dataclass(frozen=True)
class Fit:
    coefficients: Coefficients
    x: np.ndarray  # logarithms of the coefficients
    standard_errors: np.ndarray  # of the logarithms
    unidentified: dict[str, str]  # by coefficient, why
    in_reach: float  # share of the squared error that the slopes say could still be had; near 0 at a minimum
    explained: dict[str, float]  # by time: share of the variance of its logarithm
    rms: dict[str, float]  # by time: error of the logarithm that is left

    @property
    def failures(self) -> list[str]:
        """Why nothing should be built on it; empty if nothing speaks against it."""
        found = []
        if self.in_reach > NOT_A_MINIMUM and max(self.rms.values()) > FAIR_ERROR:
            found.append(f"the fit did not converge: {self.in_reach:.0%} of its squared error seem in reach")
        for name, share in self.explained.items():
            if self.rms[name] > FAIR_ERROR and share < FAIR_SHARE:
                found.append(f"the fit explains {max(share, 0):.0%} of the variance of the {name}")
        return found


class _Target:
    """What is compared of the first ``cut`` requests: logarithms of two times of each, where both are there."""

    NAMES = ("time to the first token", "time from the first token to the last")

    def __init__(self, measured: Measurements, predicted: Measurements, cut: int) -> None:
        self._known, self._cut = measured.first_ns != NOT_YET, cut
        seen, said = self._times(measured), self._times(predicted)
        self._there = (seen > 0) & (said > 0)  # whether a request has a time does not depend on the coefficients
        self._seen = np.log(seen[self._there])
        self.kind, self.request = np.nonzero(self._there)

    def _times(self, of: Measurements) -> np.ndarray:
        """(2, cut) in seconds; the whole latency stands for the first where the first token is not known."""
        first = np.where(self._known, of.ttft_s, of.latency_s)
        return np.stack([first, np.where(self._known, of.decode_s, 0.0)])[:, : self._cut]

    def residuals(self, predicted: Measurements) -> np.ndarray:
        return np.log(self._times(predicted)[self._there]) - self._seen

    def slopes(self, residuals: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Of the residuals, from slopes of times (3, requests, n)."""
        first = np.where(self._known[:, None], seconds[0], seconds[2])
        rows = np.stack([first, seconds[1]])[:, : self._cut][self._there]
        return rows / np.exp(residuals + self._seen)[:, None]

    def rms(self, residuals: np.ndarray) -> np.ndarray:
        """Of each time, (2,); NaN where no request has it."""
        squares, counts = (np.bincount(self.kind, weights, minlength=2) for weights in (residuals**2, None))
        return np.sqrt(squares / np.where(counts, counts, np.nan))

    def variance(self) -> np.ndarray:
        return np.array(
            [self._seen[self.kind == kind].var() if (self.kind == kind).any() else np.nan for kind in (0, 1)]
        )


@dataclass(frozen=True)
class _Found:
    """Where a search ended."""

    x: np.ndarray
    residuals: np.ndarray
    noise: np.ndarray  # of each residual
    cost: float  # of the mean residual, in logarithms: how much noise is left


def fit(replay: Replay, cut: int, progress: Callable[[int], None]) -> Fit:
    """Fit the first ``cut`` requests; where the costs of two passes cannot be told apart, one factor ties them."""
    two = len(replay.passes) == 2 and replay.kind not in TOGETHER
    of = Coefficients(replay.passes, "factor" if two else "equal")
    found = _Search(replay, of, cut, first_guess(replay, of, cut), progress).best()
    if not two:
        return found
    free = Coefficients(replay.passes, "free")
    apart = _Search(replay, free, cut, of.parts @ found.x, progress).best(tried=1)
    unsure = any(name.startswith(replay.passes[1]) for name in apart.unidentified)
    return found if unsure or apart.failures else apart


class _Search:
    """For the coefficients of least squared error, from several starts: batches change by jumps, so there are many
    minima. Each time's errors are divided by their own size."""

    def __init__(
        self, replay: Replay, of: Coefficients, cut: int, start: np.ndarray, progress: Callable[[int], None]
    ) -> None:
        self._replay, self._of, self._progress = replay, of, progress
        self._low, self._high = of.bounds
        self._start = self._inside(start)
        self._target = _Target(replay.measured, replay.predict(of, self._start), cut)
        self._latest = self._start, np.zeros(0)  # coefficients and their residuals

    def _inside(self, x: np.ndarray) -> np.ndarray:
        return np.clip(x, self._low + MARGIN, self._high - MARGIN)

    def best(self, tried: int = TRIED) -> Fit:
        moved = np.random.default_rng(SEED).normal(0, SPREAD, (tried, len(self._start)))
        moved[0] = 0
        starts = sorted((self._inside(self._start + move) for move in moved), key=self._cost)[:STARTS]
        found = sorted((self._descend(start) for start in starts), key=lambda of: of.cost)
        found = sorted([self._descend(found[0].x), *found], key=lambda of: of.cost)
        return self._fit(found[0], [of.x for of in found if of.cost - found[0].cost < log(AS_GOOD)])

    def _cost(self, x: np.ndarray) -> float:
        return float(np.log(self._noise(self._residuals(x))).mean())

    def _residuals(self, x: np.ndarray) -> np.ndarray:
        at, found = self._latest
        if not (len(found) and np.array_equal(at, x)):
            found = self._target.residuals(self._replay.predict(self._of, x))
            self._latest = x.copy(), found
            self._progress(self._replay.count)
        return found

    def _noise(self, residuals: np.ndarray) -> np.ndarray:
        return np.maximum(self._target.rms(residuals), LEAST_NOISE)[self._target.kind]

    def _slopes(self, x: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        return self._target.slopes(residuals, self._replay.slopes(self._of, x))

    def _descend(self, x: np.ndarray) -> _Found:
        from scipy.optimize import Bounds, least_squares

        bounds, residuals = Bounds(self._low, self._high), self._residuals(x)
        for _ in range(REWEIGHTED):
            noise = self._noise(residuals)

            def errors(x: np.ndarray, noise: np.ndarray = noise) -> np.ndarray:
                return self._residuals(x) / noise

            def slopes(x: np.ndarray, noise: np.ndarray = noise) -> np.ndarray:
                return self._slopes(x, self._residuals(x)) / noise[:, None]

            found = least_squares(errors, x, slopes, bounds, max_nfev=MOST_STEPS, xtol=SHORT, ftol=FLAT)
            x, residuals = found.x, found.fun * noise
        noise = self._noise(residuals)
        return _Found(x, residuals, noise, float(np.log(noise).mean()))

    def _fit(self, best: _Found, as_good: list[np.ndarray]) -> Fit:
        slopes, errors = self._slopes(best.x, best.residuals) / best.noise[:, None], best.residuals / best.noise
        spread = np.sqrt(_variances(slopes, errors, self._target.request) + np.var(as_good, axis=0))
        step, *_ = np.linalg.lstsq(slopes, errors, rcond=None)
        in_reach = float(((slopes @ step) ** 2).sum() / max((errors**2).sum(), 1e-300))
        rms, variance = self._target.rms(best.residuals), self._target.variance()
        there = [(name, left, of) for name, left, of in zip(_Target.NAMES, rms, variance, strict=True) if left == left]
        explained = {name: 1 - left**2 / of if of else float(not left) for name, left, of in there}
        unidentified = _unidentified(self._of, best.x, spread)
        left = {name: float(of) for name, of, _ in there}
        return Fit(self._of, best.x, spread, unidentified, in_reach, explained, left)


def _variances(slopes: np.ndarray, errors: np.ndarray, request: np.ndarray) -> np.ndarray:
    """Of parameters (n,), from errors of unit size that are alike in runs of requests: close ones share a queue.
    Infinite for those that can change together without a change of any error. (A sandwich of clusters.)"""
    _, singular, directions = np.linalg.svd(slopes, full_matrices=False)
    free = singular < singular[0] * NOTHING
    steep, along = singular[~free], directions[~free]
    bread = (along.T / steep**2) @ along
    run = request // ceil(sqrt(request.max() + 1))
    pulls = np.stack([np.bincount(run, column * errors) for column in slopes.T], 1)
    variances = np.diag(bread @ (pulls.T @ pulls) @ bread)
    return np.where((np.abs(directions[free]) > sqrt(NOTHING)).any(axis=0), np.inf, variances)


def _unidentified(of: Coefficients, x: np.ndarray, errors: np.ndarray) -> dict[str, str]:
    found = {}
    for name, value, error, low, high in zip(of.names, x, errors, *of.bounds, strict=True):
        if min(value - low, high - value) < MARGIN:
            found[name] = f"it ends at {np.exp(value):.3g}, where the search does"
        elif error == np.inf:
            found[name] = "others can make up for any change of it"
        elif error > UNCERTAIN:
            found[name] = f"its standard error is {error:.0%}"
    return found


# ---------------------------------------------------------------------- validation


@dataclass(frozen=True)
class Compared:
    """One figure of a part; ``error``: predicted / measured - 1, and its confidence interval where there is one."""

    measured: float
    predicted: float
    interval: tuple[float, float] | None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def reach(self) -> tuple[float, float]:
        return self.interval or (self.error, self.error)


@dataclass(frozen=True)
class LogValidation:
    fit: Fit
    cut: int  # of the requests that were replayed, those before it were fitted
    measured: Measurements
    predicted: Measurements
    fitted: dict[str, Compared]
    held_out: dict[str, Compared]
    warnings: list[str]
    replays: int
    goal: float

    @property
    def worst(self) -> str:
        """The headline figure with the largest held-out error."""
        return max(
            (name for name in HEADLINE if name in self.held_out), key=lambda name: abs(self.held_out[name].error)
        )

    @property
    def verdict(self) -> str:
        """Whether all headline figures of the held-out part are within the goal, as far as its requests tell."""
        of, worst = [self.held_out[name] for name in HEADLINE if name in self.held_out], self.held_out[self.worst]
        if all(max(map(abs, figure.reach)) <= self.goal for figure in of):
            word = "confirmed"
        elif any(figure.reach[0] > self.goal or figure.reach[1] < -self.goal for figure in of):
            word = "refuted"
        else:
            word = "likely" if abs(worst.error) <= self.goal else "doubtful"
        line = f"{word}: held-out figures within {self.goal:.0%}; the worst, {self.worst}, is off by {worst.error:+.1%}"
        return "; ".join([line, *self.fit.failures])


def validate(
    log: Measurements,
    scenario: Scenario,
    base: Path = Path(),
    share: float = 0.5,
    goal: float = 0.05,
    progress: Callable[[int], None] = lambda replays: None,
) -> LogValidation:
    """Fit the first ``share`` of the requests, by arrival; predict the others. ``progress`` hears of every replay.
    Raises InputError."""
    replay = Replay(log, scenario, base)
    measured = replay.measured
    cut = round(len(measured) * share)
    if min(cut, len(measured) - cut) < LEAST_REQUESTS:
        raise InputError(
            f"found {len(measured)} requests, of which {cut} to fit; expected at least {LEAST_REQUESTS} to fit and "
            f"{LEAST_REQUESTS} to predict"
        )
    found = fit(replay, cut, progress)
    predicted = replay.predict(found.coefficients, found.x)
    known = measured.first_ns != NOT_YET
    predicted = replace(predicted, first_ns=np.where(known, predicted.first_ns, NOT_YET))
    fitted, held_out = (compare(measured.take(part), predicted.take(part)) for part in (slice(cut), slice(cut, None)))
    warnings = _warnings(replay, found)
    return LogValidation(found, cut, measured, predicted, fitted, held_out, warnings, replay.count, goal)


def compare(measured: Measurements, predicted: Measurements) -> dict[str, Compared]:
    """Figures of the same requests, with intervals from resampling runs of sqrt(n) requests that follow each other:
    close ones share a queue, and are not independent. The throughput has none: it is not a mean over requests."""
    pairs = [(of, seen, said) for of, (seen, said) in _both(figures(measured), figures(predicted)).items()]
    rng, number = np.random.default_rng(SEED), len(measured)
    length = ceil(sqrt(number))
    drawn: dict[str, list[float]] = {}
    for _ in range(RESAMPLED):
        begins = rng.integers(0, number - length + 1, ceil(number / length))
        index = (begins[:, None] + np.arange(length)).ravel()[:number]
        for of, (seen, said) in _both(figures(measured.take(index)), figures(predicted.take(index))).items():
            drawn.setdefault(of, []).append(said / seen - 1)
    tails = [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]

    def interval(of: str) -> tuple[float, float] | None:
        if of.startswith("output_token_throughput") or of not in drawn:
            return None
        low, high = np.percentile(drawn[of], tails).tolist()
        return low, high

    return {of: Compared(seen, said, interval(of)) for of, seen, said in pairs}


def _both(seen: dict[str, float], said: dict[str, float]) -> dict[str, tuple[float, float]]:
    return {name: (seen[name], said[name]) for name in seen if seen[name] and name in said}


def _warnings(replay: Replay, found: Fit) -> list[str]:
    out = list(replay.warnings)
    if replay.rejected:
        out.append(f"{replay.rejected} requests can never fit under the scenario and were left out")
    if unknown := int((replay.measured.first_ns == NOT_YET).sum()):
        out.append(f"{unknown} requests do not say when their first token came; their whole latency is fitted instead")
    out += [f"{name} was not identified: {why}" for name, why in found.unidentified.items()]
    return out + found.failures
