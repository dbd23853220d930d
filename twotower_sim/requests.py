"""Request facts: what arrives and when, as columns. Known to the simulation; routers and schedulers see less."""

from dataclasses import dataclass

import numpy as np

MOST_TOKENS = 2**31 - 1
"""A request's input or output is shorter; a trace that says otherwise has its columns or units mixed up."""
LATEST_NS = 1 << 62  # 146 years: the last arrival, with room for what follows in 64 bits


@dataclass(frozen=True)
class Requests:
    """Columns of equal length, in order of arrival; a request's id is its index."""

    arrival_ns: np.ndarray  # int64, from the start of the simulation; all 0 in a closed loop
    input_tokens: np.ndarray  # int64, >= 1
    output_tokens: np.ndarray  # int64, >= 1

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def take(self, index: np.ndarray | slice) -> "Requests":
        return Requests(self.arrival_ns[index], self.input_tokens[index], self.output_tokens[index])
