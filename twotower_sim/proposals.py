"""Which combinations of choices to try next, where there are too many to try all: Optuna's tree-structured Parzen
estimator, which learns from what came of those before, for several objectives at once (Ozaki et al., 2020)."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from math import inf, prod
from typing import TYPE_CHECKING, Any, NamedTuple

from twotower_sim.draws import seed_of
from twotower_sim.errors import InputError
from twotower_sim.study import Range

if TYPE_CHECKING:
    import optuna

Space = Mapping[str, Sequence[Any] | Range]
"""What may be chosen, by key."""

STARTS = 10
"""Combinations at random before there is something to learn from."""


class Merits(NamedTuple):
    """What came of a combination; of each, less is better. ``excess``: how far it misses what is asked; up to 0 it does
    not."""

    cost: float
    distance: float
    quality_lost: float
    excess: float


class Proposal(NamedTuple):
    values: dict[str, Any]
    trial: "optuna.Trial"


def size(space: Space) -> int | None:
    """Of how many combinations it is; None where there are as many as one likes."""
    if any(isinstance(of, Range) for of in space.values()):
        return None
    return prod(len(of) for of in space.values() if not isinstance(of, Range))


def combinations(space: Space) -> list[dict[str, Any]]:
    """All of a finite space; the last key varies first."""
    lists = [of for of in space.values() if not isinstance(of, Range)]
    return [dict(zip(space, values, strict=True)) for values in product(*lists)]


class Proposals:
    """Of one space. The same seed and the same merits give the same proposals, whatever other spaces there are."""

    def __init__(self, space: Space, seed: int) -> None:
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise InputError(
                f"search.candidates: to propose some where there are more needs {error.name}: "
                "pip install 'twotower-sim[search]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=seed_of(seed, repr(space)) % (1 << 32), n_startup_trials=STARTS, multivariate=True
            )
        self._study = optuna.create_study(sampler=sampler, directions=["minimize"] * 3)

    def ask(self, count: int) -> list[Proposal]:
        """So many at once; a combination may come again."""
        trials = [self._study.ask() for _ in range(count)]
        return [Proposal({key: _drawn(trial, key, of) for key, of in self._space.items()}, trial) for trial in trials]

    def tell(self, proposal: Proposal, merits: Merits | None) -> None:
        """``merits``: None where it cannot be, which is worse than anything that can."""
        cost, distance, quality_lost, excess = merits or Merits(inf, inf, inf, inf)
        proposal.trial.set_constraint("objectives", excess)
        self._study.tell(proposal.trial, [cost, distance, quality_lost])


def _drawn(trial: "optuna.Trial", key: str, of: Sequence[Any] | Range) -> Any:
    """Numbers that stand in order are near each other; all else is not."""
    if isinstance(of, Range):
        if of.integer:
            return trial.suggest_int(key, int(of.low), int(of.high), log=of.log)
        return float(f"{trial.suggest_float(key, of.low, of.high, log=of.log):.6g}")
    last = len(of) - 1
    if all(isinstance(value, int | float) for value in of) and list(of) == sorted(of):
        return of[trial.suggest_int(key, 0, last)]
    return of[trial.suggest_categorical(key, range(last + 1))]
