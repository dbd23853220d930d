"""Request facts: what arrives and when, as columns. Known to the simulation; routers and schedulers see less."""

from dataclasses import dataclass

import numpy as np

MOST_TOKENS = 2**31 - 1
"""A request's input or output is shorter; a trace that says otherwise has its columns or units mixed up."""
LATEST_NS = 1 << 62  # 146 years: the last arrival, with room for what follows in 64 bits


@dataclass(frozen=True)
class Prefixes:
    """Hashes of the prompts' blocks, flat: equal hashes at equal places mean equal prompts up to there."""

    first: np.ndarray  # int64 (n + 1,): where each request's hashes begin
    hashes: np.ndarray  # int64; the last of a request may cover less than a whole block
    block_tokens: int

    def of(self, request: int) -> np.ndarray:
        return self.hashes[self.first[request] : self.first[request + 1]]

    def take(self, index: np.ndarray | slice) -> "Prefixes":
        rows = np.arange(len(self.first) - 1)[index]
        counts = np.diff(self.first)[rows]
        first = np.concatenate(([0], np.cumsum(counts)))
        at = np.arange(first[-1]) + np.repeat(self.first[rows] - first[:-1], counts)
        return Prefixes(first, self.hashes[at], self.block_tokens)


@dataclass(frozen=True)
class Requests:
    """Columns of equal length, in order of arrival; a request's id is its index."""

    arrival_ns: np.ndarray  # int64, from the start of the simulation; all 0 in a closed loop
    input_tokens: np.ndarray  # int64, >= 1
    output_tokens: np.ndarray  # int64, >= 1
    prefixes: Prefixes | None = None  # None: nothing is known of what prompts share

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def take(self, index: np.ndarray | slice) -> "Requests":
        prefixes = self.prefixes.take(index) if self.prefixes else None
        return Requests(self.arrival_ns[index], self.input_tokens[index], self.output_tokens[index], prefixes)
