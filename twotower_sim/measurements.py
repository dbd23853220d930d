"""What an engine, whichever it was, did with requests: their times, and figures of them by AIPerf's names."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from twotower_sim.distribution import of, scalar
from twotower_sim.records import NOT_YET
from twotower_sim.requests import Requests

STATISTICS = ("avg", "p50", "p90", "p99")


@dataclass(frozen=True)
class Measurements:
    """Columns (n,), int64, of requests that finished, in order of arrival; times in ns, the first arrival 0."""

    arrival_ns: np.ndarray
    first_ns: np.ndarray  # NOT_YET where a log does not say when the first token came
    finish_ns: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def take(self, index: np.ndarray | slice) -> "Measurements":
        return Measurements(*(getattr(self, column.name)[index] for column in fields(self)))

    @property
    def ttft_s(self) -> np.ndarray:
        """Arrival until the first token; NaN where that is not known."""
        return np.where(self.first_ns == NOT_YET, np.nan, self.first_ns - self.arrival_ns) / 1e9

    @property
    def decode_s(self) -> np.ndarray:
        """First until last token; NaN likewise."""
        return np.where(self.first_ns == NOT_YET, np.nan, self.finish_ns - self.first_ns) / 1e9

    @property
    def latency_s(self) -> np.ndarray:
        return (self.finish_ns - self.arrival_ns) / 1e9

    @property
    def requests(self) -> Requests:
        """The load alone, as a trace."""
        return Requests(self.arrival_ns - self.arrival_ns[0], self.input_tokens, self.output_tokens)


def metrics(measured: Measurements) -> dict[str, dict[str, Any]]:
    """Summaries by name, defined as in ``metrics.py``; what nothing is known of counts no samples."""
    known, streamed = measured.first_ns != NOT_YET, measured.output_tokens > 1
    gaps = measured.output_tokens[known & streamed] - 1
    duration_s = (measured.finish_ns.max() - measured.arrival_ns.min()) / 1e9
    tokens_per_s = float(measured.output_tokens.sum() / duration_s) if duration_s else None
    return {
        "time_to_first_token": of(1e3 * measured.ttft_s[known], "ms"),
        "inter_token_latency": of(1e3 * measured.decode_s[known & streamed] / gaps, "ms"),
        "request_latency": of(1e3 * measured.latency_s, "ms"),
        "output_token_throughput": scalar(tokens_per_s, "tokens/sec"),
    }


def figures(measured: Measurements) -> dict[str, float]:
    """Every STATISTICS of ``metrics`` that is known, as "metric.statistic"."""
    return {
        f"{name}.{statistic}": summary[statistic]
        for name, summary in metrics(measured).items()
        for statistic in STATISTICS
        if summary.get(statistic) is not None
    }
