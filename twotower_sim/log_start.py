"""First coefficients for a log: a regression on its own times, corrected by what it makes of simulated ones.

Counted for every request are the prompts that were prefilled while it waited or decoded, and the sequences and their
context that decoded meanwhile. Over those its times are regressed. That is not quite what happened (rounds are not in a
log), but equally so for a simulated log: coefficients are changed until both regressions agree.
"""

import numpy as np

from twotower_sim.log_replay import Coefficients, Replay, integrate
from twotower_sim.measurements import Measurements
from twotower_sim.records import NOT_YET

CORRECTIONS, MOST = 6, 3.0  # of each kind; by how much a coefficient changes at once
LEAST = 0.03  # of the time that every coefficient starts with: one of next to nothing has no slope to rise by
WAITING_WEIGHT = 0.3  # of times to first tokens, which depend on when in a round a request comes


def first_guess(replay: Replay, of: Coefficients, cut: int) -> np.ndarray:
    """Logarithms of coefficients for the first ``cut`` requests: the best of those that corrections come by."""
    log = replay.measured
    table, times_s, weights = _rows(log, log, cut)
    wanted = _regression(table, times_s, weights)
    low, high = np.exp(of.bounds[:, :5])
    rest = np.zeros(len(of.names) - 5)  # a factor of 1
    least = np.clip(times_s.mean() / np.maximum(table.mean(axis=0), 1e-12) * 1e3 * LEAST, low, high)
    costs_ms, best = np.maximum(wanted * 1e3, least), (np.inf, np.zeros(5))
    for step in range(2 * CORRECTIONS):
        x = np.log(np.clip(costs_ms, least, high))
        predicted = replay.predict(of, np.concatenate([x, rest]))
        ratios = log.latency_s[:cut] / predicted.latency_s[:cut]
        best = min(best, (float(np.abs(np.log(ratios)).mean()), x), key=lambda seen: seen[0])
        if step < CORRECTIONS:  # as a whole
            change = np.full(5, np.median(ratios))
        else:  # each by itself
            got = _regression(*_rows(predicted, log, cut))
            change = np.where((got > 0) & (wanted > 0), wanted / np.where(got > 0, got, 1), 1.0)
        costs_ms = np.exp(x) * np.clip(change, 1 / MOST, MOST)
    return np.concatenate([best[1], rest])


def _regression(table: np.ndarray, times_s: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients >= 0 of least weighted relative error, in seconds."""
    from scipy.optimize import nnls

    scale = np.maximum(np.abs(table).max(axis=0), 1e-300)
    return nnls(table / scale * (weights / times_s)[:, None], weights)[0] / scale


def _rows(of: Measurements, log: Measurements, cut: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What rounds are spent on, (rows, 5): prefills, their tokens, rounds, sequences and their context summed over
    rounds; the time that these took in seconds; and weights. A row for the wait and one for the decode of each
    request; where the log does not know the first token, one for both."""
    first_ns = np.where(log.first_ns == NOT_YET, of.arrival_ns, of.first_ns)
    prompts, decoding = _Prompts(first_ns, of), _Decoding(first_ns, of)
    rounds = of.output_tokens - 1.0 + (first_ns == of.arrival_ns)
    during = prompts.between(first_ns, of.finish_ns), rounds[:, None] * decoding.meanwhile
    waited = prompts.between(of.arrival_ns, first_ns)
    begun = (waited[:, 0] + 0.5)[:, None] * decoding.when(of.arrival_ns)  # on average half a round is under way
    decoded = np.hstack(during), (of.finish_ns - first_ns) / 1e9
    wait = np.hstack([waited, begun]), (first_ns - of.arrival_ns) / 1e9
    rows, seconds = (np.concatenate(parts) for parts in zip(decoded, wait, strict=True))
    weights = np.repeat([1.0, WAITING_WEIGHT], len(of))
    there = (seconds > 0) & np.tile(np.arange(len(of)) < cut, 2)
    return rows[there], seconds[there], weights[there]


class _Prompts:
    def __init__(self, first_ns: np.ndarray, of: Measurements) -> None:
        order = np.argsort(first_ns, kind="stable")
        self._times = first_ns[order]
        self._tokens = np.concatenate([[0.0], np.cumsum(of.input_tokens[order])])
        self._moments = np.concatenate([[0.0], np.cumsum(np.diff(self._times, prepend=-1) > 0)])

    def between(self, start_ns: np.ndarray, end_ns: np.ndarray) -> np.ndarray:
        """Moments at which first tokens came, and the tokens of these prompts: (n, 2)."""
        low, high = (np.searchsorted(self._times, at, side="right") for at in (start_ns, end_ns))
        return np.stack([of[high] - of[low] for of in (self._moments, self._tokens)], 1)


class _Decoding:
    def __init__(self, first_ns: np.ndarray, of: Measurements) -> None:
        held = of.input_tokens + of.output_tokens / 2
        weights = np.stack([np.ones(len(of)), held], 1)
        self._times, integral = integrate(first_ns, of.finish_ns, weights)
        passed = [np.interp(at, self._times, column) for column in integral.T for at in (of.finish_ns, first_ns)]
        duration_ns = np.maximum(of.finish_ns - first_ns, 1)
        mean = [(passed[2 * i] - passed[2 * i + 1]) / duration_ns for i in range(2)]
        self.meanwhile = np.stack([np.ones(len(of)), *mean], 1)
        order = np.argsort(np.concatenate([first_ns, of.finish_ns]), kind="stable")
        self._levels = np.concatenate([np.zeros((1, 2)), np.cumsum(np.concatenate([weights, -weights])[order], axis=0)])

    def when(self, at_ns: np.ndarray) -> np.ndarray:
        """Whether any sequence decodes at a time, how many do, and their context: (n, 3)."""
        levels = self._levels[np.searchsorted(self._times, at_ns, side="right")]
        return np.column_stack([levels[:, 0] > 0, levels])
