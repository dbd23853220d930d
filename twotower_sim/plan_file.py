"""The plan file: a load, objectives, and what may be chosen."""

from itertools import product
from typing import Annotated, Any

from pydantic import Field, field_validator

from twotower_sim.capacity import Objective
from twotower_sim.scenario_workload import LONGEST_NAME, Section

LATENCIES = ("time_to_first_token", "time_to_second_token", "inter_token_latency", "commit_gap", "block_latency",
             "request_latency", "queue_time")  # fmt: skip
STATISTICS = ("avg", "p50", "p75", "p90", "p95", "p99", "max")
LEAST = ("good_request_fraction", "goodput", "output_token_throughput", "request_throughput")
"""Figures of which more is better; objectives on them are lower bounds."""

Choice = Annotated[list[Any], Field(min_length=1, max_length=64)]


class PlanFile(Section):
    """``choices``: scenario keys and their values, of which every combination is a candidate; the replicas are found.
    ``objectives``: bounds of figures, to be met at the bad end of their 95 % intervals over ``replications``.
    ``quality_floor``: share of the autoregressive model's quality; no candidate is taken that falls below, or whose
    quality is not published. ``margin``: also find the load at which the answer breaks."""

    name: str = Field(default="", max_length=LONGEST_NAME, pattern=r"^(\w[\w.-]*)?$")
    scenario: str
    set_: dict[str, Any] = Field(default_factory=dict, alias="set")
    objectives: dict[str, float] = Field(min_length=1, max_length=16)
    choices: dict[str, Choice] = Field(default_factory=dict, max_length=16)
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
    def _replicas_are_found(cls, choices: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "deployment.replicas" in choices:
            raise ValueError("deployment.replicas is found, not chosen; most_gpus bounds it")
        return choices

    @property
    def bounds(self) -> list[Objective]:
        return [Objective(name, bound, name in LEAST) for name, bound in self.objectives.items()]

    @property
    def combinations(self) -> list[dict[str, Any]]:
        return [dict(zip(self.choices, values, strict=True)) for values in product(*self.choices.values())]
