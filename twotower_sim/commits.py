"""How many tokens each denoise step commits: a law fitted to measurements, and its keyed draws.

A position that is still masked passes the threshold gamma with probability p; with S - r of a block's S
positions committed,

    logit p = level + (committed + steps_committed log(16 / T)) (S - r) / S
    level   = mean[class] + sd[class] z_request + block_sd z_block
              + block log(1 + b) - gamma logit(gamma) + steps log(16 / T)

for the request's difficulty z_request and the block's z_block (standard normal) and the block's index b, up to the
last index that was measured for the class: blocks beyond it are taken to be as hard as it. A share ``hard`` of blocks,
each by itself, is harder: their level is lower by ``hard_by``. The number that passes
among r masked positions is beta-binomial around p, since confident positions come in runs. The decoder's rule then
commits max(1, passing), at least ceil(r / (T - k)) at step k, and everything at the last step (arXiv 2606.26493).

Levels are kept on a grid and difficulties in equally likely classes, so that everything below is a finite
Markov chain: the distribution of a block's steps is exact, and a run needs one uniform a block. The sizes of
the commits, where someone asks for them, are drawn afterwards, conditional on the steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import erf, log
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from twotower_sim.draws import uniform

LEVELS = np.arange(-7.0, 7.01, 0.25)
DIFFICULTIES = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])
REFERENCE_STEPS = 16
CERTAIN = 30.0  # logit beyond which p is 0 or 1 to all but 1e-13, and a beta distribution no longer defined

_phi = np.vectorize(lambda z: 0.5 * (1 + erf(z / 2**0.5)), otypes=[float])


@dataclass(frozen=True)
class Difficulty:
    """A class of requests: how hard they are, how much they differ, how many block indices were measured, and what of
    the law's other parameters is its own."""

    mean: float
    sd: float
    blocks: int
    own: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """The law's parameters, as named in the module's text."""

    gamma: float
    committed: float
    steps: float
    steps_committed: float
    block: float
    block_sd: float
    concentration: float
    classes: dict[str, "Difficulty"]
    hard: float = 0.0
    hard_by: float = 0.0

    def of(self, class_: str) -> "Figures":
        """With the parameters that are a class's own."""
        own: dict[str, Any] = dict(self.classes[class_].own)
        return replace(self, **own)

    def level_means(self, class_: str, gamma: float, steps: int) -> np.ndarray:
        """Mean level by the request's difficulty and the block's index: (16, blocks)."""
        of = self.classes[class_]
        shift = self.steps * log(REFERENCE_STEPS / steps) - self.gamma * log(gamma / (1 - gamma))
        return (of.mean + of.sd * DIFFICULTIES)[:, None] + self.block * np.log1p(np.arange(of.blocks)) + shift

    def level_weights(self, means: np.ndarray) -> np.ndarray:
        """Probability of each level around ``means`` (any shape): (…, levels)."""
        edges = (LEVELS[1:] + LEVELS[:-1]) / 2
        below = _phi((edges - means[..., None]) / self.block_sd)
        if self.hard:
            below += self.hard * (_phi((edges - means[..., None] + self.hard_by) / self.block_sd) - below)
        ones = np.ones((*means.shape, 1))
        return np.diff(np.concatenate((0 * ones, below, ones), axis=-1))

    def commit_tables(self, block_size: int, steps: int) -> np.ndarray:
        """P(commit c | step k, level, r masked): (steps, levels, block_size + 1, block_size + 1)."""
        size = block_size
        masked = np.arange(size + 1)
        slope = self.committed + self.steps_committed * log(REFERENCE_STEPS / steps)
        logit = np.clip(LEVELS[:, None] + slope * (size - masked) / size, -CERTAIN, CERTAIN)
        p = 1 / (1 + np.exp(-logit))
        passing = _beta_binomial(masked, p * self.concentration, (1 - p) * self.concentration)
        tables = np.zeros((steps, *passing.shape))
        for k in range(steps):
            for r in range(1, size + 1):
                least = max(1, -(-r // (steps - k)))
                tables[k, :, r, least:] = passing[:, r, least:]
                tables[k, :, r, least] += passing[:, r, :least].sum(axis=1)
        return tables


def _beta_binomial(trials: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """P(n of r) for r in ``trials`` = 0…S and parameters (levels, S + 1): (levels, S + 1, S + 1)."""
    out = np.zeros((*alpha.shape, len(trials)))
    for r in trials:
        a, b, i = alpha[:, r, None], beta[:, r, None], np.arange(r)
        ratios = (r - i) * (i + a) / ((i + 1) * (r - i - 1 + b))
        logs = np.concatenate((np.zeros_like(a), np.cumsum(np.log(ratios), axis=1)), axis=1)
        weights = np.exp(logs - logs.max(axis=1, keepdims=True))  # the product itself may overflow
        out[:, r, : r + 1] = weights / weights.sum(axis=1, keepdims=True)
    return out


def steps_ahead(tables: np.ndarray) -> np.ndarray:
    """P(the block is done in exactly m more steps | before step k, level, r masked), from ``commit_tables``:
    (steps + 1, levels, r, m)."""
    steps, levels, size = tables.shape[:3]
    ahead = np.zeros((steps + 1, levels, size, steps + 1))
    ahead[:, :, 0, 0] = 1
    for k in range(steps - 1, -1, -1):
        for r in range(1, size):
            left = ahead[k + 1][:, r - np.arange(1, r + 1), :-1]  # (levels, c, m)
            ahead[k, :, r, 1:] = np.einsum("lc,lcm->lm", tables[k, :, r, 1 : r + 1], left)
    return ahead


class CommitLaw(Protocol):
    """Draws for the blocks of requests; ``requests`` and ``blocks`` are arrays (n,) of ids and block indices."""

    block_size: int

    def steps(self, seed: int, requests: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Denoise steps of each block: int64 (n,)."""
        ...

    def sizes(self, seed: int, requests: np.ndarray, blocks: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Tokens committed by each step, block after block: int64 (sum of ``steps``,)."""
        ...


class FittedCommits:
    """The law of the module's text at one operating point."""

    def __init__(self, figures: Figures, class_: str, gamma: float, block_size: int, steps_per_block: int) -> None:
        figures = figures.of(class_)
        self.block_size = block_size
        self._blocks, self._steps = figures.classes[class_].blocks, steps_per_block
        self._tables = figures.commit_tables(block_size, steps_per_block)
        self._ahead = steps_ahead(self._tables)
        means = figures.level_means(class_, gamma, steps_per_block)
        self._joint = figures.level_weights(means)[..., None] * self._ahead[0, :, block_size, :]
        self._cdf = _flat_cdf(self._joint.sum(axis=2).reshape(-1, steps_per_block + 1))

    def _rows(self, seed: int, requests: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Difficulty class and block index of each block, as one index."""
        difficulty = (uniform(seed, "difficulty", requests) * len(DIFFICULTIES)).astype(np.int64)
        return difficulty * self._blocks + np.minimum(blocks, self._blocks - 1)

    def steps(self, seed: int, requests: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        rows = self._rows(seed, requests, blocks)
        return _draw(self._cdf, rows, self._steps + 1, uniform(seed, "steps", requests, blocks))

    def sizes(self, seed: int, requests: np.ndarray, blocks: np.ndarray, steps: np.ndarray) -> np.ndarray:
        rows, number = self._rows(seed, requests, blocks), len(steps)
        joint = self._joint.reshape(-1, len(LEVELS), self._steps + 1)[rows, :, steps]
        level = _draw(_flat_cdf(joint), np.arange(number), len(LEVELS), uniform(seed, "sizes", requests, blocks, 0))
        sizes, end = np.zeros((number, self._steps), np.int64), np.cumsum(steps)
        masked = np.full(number, self.block_size)
        for k in range(self._steps):
            at = np.flatnonzero(steps > k)
            c = np.arange(1, self.block_size + 1)
            left = np.maximum(masked[at, None] - c, 0)
            weights = self._tables[k, level[at], masked[at], 1:] * (c <= masked[at, None])
            weights = weights * self._ahead[k + 1, level[at, None], left, (steps[at] - k - 1)[:, None]]
            u = uniform(seed, "sizes", requests[at], blocks[at], k + 1)
            sizes[at, k] = 1 + _draw(_flat_cdf(weights), np.arange(len(at)), self.block_size, u)
            masked[at] -= sizes[at, k]
        return sizes[np.arange(self._steps) < steps[:, None]] if len(end) else sizes.ravel()


class ConstantCommits:
    """Every step commits ``tokens_per_step`` tokens (a fraction in turns), the last what is left of the block."""

    def __init__(self, tokens_per_step: float, block_size: int, steps_per_block: int) -> None:
        self.block_size = block_size
        ends = [min(block_size, round((k + 1) * tokens_per_step)) for k in range(block_size)]
        self._sizes = np.diff([0, *ends[: ends.index(block_size) + 1]])
        if len(self._sizes) > steps_per_block:
            raise ValueError(
                f"{tokens_per_step} tokens a step need {len(self._sizes)} steps for a block of {block_size}; "
                f"steps_per_block allows {steps_per_block}"
            )

    def steps(self, seed: int, requests: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        return np.full(len(blocks), len(self._sizes))

    def sizes(self, seed: int, requests: np.ndarray, blocks: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return np.tile(self._sizes, len(blocks))


class PerRequestCommits:
    """Each request under a law of its own: ``laws[level[request]]``."""

    def __init__(self, laws: list[CommitLaw], level: np.ndarray) -> None:
        self.block_size = laws[0].block_size
        self._laws, self._level = laws, level

    def steps(self, seed: int, requests: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        steps = np.zeros(len(requests), np.int64)
        for at, law in self._parts(requests):
            steps[at] = law.steps(seed, requests[at], blocks[at])
        return steps

    def sizes(self, seed: int, requests: np.ndarray, blocks: np.ndarray, steps: np.ndarray) -> np.ndarray:
        sizes = np.zeros(steps.sum(), np.int64)
        owner = np.repeat(np.arange(len(steps)), steps)
        for at, law in self._parts(requests):
            sizes[at[owner]] = law.sizes(seed, requests[at], blocks[at], steps[at])
        return sizes

    def _parts(self, requests: np.ndarray) -> Iterator[tuple[np.ndarray, CommitLaw]]:
        level = self._level[requests]
        for index, law in enumerate(self._laws):
            if (at := level == index).any():
                yield at, law


def _flat_cdf(weights: np.ndarray) -> np.ndarray:
    """Cumulative shares of each row of ``weights``, the row's index added: one sorted array for all rows."""
    cdf = np.cumsum(weights, axis=1)
    cdf /= cdf[:, -1:]
    return (np.minimum(cdf, 1) + np.arange(len(cdf))[:, None]).ravel()


def _draw(flat_cdf: np.ndarray, rows: np.ndarray, width: int, u: np.ndarray) -> np.ndarray:
    """Inverse CDF of each row at ``u``; an index of weight 0 is never drawn. The factor keeps the sum's rounding
    inside the row."""
    return np.searchsorted(flat_cdf, rows + u * (1 - 2.0**-30), side="right") - rows * width
