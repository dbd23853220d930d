"""Fit the commit law of ``twotower_sim.commits`` to what a real model committed.

Sizes of single commits are fitted by maximum likelihood, with the difficulties of requests and blocks integrated out;
totals of prompts, where their steps are not known, by the means (with their standard errors) and variances of a
configuration.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import log

import numpy as np
from scipy.optimize import minimize

from twotower_sim.commits import DIFFICULTIES, Difficulty, Figures, steps_ahead
from twotower_sim.profile import CommitClass, CommitFigures

PARAMETERS = ("gamma", "committed", "steps", "steps_committed", "block", "block_sd", "concentration")
HARD = ("hard", "hard_by")
START_HARD = [-2.5, 0.7]
"""Two more, where they are fitted, as a logit and a logarithm: the share of blocks that are harder, and by how much."""
START_MEAN, START_LOG_SD, START_SHARED = -3.4, 0.0, [0.8, 0.7, 1.8, -9.0, 1.7, 0.2, 0.0]
"""Where the search begins; of the PARAMETERS, the last two as logarithms."""
ENOUGH = 1e-6  # of a loss of some 250: 2.5e-4 in a logarithm of likelihood
DIFFERENCE, LEAST_CURVATURE = 1e-3, 0.5
"""Steps in which the loss's curvature is taken, and what flatter directions are taken to have."""


@dataclass(frozen=True)
class Configuration:
    """Prompts of one class at one operating point; ``steps`` is each prompt's mean steps a block."""

    class_: str
    gamma: float
    steps_per_block: int
    blocks: int
    steps: np.ndarray
    prompts: frozenset[str] = frozenset()  # their names, where they are known

    def __str__(self) -> str:
        return f"{self.class_} gamma {self.gamma:g} T {self.steps_per_block}"


@dataclass(frozen=True)
class Prompt:
    """The sizes of one prompt's commits, a list for each block."""

    class_: str
    gamma: float
    steps_per_block: int
    blocks: list[list[int]]
    name: str = ""

    def counted_in(self, at: Configuration) -> bool:
        """Whether a configuration's totals hold this prompt's."""
        point = at.class_, at.gamma, at.steps_per_block
        return self.name in at.prompts and (self.class_, self.gamma, self.steps_per_block) == point


@dataclass(frozen=True)
class Observations:
    """``blocks_of`` has every class, with the number of block indices that its difficulty is taken to depend on."""

    blocks_of: dict[str, int]
    block_size: int
    prompts: Sequence[Prompt] = ()
    configurations: Sequence[Configuration] = ()
    alike: Sequence[tuple[str, str]] = ()  # classes that are taken to vary alike, weakly

    @property
    def _all(self) -> list[Configuration | Prompt]:
        return [*self.configurations, *self.prompts]

    @property
    def steps(self) -> set[int]:
        """Every T that was observed."""
        return {at.steps_per_block for at in self._all}

    def points(self, class_: str) -> list[tuple[float, int]]:
        """Operating points at which a class was observed."""
        return sorted({(at.gamma, at.steps_per_block) for at in self._all if at.class_ == class_})

    def without(self, at: Configuration) -> "Observations":
        """All but a configuration, the step sizes of its own prompts included."""
        return replace(
            self,
            configurations=[other for other in self.configurations if other is not at],
            prompts=[prompt for prompt in self.prompts if not prompt.counted_in(at)],
        )

    def totals(self) -> list[Configuration]:
        """The configurations, and those that the prompts add up to."""
        if self.configurations:
            return list(self.configurations)
        totals: dict[tuple[str, float, int, int], list[float]] = {}
        for p in self.prompts:
            at = p.class_, p.gamma, p.steps_per_block, len(p.blocks)
            totals.setdefault(at, []).append(float(np.mean([len(block) for block in p.blocks])))
        return [Configuration(*at, np.array(steps)) for at, steps in sorted(totals.items())]


def figures(x: np.ndarray, blocks_of: dict[str, int]) -> Figures:
    """The law of a vector of parameters: means and log standard deviations of the classes, PARAMETERS, and HARD or
    nothing."""
    count = len(blocks_of)
    classes = {
        name: Difficulty(float(mean), float(sd), blocks)
        for (name, blocks), mean, sd in zip(blocks_of.items(), x[:count], np.exp(x[count : 2 * count]), strict=True)
    }
    shared, hard = np.split(x[2 * count :], [len(PARAMETERS)])
    values = [*shared[:5], *np.exp(shared[5:])]
    named = {name: float(v) for name, v in zip(PARAMETERS, values, strict=True)}
    if len(hard):
        named |= {"hard": float(1 / (1 + np.exp(-hard[0]))), "hard_by": float(np.exp(hard[1]))}
    return Figures(classes=classes, **named)


def vector(law: Figures) -> np.ndarray:
    """The inverse of ``figures``, without HARD."""
    shared = [getattr(law, name) for name in PARAMETERS]
    of = law.classes.values()
    return np.array([*(c.mean for c in of), *(log(c.sd) for c in of), *shared[:5], *np.log(shared[5:])])


def steps_moments(law: Figures, at: Configuration, ahead: np.ndarray) -> tuple[float, float]:
    """Mean over requests of the steps a block, and the variance between requests' means."""
    means = law.level_means(at.class_, at.gamma, at.steps_per_block)
    weights = law.level_weights(means)[:, np.minimum(np.arange(at.blocks), means.shape[1] - 1)]
    counts = np.arange(at.steps_per_block + 1)
    first, second = weights @ (ahead @ counts), weights @ (ahead @ counts**2)
    of_request = first.mean(axis=1)
    return float(of_request.mean()), float(of_request.var() + (second - first**2).mean() / at.blocks)


class Likelihood:
    """Log-likelihood of all commit sizes of prompts, as arrays: one row a commit, grouped by block, then by prompt."""

    def __init__(self, seen: Observations) -> None:
        self._size = seen.block_size
        self._groups = []
        key = lambda p: (p.steps_per_block, p.class_, p.gamma)  # noqa: E731
        for at, group in groupby(sorted(seen.prompts, key=key), key=key):
            prompts = list(group)
            blocks = [block for prompt in prompts for block in prompt.blocks]
            rows = [
                (k, masked, c)
                for block in blocks
                for k, (masked, c) in enumerate(zip(self._size - np.cumsum([0, *block[:-1]]), block, strict=True))
            ]
            index = np.concatenate([np.arange(len(prompt.blocks)) for prompt in prompts])
            first_row = np.cumsum([0, *(len(block) for block in blocks[:-1])])
            first_block = np.cumsum([0, *(len(prompt.blocks) for prompt in prompts[:-1])])
            self._groups.append((at, np.array(rows).T, index, first_row, first_block))

    def __call__(self, law: Figures, tables: dict[int, np.ndarray]) -> float:
        total = 0.0
        for (steps, class_, gamma), (k, masked, c), index, first_row, first_block in self._groups:
            weights = law.level_weights(law.level_means(class_, gamma, steps))  # (difficulties, blocks, levels)
            logs = np.add.reduceat(np.log(tables[steps][k, :, masked, c]), first_row)  # (blocks, levels)
            most = logs.max(axis=1)
            of = weights[:, np.minimum(index, weights.shape[1] - 1)]
            by_block = np.log(np.einsum("dbl,bl->bd", of, np.exp(logs - most[:, None]))) + most[:, None]
            by_prompt = np.add.reduceat(by_block, first_block)
            total += float(np.logaddexp.reduce(by_prompt, axis=1).sum()) - len(first_block) * log(len(DIFFICULTIES))
        return total


def loss(x: np.ndarray, seen: Observations, likelihood: Likelihood) -> float:
    """Negative log-likelihood of the steps, plus Gaussian errors of means and log variances of the totals."""
    law = figures(x, seen.blocks_of)
    tables = {steps: law.commit_tables(seen.block_size, steps) for steps in seen.steps}
    total = -likelihood(law, tables)
    for at in seen.configurations:
        mean, variance = steps_moments(law, at, _ahead(tables[at.steps_per_block], seen.block_size))
        observed = at.steps.var(ddof=1)
        total += (mean - at.steps.mean()) ** 2 / (2 * max(observed, 0.3) / len(at.steps))
        total += len(at.steps) / 8 * log(variance / observed) ** 2
    for one, other in seen.alike:
        total += 0.5 * (log(law.classes[one].sd) - log(law.classes[other].sd)) ** 2
    return total


def _ahead(table: np.ndarray, block_size: int) -> np.ndarray:
    return steps_ahead(table)[0, :, block_size]


def fit(
    seen: Observations, start: np.ndarray | None = None, axes: np.ndarray | None = None, tolerance: float = 2e-9
) -> np.ndarray:
    """The parameters of least loss; the search goes from ``start`` along ``axes`` (n, n), columns, until a turn lowers
    the loss by no more than ``tolerance`` of it."""
    count = len(seen.blocks_of)
    if start is None:
        start = np.array([START_MEAN] * count + [START_LOG_SD] * count + START_SHARED)
    axes = np.eye(len(start)) if axes is None else axes
    likelihood = Likelihood(seen)

    def moved(along: np.ndarray) -> float:
        return loss(start + axes @ along, seen, likelihood)

    here = np.zeros(len(start))
    found = minimize(moved, here, method="L-BFGS-B", options={"maxiter": 200, "ftol": tolerance})
    return start + axes @ found.x


def even_axes(x: np.ndarray, seen: Observations) -> np.ndarray:
    """Steps (n, n), columns, along which the loss rises alike from its minimum ``x``: a search for a minimum close by
    takes a third of the evaluations in them."""
    likelihood, step = Likelihood(seen), np.diag(DIFFERENCE * np.maximum(1, np.abs(x)))
    here, ahead = loss(x, seen, likelihood), [loss(x + move, seen, likelihood) for move in step]
    hessian = np.zeros(step.shape)
    for i in range(len(x)):
        for j in range(i + 1):
            bent = loss(x + step[i] + step[j], seen, likelihood) - ahead[i] - ahead[j] + here
            hessian[i, j] = hessian[j, i] = bent / (step[i, i] * step[j, j])
    curvature, directions = np.linalg.eigh(hessian)
    return directions / np.sqrt(np.maximum(curvature, LEAST_CURVATURE))


def leave_one_out(seen: Observations, x: np.ndarray) -> Iterator[tuple[Configuration, Figures]]:
    """Each configuration and the law fitted without it, from the fit ``x`` to all. A class that was measured at one
    operating point only has nothing left to be fitted to but the step sizes of other prompts."""
    axes = even_axes(x, seen)
    for at in seen.configurations:
        yield at, figures(fit(seen.without(at), x, axes, ENOUGH), seen.blocks_of)


def fit_alone(prompts: Sequence[Prompt], block_size: int) -> CommitFigures:
    """The law of one class's prompts, with blocks that are harder than others."""
    class_ = prompts[0].class_
    seen = Observations({class_: max(len(prompt.blocks) for prompt in prompts)}, block_size, prompts)
    start = np.array([START_MEAN, START_LOG_SD, *START_SHARED, *START_HARD])
    return commit_figures(fit(seen, start), seen)


def errors(law: Figures, configurations: Iterable[Configuration], block_size: int) -> dict[str, float]:
    """Relative error of the mean NFE of each configuration."""
    out = {}
    for at in configurations:
        ahead = _ahead(law.commit_tables(block_size, at.steps_per_block), block_size)
        out[str(at)] = steps_moments(law, at, ahead)[0] / float(at.steps.mean()) - 1
    return out


def commit_figures(x: np.ndarray, seen: Observations) -> CommitFigures:
    """The fitted law as a profile's section, with what it says of itself."""
    law = figures(x, seen.blocks_of)
    tables = {steps: law.commit_tables(seen.block_size, steps) for steps in seen.steps}
    forwards = sum(len(sizes) for prompt in seen.prompts for sizes in prompt.blocks)
    alone = "".join(f" of {name}" for name in seen.blocks_of if len(seen.blocks_of) == 1)
    told = {f"log-likelihood of {forwards} steps{alone}": round(Likelihood(seen)(law, tables), 2)}
    told |= {f"NFE error, {key}": round(v, 4) for key, v in errors(law, seen.totals(), seen.block_size).items()}
    classes = {
        name: CommitClass(mean=round(of.mean, 4), sd=_rounded(of.sd), blocks=of.blocks, points=seen.points(name))
        for name, of in law.classes.items()
    }
    parameters = {name: round(getattr(law, name), 4) for name in PARAMETERS[:5] + HARD}
    parameters |= {name: _rounded(getattr(law, name)) for name in PARAMETERS[5:]}
    return CommitFigures(block_size=seen.block_size, classes=classes, fit=told, **parameters)


def _rounded(spread: float) -> float:
    """To four places, but never to nothing."""
    return max(round(spread, 4), 1e-4)


def together(alone: Sequence[CommitFigures]) -> CommitFigures:
    """Laws of different classes as one: the first's parameters are shared, other classes have their own."""
    first = alone[0]
    classes, told = dict(first.classes), dict(first.fit)
    for law in alone[1:]:
        own = {name: getattr(law, name) for name in PARAMETERS + HARD if getattr(law, name) != getattr(first, name)}
        classes |= {name: of.model_copy(update={"own": own}) for name, of in law.classes.items()}
        told |= law.fit
    return first.model_copy(update={"classes": classes, "fit": told})
