"""The plan file: a load, objectives, and what may be chosen."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from twotower_sim.capacity import Objective
from twotower_sim.figures import LATENCIES
from twotower_sim.proposals import Space
from twotower_sim.scenario import Asked
from twotower_sim.scenario_workload import LONGEST_NAME, Section
from twotower_sim.study import Range

STATISTICS = ("avg", "p50", "p75", "p90", "p95", "p99", "max")
LEAST = ("good_request_fraction", "goodput", "output_token_throughput", "request_throughput")
"""Figures of which more is better; objectives on them are lower bounds."""

Choice = Range | Annotated[list[Any], Field(min_length=1, max_length=64)]
EACH = ("deployment.gpu", "decoding", "decoding.kind")
"""Choices that are asked about one by one: what to do on each GPU type, and with each way of decoding."""


class Effort(Section):
    """How many ``candidates`` to try on each GPU type with each way of decoding: all combinations of what is left to
    choose, where there are no more; else those that Optuna proposes, by ``seed``."""

    candidates: int = Field(default=64, ge=1, le=10_000)
    seed: int = Field(default=0, ge=0, lt=1 << 32)


class PlanFile(Section):
    """``scenario``: a path relative to the plan, or a scenario; ``set``: keys of it and their values in all candidates.
    ``choices``: scenario keys and their values, of which every combination is a candidate; the replicas are found.
    ``search``: how many of them are tried.
    ``objectives``: bounds of figures, to be met at the bad end of their 95 % intervals over ``replications``.
    ``quality_floor``: share of the autoregressive model's quality; no candidate is taken that falls below, or whose
    quality is not published. ``margin``: also find the load at which the answer breaks."""

    name: str = Field(default="", max_length=LONGEST_NAME, pattern=r"^(\w[\w.-]*)?$")
    scenario: Asked
    set_: dict[str, Any] = Field(default_factory=dict, alias="set")
    objectives: dict[str, float] = Field(min_length=1, max_length=16)
    choices: dict[str, Choice] = Field(default_factory=dict, max_length=16)
    search: Effort = Effort()
    most_gpus: int = Field(default=64, ge=1, le=100_000)
    quality_floor: float | None = Field(default=None, gt=0, le=1)
    replications: int = Field(default=3, ge=1, le=1000)
    margin: bool = True

    @field_validator("objectives")
    @classmethod
    def _figures_are_known(cls, objectives: dict[str, float]) -> dict[str, float]:
        for name, bound in objectives.items():
            metric, _, statistic = name.partition(".")
            if not (name in LEAST or (metric in LATENCIES and statistic in STATISTICS)):
                latencies, statistics = ", ".join(LATENCIES), ", ".join(STATISTICS)
                raise ValueError(
                    f"found {name!r}; expected one of {latencies}, a dot and one of {statistics}, as in "
                    f"time_to_first_token.p90; or one of {', '.join(LEAST)}"
                )
            if bound <= 0:
                raise ValueError(f"{name}: found {bound:g}; expected more than 0")
        return objectives

    @field_validator("choices")
    @classmethod
    def _replicas_are_found(cls, choices: dict[str, Choice]) -> dict[str, Choice]:
        if "deployment.replicas" in choices:
            raise ValueError("deployment.replicas is found, not chosen; most_gpus bounds it")
        for key in EACH:
            if isinstance(choices.get(key), Range):
                raise ValueError(f"{key}: found a range; expected a list")
        return choices

    @property
    def bounds(self) -> list[Objective]:
        return [Objective(name, bound, name in LEAST) for name, bound in self.objectives.items()]

    @property
    def spaces(self) -> Sequence[Space]:
        """What is left to choose on each GPU type with each way of decoding."""
        spaces: list[dict[str, Any]] = [dict(self.choices)]
        for key in EACH:
            spaces = (
                [space | {key: alike} for space in spaces for alike in _alike(space.get(key))]
                if key in self.choices
                else spaces
            )
        return spaces


def _alike(values: Any) -> list[list[Any]]:
    """Values of the same kind together."""
    groups: dict[str, list[Any]] = {}
    for value in values:
        groups.setdefault(str(value.get("kind") if isinstance(value, dict) else value), []).append(value)
    return list(groups.values())
