"""The luck of every request: the denoise steps of its blocks, and so the ticks of its decode; its bursts of drafts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from twotower_sim.commits import CommitLaw
from twotower_sim.draws import uniform


class Blocks(NamedTuple):
    """Blocks of consecutive requests, flat; ``first`` (n + 1,) says where each request's begin."""

    first: np.ndarray
    block: np.ndarray  # index within its request
    steps: np.ndarray
    extend: np.ndarray  # tick of the extend pass, from the request's first tick on


class Chunks:
    """What is drawn for requests in chunks, as they are asked for; any order, always the same."""

    SIZE = 4096
    KEEP = 4

    def __init__(self, requests: int, draw: Callable[[int, int], Any]) -> None:
        self._requests, self._draw = requests, draw
        self._drawn: dict[int, Any] = {}

    def of(self, request: int) -> tuple[Any, int]:
        """What ``draw(low, high)`` gave for the request's chunk, and the request's place in it."""
        number, at = divmod(request, self.SIZE)
        if number not in self._drawn:
            if len(self._drawn) == self.KEEP:
                del self._drawn[next(iter(self._drawn))]
            low = number * self.SIZE
            self._drawn[number] = self._draw(low, min(low + self.SIZE, self._requests))
        return self._drawn[number], at


class BlockPlans:
    """The blocks of all requests under one law."""

    def __init__(self, law: CommitLaw, seed: int, output_tokens: np.ndarray) -> None:
        self.law, self._seed = law, seed
        self.blocks_of = -(-output_tokens // law.block_size)
        self._chunks = Chunks(len(output_tokens), self._lists)

    def _lists(self, low: int, high: int) -> tuple[list[int], list[int], list[int]]:
        blocks = self.blocks(low, high)
        return blocks.first.tolist(), blocks.extend.tolist(), blocks.steps.tolist()

    def of(self, request: int) -> list[int]:
        """Ticks of the extend passes of a request's blocks, counted from its first tick."""
        (first, extend, _), at = self._chunks.of(request)
        return extend[first[at] : first[at + 1]]

    def steps(self, request: int) -> list[int]:
        """Denoise steps of a request's blocks."""
        (first, _, steps), at = self._chunks.of(request)
        return steps[first[at] : first[at + 1]]

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


class Bursts:
    """Tokens that each verify pass of a request brings: the drafts accepted in a row, and one of the model's own.

    ``acceptance``: of each drafted position, given that those before it were accepted. The draws of a pass are keyed by
    (seed, request, pass).
    """

    def __init__(self, acceptance: list[float], seed: int, output_tokens: np.ndarray) -> None:
        self._seed, self._output = seed, output_tokens
        self._reach = np.cumprod(acceptance)  # probability of at least 1, 2, … drafts in a row
        self._chunks = Chunks(len(output_tokens), self._lists)

    def of(self, request: int) -> list[int]:
        """Tokens by pass; as many passes as one token each would need. The last burst may be cut short."""
        (first, tokens), at = self._chunks.of(request)
        return tokens[first[at] : first[at + 1]]

    def _lists(self, low: int, high: int) -> tuple[list[int], list[int]]:
        count = self._output[low:high]
        first = np.concatenate(([0], np.cumsum(count)))
        owner = np.repeat(np.arange(high - low), count)
        u = uniform(self._seed, "acceptance", owner + low, np.arange(first[-1]) - first[owner])
        tokens = 1 + (u[:, None] < self._reach).sum(axis=1)
        return first.tolist(), tokens.tolist()
