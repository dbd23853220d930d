"""The study file: a scenario, what is varied of it, how often each point is repeated, and which figures are asked."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import floor, prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from twotower_sim.draws import seed_of, uniform_one
from twotower_sim.errors import InputError
from twotower_sim.experiments import Experiment
from twotower_sim.scenario import Asked, Change, Scenario, Setting, asked_of, load_scenario, said_by
from twotower_sim.scenario_workload import LONGEST_NAME, Section
from twotower_sim.yaml_file import Document, Keys, Source, path_of, read_document

MOST_RUNS = 100_000
Key = Annotated[str, Field(pattern=r"^\w+(\.[\w/-]+)*$")]  # dotted
Values = Annotated[list[Any], Field(min_length=1)]


class Range(Section):
    """Drawn evenly between ``low`` and ``high``, both included; ``log``: evenly over magnitudes."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; expected low < high")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}; expected more than 0 with log")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("expected whole low and high with integer")
        return self

    def at(self, u: float) -> float | int:
        """The value at ``u`` in [0, 1), to six digits."""
        low, high = self.low, self.high + self.integer
        value = low * (high / low) ** u if self.log else low + (high - low) * u
        rounded = floor(value) if self.integer else float(f"{value:.6g}")
        inside = min(max(rounded, self.low), self.high)
        return int(inside) if self.integer else inside


class Grid(Section):
    """Every combination; the last axis varies first."""

    kind: Literal["grid"]
    axes: dict[Key, Values] = Field(min_length=1)

    def __len__(self) -> int:
        return prod(map(len, self.axes.values()))

    def points(self) -> Iterator[dict[str, Any]]:
        for values in product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))


class Points(Section):
    kind: Literal["list"]
    list_: list[Annotated[dict[Key, Any], Field(min_length=1)]] = Field(alias="points", min_length=1)

    def __len__(self) -> int:
        return len(self.list_)

    def points(self) -> Iterator[dict[str, Any]]:
        yield from self.list_


class Random(Section):
    """A point's values depend on ``seed``, its number and the name of the axis alone, so that more points, or another
    axis, leave those that were there as they were."""

    kind: Literal["random"]
    count: int = Field(alias="points", ge=1, le=MOST_RUNS)
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    axes: dict[Key, Values | Range] = Field(min_length=1)

    def __len__(self) -> int:
        return self.count

    def points(self) -> Iterator[dict[str, Any]]:
        for index in range(self.count):
            yield {name: self._draw(name, of, index) for name, of in self.axes.items()}

    def _draw(self, name: str, of: Range | list[Any], index: int) -> Any:
        u = uniform_one(seed_of(self.seed, name), "design", index)
        return of.at(u) if isinstance(of, Range) else of[int(u * len(of))]


class Study(Section):
    """``scenario``: a path relative to the study, or a scenario; ``set``: dotted keys of it and their values at every
    point."""

    name: str = Field(default="", max_length=LONGEST_NAME, pattern=r"^(\w[\w.-]*)?$")
    scenario: Asked
    set_: dict[Key, Any] = Field(default_factory=dict, alias="set")
    design: Annotated[Grid | Points | Random, Field(discriminator="kind")]
    replications: int = Field(default=1, ge=1, le=10_000)
    metrics: list[str] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_of_a_size(self) -> "Study":
        if (runs := len(self.design) * self.replications) > MOST_RUNS:
            raise ValueError(f"design: {runs:,} runs, {len(self.design):,} points; at most {MOST_RUNS:,} are made")
        return self

    @model_validator(mode="after")
    def _nothing_stands_twice(self) -> "Study":
        for name in self.metrics:
            if self.metrics.count(name) > 1:
                raise ValueError(f"metrics: {name} stands twice")
        for key in self.set_:
            if any(key in point for point in self.varied):
                raise ValueError(f"set.{key}: has no effect: the design varies it")
        return self

    @property
    def varied(self) -> list[dict[str, Any]]:
        """What names the keys that the design varies."""
        return self.design.list_ if isinstance(self.design, Points) else [self.design.axes]

    @property
    def keys(self) -> list[str]:
        """Dotted keys that the design varies, in order."""
        return list(dict.fromkeys(key for point in self.varied for key in point))


@dataclass(frozen=True)
class Point:
    """``number`` from 1. ``runs``: one for each replication; none where ``error`` says why."""

    number: int
    values: dict[str, Any]
    runs: list[Experiment]
    error: str = ""

    @property
    def label(self) -> str:
        return ", ".join(f"{key} {plain(value)}" for key, value in self.values.items())


def plain(value: Any) -> str:
    """A value of a design as one cell of a table."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def load_study(source: Source, overrides: Sequence[Change]) -> tuple[Study, list[Point]]:
    """The study and its points. ``overrides`` of the scenario are as if they stood last in the study's ``set``. What is
    wrong with one point is its error. Raises InputError."""
    document, path = read_document(source), path_of(source)
    document.data.setdefault("name", path.stem if path.stem[:1].isalnum() else "study")
    study = document.validate(Study)
    scenario = asked_of(document, study.scenario)
    for key, said in map(said_by, overrides):
        if key in study.keys:
            raise InputError(f"{said}: has no effect: the design of {path} varies it")
    fixed: list[Change] = [*settings_of(study.set_, document, ("set",)), *overrides]
    points = []
    for index, values in enumerate(study.design.points()):
        where = ("design", "points", index) if isinstance(study.design, Points) else ("design", "axes")
        varied = settings_of(values, document, where)
        points.append(_point(index + 1, values, scenario, [*fixed, *varied], study.replications))
    return study, points


def settings_of(values: dict[str, Any], document: Document, within: Keys = ()) -> list[Setting]:
    """Sections before what is in them, and a kind, which starts its section afresh, before the rest of it."""
    ordered = sorted(values, key=lambda key: (key.count("."), key.rpartition(".")[2] != "kind"))
    return [Setting(key, values[key], document.where((*within, key)), document.path.parent) for key in ordered]


def _point(number: int, values: dict[str, Any], asked: Source, changes: list[Change], replications: int) -> Point:
    try:
        scenario = load_scenario(asked, changes)
    except InputError as error:
        return Point(number, values, [], str(error))
    return Point(number, values, replicated(scenario, path_of(asked).parent, replications))


def replicated(scenario: Scenario, base: Path, replications: int) -> list[Experiment]:
    """The scenario at its own seed and at those after it: what is drawn with a seed is the same for every scenario that
    draws it, so that scenarios differ by what differs in them alone."""
    seeds = ((scenario.seed + i) % (1 << 64) for i in range(replications))
    return [Experiment(scenario.model_copy(update={"seed": seed}), base.resolve()) for seed in seeds]
