"""How far a prediction is off: figures of a simulated and of a real run of the same scenario, side by side.

Errors are relative, predicted / measured - 1. A real run is repeated; of each figure the median over the repetitions
counts, and their least and largest errors bound it: the median of what is repeated lies between them with probability
1 - 2^(1 - repetitions).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from twotower_sim.metrics import Results
from twotower_sim.replica import Round

METRICS = ("time_to_first_token", "commit_gap", "request_latency")
STATISTICS = ("avg", "p50", "p90", "p99")
HEADLINE = ("request_latency.p50", "request_latency.p90", "time_to_first_token.avg", "output_token_throughput.avg")
"""The figures that a verdict goes by."""

Figures = dict[str, float]


def figures(results: Results, rounds: Sequence[Round]) -> Figures:
    """What is compared of one run, by name: latencies in ms, output tokens a second, rounds, and the sequences that
    decode in a round, over rounds in which any do."""
    out = {f"{name}.{of}": results.metrics[name][of] for name in METRICS for of in STATISTICS}
    out["output_token_throughput.avg"] = results.metrics["output_token_throughput"]["avg"]
    out["rounds"] = len(rounds)
    batch = np.array([r.decoding + r.extending * (not r.in_turn) for r in rounds])
    batch = batch[batch > 0]
    out |= {"batch.avg": float(batch.mean())}
    out |= {f"batch.p{p}": float(np.percentile(batch, p)) for p in (50, 90)}
    return out


@dataclass(frozen=True)
class Error:
    """Of one figure: its median over repetitions, and the least and the largest."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


def errors(predicted: Sequence[Figures], measured: Sequence[Figures]) -> dict[str, Error]:
    """Of every figure that both know, over pairs of a prediction and a measurement."""
    out = {}
    for name in measured[0]:
        pairs = [(p[name], m[name]) for p, m in zip(predicted, measured, strict=True)]
        if all(m for _, m in pairs):
            of = [p / m - 1 for p, m in pairs]
            out[name] = Error(median(of), min(of), max(of))
    return out


def worst(of: dict[str, Error]) -> float:
    """The largest error of a headline figure."""
    return max(abs(of[name].middle) for name in HEADLINE)


def verdict(of: dict[str, Error], goal: float) -> str:
    """Whether all headline figures are within ``goal``, as far as the repetitions tell."""
    headline = [of[name] for name in HEADLINE]
    if all(max(abs(e.low), abs(e.high)) <= goal for e in headline):
        return "confirmed"
    if any(e.low > goal or e.high < -goal for e in headline):
        return "refuted"
    return "within the goal, not beyond doubt" if worst(of) <= goal else "outside the goal, not beyond doubt"
