"""Many runs: each computed once, whenever and wherever it was, and known again by all that it follows from."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import simpy

from twotower_sim.errors import InputError
from twotower_sim.metrics import evaluate
from twotower_sim.result import plain_json, summary
from twotower_sim.result_cache import ResultCache
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import gpu_of, prepare, simulate
from twotower_sim.workers import Workers


@dataclass(frozen=True)
class Experiment:
    """A run that may be made anywhere: files that the scenario names are relative to ``base``."""

    scenario: Scenario
    base: Path

    def key(self) -> str:
        """Digest of what the outcome follows from: what the scenario says, the contents of the files that it names, and
        this program with its presets. Its name does not matter. Raises InputError for files that are read once only."""
        said = self.scenario.model_dump(by_alias=True, exclude_unset=True, exclude={"name"})
        files = {text: _digest_of(self.base / text) for text in _texts(said)}
        text = json.dumps(
            {"scenario": said, "seed": self.scenario.seed, "files": files, "program": _program()}, sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def resolved(self) -> Scenario:
        """The scenario with the GPU that it leaves open. Raises InputError."""
        hardware = self.scenario.deployment
        gpu = hardware.gpu or gpu_of(self.scenario, self.base).name
        return self.scenario.model_copy(update={"deployment": hardware.model_copy(update={"gpu": gpu})})

    def outcome(self) -> dict[str, Any]:
        """The run's summary, without a name. Raises InputError."""
        try:
            run = simulate(prepare(self.scenario.model_copy(update={"name": ""}), self.base))
            return plain_json(summary(run, evaluate(run)))
        except InputError as error:  # the same wherever the folder is
            raise InputError(str(error).replace(f"{self.base}{os.sep}", "")) from None


@dataclass(frozen=True)
class Outcome:
    """``summary``, or why there is none."""

    summary: dict[str, Any] | None
    error: str = ""


def run_all(
    experiments: Sequence[Experiment],
    results: ResultCache,
    workers: Workers,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[tuple[int, Outcome]]:
    """(index, outcome) of every experiment: first those that are in the cache already, then the others as they come,
    each kept in the cache at once. What is wrong with one is its outcome. ``progress`` hears how many of those that are
    to be simulated are done. Raises InputError where the workers or the cache fail."""
    missing: dict[str, list[int]] = {}
    for index, experiment in enumerate(experiments):
        try:
            key = experiment.key()
        except InputError as error:
            yield index, Outcome(None, str(error))
            continue
        if key in missing:
            missing[key].append(index)
        elif (known := results.get(key)) is not None:
            yield index, Outcome(known)
        else:
            missing[key] = [index]
    progress(0, len(missing))
    if not missing:
        return
    wanted = [(key, experiments[indices[0]]) for key, indices in missing.items()]
    for done, (key, outcome) in enumerate(workers.map(_attempt, wanted), 1):
        if outcome.summary is not None:
            results.put(key, outcome.summary)
        progress(done, len(missing))
        for index in missing[key]:
            yield index, outcome


def _attempt(wanted: tuple[str, Experiment]) -> tuple[str, Outcome]:
    """On a worker; results that do not follow from the key are none."""
    key, experiment = wanted
    try:
        outcome = Outcome(experiment.outcome())
    except InputError as error:
        outcome = Outcome(None, str(error))
    except MemoryError:
        outcome = Outcome(None, "memory does not hold a run of this size")
    if experiment.key() != key:
        outcome = Outcome(None, "a worker read other files than are here, or runs another version of this program")
    return key, outcome


# ---------------------------------------------------------------------- digests


def _texts(value: Any) -> Iterator[str]:
    """Every text in plain data: any of them may name a file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _digest_of(path: Path) -> str | None:
    """Of a file's contents; None where there is none."""
    try:
        if path.is_file():
            found = path.stat()
            return _digest(path, found.st_ino, found.st_size, found.st_mtime_ns)
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is no regular file; every run reads it anew")
    except (OSError, ValueError):  # no path, or one that may not be read, which the run says
        pass
    return None


@lru_cache(1024)
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _program() -> str:
    """Of this package's sources and presets, and of the libraries that draw and order events."""
    digest = hashlib.sha256(repr((sys.version_info[:2], np.__version__, simpy.__version__)).encode())
    root = Path(__file__).parent
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(root)}\0{_digest(path)}".encode())
    return digest.hexdigest()
