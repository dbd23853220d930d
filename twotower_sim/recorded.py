"""What a real engine recorded, and how the simulator replays it: its rounds as a latency, its commits as a law."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from twotower_sim.latency import Cost, Host, Prefill, no_transfer

Shape = tuple[int, int, int, int, Prefill]


class RoundLog(NamedTuple):
    """A round: its shape, as a latency model is asked for it, and what it took."""

    start_ns: int
    end_ns: int
    n: int
    context: int
    n_extend: int
    extend_context: int
    prefill: Prefill
    forwards: int  # denoise (or decode) passes
    denoiser_s: float
    context_s: float

    @property
    def shape(self) -> Shape:
        return self[2:7]


class RecordedRounds:
    """A latency by which every round takes what the round of the same number took; ``strayed``: how many rounds had
    another shape than recorded. Serves one replica of ``rounds.py``."""

    side_by_side, one_forward, host, transfer = False, False, Host(), staticmethod(no_transfer)

    def __init__(self, rounds: Sequence[RoundLog]) -> None:
        self._rounds = rounds
        self.asked = self.strayed = 0
        self.extrapolated: Counter[str] = Counter()

    def round(self, *shape) -> Cost:
        return self._next(shape, int(shape[0] > 0))

    def forwards(self, count: int, in_turn: bool, *shape) -> Cost:
        return self._next(shape[:5], count)

    def _next(self, shape: tuple, forwards: int) -> Cost:
        log = self._rounds[min(self.asked, len(self._rounds) - 1)]
        self.strayed += self.asked >= len(self._rounds) or (log.shape, log.forwards) != (shape, forwards)
        self.asked += 1
        return log.denoiser_s, log.context_s, (log.end_ns - log.start_ns) / 1e9


class RecordedCommits:
    """The law by which every block commits what it committed: ``sizes[request][block]``, a size for each step."""

    def __init__(self, sizes: Sequence[Sequence[Sequence[int]]], block_size: int) -> None:
        self.block_size = block_size
        self._sizes = sizes
        self._first = np.concatenate(([0], np.cumsum([len(blocks) for blocks in sizes])))
        self._steps = np.array([len(block) for blocks in sizes for block in blocks])

    def steps(self, seed: int, requests: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        return self._steps[self._first[requests] + blocks]

    def sizes(self, seed: int, requests: np.ndarray, blocks: np.ndarray, steps: np.ndarray) -> np.ndarray:
        pairs = zip(requests.tolist(), blocks.tolist(), strict=True)
        return np.array([size for request, block in pairs for size in self._sizes[request][block]], np.int64)
