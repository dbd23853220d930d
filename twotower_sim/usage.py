"""How busy servers and their KV caches are over time: in bounded memory, whatever the number of rounds."""

import numpy as np

from twotower_sim.occupancy import mean_level
from twotower_sim.replica import Round

BINS = 300
ROUNDS = 1 << 16  # kept until they are added up
FINEST_NS = 1 << 20  # about a millisecond


class Usage:
    """Hears of every round while a run is simulated. Bins double as the run goes on: at least half of BINS are in use
    at the end of one that takes more than FINEST_NS * BINS."""

    def __init__(self) -> None:
        self.bin_ns = FINEST_NS
        self._sums = np.zeros((2, BINS))  # time of rounds, and KV blocks times time
        self._rounds: list[tuple[int, int, int]] = []

    def observe(self, replica: int, round_: Round) -> None:
        self._rounds.append((round_.start_ns, round_.end_ns, round_.kv_blocks))
        if len(self._rounds) == ROUNDS:
            self._add_up()

    def _add_up(self) -> None:
        if not self._rounds:
            return
        start, end, blocks = np.array(self._rounds, np.int64).T
        self._rounds.clear()
        while end.max() > self.bin_ns * BINS:
            self.bin_ns *= 2
            halves = self._sums.reshape(2, -1, 2).sum(axis=2)
            self._sums = np.concatenate([halves, np.zeros_like(halves)], axis=1)
        edges = np.arange(BINS + 1) * float(self.bin_ns)
        for sums, amount in zip(self._sums, (np.ones(len(start)), blocks), strict=True):
            sums += mean_level(edges, start, end, amount) * self.bin_ns

    def bins(self, until_ns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges of bins in ns (k + 1,) from 0 to ``until_ns``, the run's end; in each, how many rounds ran at a time,
        and how many KV blocks were in use in one: averages over time, and over that of rounds; NaN without any."""
        self._add_up()
        used = max(-(-until_ns // self.bin_ns), 1)
        edges_ns = np.append(np.arange(used) * float(self.bin_ns), until_ns)
        busy_ns, block_ns = self._sums[:, :used]
        busy_ns = np.where(busy_ns > 1, busy_ns, 0)  # below a nanosecond there is rounding only
        blocks = np.full(used, np.nan)
        np.divide(block_ns, busy_ns, out=blocks, where=busy_ns > 0)
        return edges_ns, busy_ns / np.diff(edges_ns), blocks
