"""The luck of every request: the denoise steps of its blocks, and so the ticks of its decode."""

from typing import NamedTuple

import numpy as np

from twotower_sim.commits import CommitLaw


class Blocks(NamedTuple):
    """Blocks of consecutive requests, flat; ``first`` (n + 1,) says where each request's begin."""

    first: np.ndarray
    block: np.ndarray  # index within its request
    steps: np.ndarray
    extend: np.ndarray  # tick of the extend pass, from the request's first tick on


class BlockPlans:
    """Plans drawn in chunks of requests as they are asked for; any order, always the same."""

    CHUNK = 4096
    KEEP = 4

    def __init__(self, law: CommitLaw, seed: int, output_tokens: np.ndarray) -> None:
        self.law, self._seed = law, seed
        self.blocks_of = -(-output_tokens // law.block_size)
        self._drawn: dict[int, tuple[list[int], list[int]]] = {}

    def of(self, request: int) -> list[int]:
        """Ticks of the extend passes of a request's blocks, counted from its first tick."""
        number, at = divmod(request, self.CHUNK)
        if number not in self._drawn:
            if len(self._drawn) == self.KEEP:
                del self._drawn[next(iter(self._drawn))]
            low = number * self.CHUNK
            blocks = self.blocks(low, min(low + self.CHUNK, len(self.blocks_of)))
            self._drawn[number] = blocks.first.tolist(), blocks.extend.tolist()
        first, extend = self._drawn[number]
        return extend[first[at] : first[at + 1]]

    def blocks(self, low: int, high: int) -> Blocks:
        """All blocks of the requests [low, high)."""
        count = self.blocks_of[low:high]
        first = np.concatenate(([0], np.cumsum(count)))
        owner = np.repeat(np.arange(high - low), count)
        index = np.arange(first[-1]) - first[owner]
        steps = self.law.steps(self._seed, owner + low, index)
        end = np.cumsum(steps + 1) - 1
        start_of_request = end[first[:-1]] - steps[first[:-1]]
        return Blocks(first, index, steps, end - start_of_request[owner])

    def sizes(self, request: int) -> list[list[int]]:
        """Tokens that each step of each block of a request commits."""
        blocks = self.blocks(request, request + 1)
        sizes = self.law.sizes(self._seed, np.full(len(blocks.block), request), blocks.block, blocks.steps)
        return [part.tolist() for part in np.split(sizes, np.cumsum(blocks.steps)[:-1])]
