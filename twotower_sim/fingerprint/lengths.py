"""How long inputs and outputs are, together: their distributions as tables, and between their ranks a checkerboard
copula, uniform inside the cells of a square grid. A trace may be a blend of several *kinds* of requests, each with a
checkerboard of its own, whose shares change over time (an hour of one application, then of another); they are found as
the factors of the counts by bin and cell (non-negative matrix factorisation, Lee & Seung 2001, in the Kullback-Leibler
form, whose fixed points keep the sums of rows and columns)."""

import numpy as np

from twotower_sim.draws import uniform
from twotower_sim.fingerprint.quantiles import Table, at

STRATA = 16  # of input and output ranks
MOST_KINDS = 3
ROUNDS = 500  # of multiplicative updates
PARTS = 10_000
"""A checkerboard is written in parts of this."""
Board = list[list[int]]


def ranks(values: np.ndarray) -> np.ndarray:
    """In (0, 1); ties in an order of no meaning."""
    order = np.lexsort((np.random.default_rng(0).random(len(values)), values))
    found = np.empty(len(values))
    found[order] = (np.arange(len(values)) + 0.5) / len(values)
    return found


def strata_of(count: int) -> int:
    """Strata that leave about 16 requests for a cell, at most STRATA."""
    return int(np.clip((count / 16) ** 0.5, 1, STRATA))


def measure_kinds(
    input_tokens: np.ndarray, output_tokens: np.ndarray, bins: np.ndarray, bin_count: int, most: int = MOST_KINDS
) -> tuple[np.ndarray, list[Board]]:
    """Requests of each kind in each bin (kinds, bins), and the kinds' checkerboards, rows by input. So many kinds as
    Akaike's criterion asks for."""
    strata = strata_of(len(bins))
    cell = (ranks(input_tokens) * strata).astype(int) * strata + (ranks(output_tokens) * strata).astype(int)
    counts = np.bincount(bins * strata**2 + cell, minlength=bin_count * strata**2).reshape(bin_count, -1).astype(float)
    fits = [_factors(counts, kinds) for kinds in range(1, most + 1)]
    over_time, boards = min(fits, key=lambda fit: _akaike(counts, *fit))
    order = np.argsort(-over_time.sum(axis=0), kind="stable")
    rounded = np.rint(boards[order] * PARTS).astype(int).reshape(-1, strata, strata)
    return over_time.T[order], rounded.tolist()


def _factors(counts: np.ndarray, kinds: int) -> tuple[np.ndarray, np.ndarray]:
    """counts (bins, cells) as over_time (bins, kinds) @ boards (kinds, cells), whose rows sum to 1."""
    rng = np.random.default_rng(0)
    over_time, boards = (rng.uniform(0.5, 1.5, shape) for shape in ((len(counts), kinds), (kinds, counts.shape[1])))
    for _ in range(ROUNDS if kinds > 1 else 2):
        over_time *= (counts / (over_time @ boards + 1e-12)) @ boards.T / boards.sum(axis=1)
        boards *= over_time.T @ (counts / (over_time @ boards + 1e-12)) / (over_time.sum(axis=0)[:, None] + 1e-12)
    total = boards.sum(axis=1)
    return over_time * total, boards / total[:, None]


def _akaike(counts: np.ndarray, over_time: np.ndarray, boards: np.ndarray) -> float:
    expected = over_time @ boards
    likelihood = (counts * np.log(expected + 1e-12) - expected).sum()
    return 2 * (over_time.size + boards.size - len(boards) - likelihood)


def draw_ranks(kinds: np.ndarray, boards: list[Board], whole: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of input and output lengths of requests of these kinds; over every ``whole`` requests, as many as the trace
    has, both are Latin hypercubes, so that lengths have the trace's quantiles, not only in expectation."""
    input_rank, output_rank = np.empty(len(kinds)), np.empty(len(kinds))
    for kind, board in enumerate(boards):
        of_kind = np.flatnonzero(kinds == kind)
        shares = np.array(board, float)
        upto = np.concatenate(([0], np.cumsum(shares.sum(axis=1) / shares.sum())))
        input_rank[of_kind] = np.interp(uniform(seed, "input", of_kind), upto, np.linspace(0, 1, len(upto)))
        output_rank[of_kind] = draw_outputs(input_rank[of_kind], shares, uniform(seed, "output", of_kind))
    for start in range(0, len(kinds) - whole + 1, whole):
        part = slice(start, start + whole)
        for rank in (input_rank, output_rank):
            rank[part] = (rank[part].argsort().argsort() + 0.5) / whole
    return input_rank, output_rank


def draw_outputs(input_rank: np.ndarray, shares: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Ranks of outputs, given those of inputs."""
    strata = len(shares)
    row = np.minimum((input_rank * strata).astype(int), strata - 1)
    upto = np.cumsum(shares, axis=1)[row]
    wanted = u * upto[:, -1]
    column = np.minimum((wanted[:, None] >= upto).sum(axis=1), strata - 1)
    each = np.arange(len(row))
    inside = np.maximum(upto[each, column] - shares[row, column], 0)
    return (column + (wanted - inside) / np.maximum(shares[row, column], 1e-12)) / strata


def tokens(table: Table, rank: np.ndarray) -> np.ndarray:
    return np.rint(at(table, rank)).astype(np.int64)
