"""The workload section of a scenario: what arrives, from a trace, a fingerprint or drawn, alone or mixed."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from twotower_sim.requests import MOST_TOKENS

Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Rate = Annotated[float, Field(ge=1e-6, le=1e9)]  # per second
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Lasting = Annotated[float, Field(ge=1e-6, le=1e9)]  # seconds
Milliseconds = Annotated[float, Field(ge=0, le=1e6)]
LONGEST_NAME = 100


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


def _none_or_a_rate(rate_rps: float) -> float:
    if 0 < rate_rps < 1e-6:
        raise ValueError(f"found {rate_rps}; expected 0, or 1e-6 and more")
    return rate_rps


RateOrNone = Annotated[float, Field(ge=0, le=1e9), AfterValidator(_none_or_a_rate)]


class ConstantLength(Section):
    kind: Literal["constant"]
    value: Tokens


class LognormalLength(Section):
    """Rounded to whole tokens, at least 1; ``max`` cuts the tail."""

    kind: Literal["lognormal"]
    mean: float = Field(gt=0, le=MOST_TOKENS)
    cv: float = Field(gt=0, le=100)
    max: Tokens | None = None


Length = Annotated[ConstantLength | LognormalLength, Field(discriminator="kind")]


class PoissonArrivals(Section):
    kind: Literal["poisson"]
    rate_rps: Rate


class GammaArrivals(Section):
    """Gaps from a gamma distribution: bursty above cv 1, Poisson at 1, regular below."""

    kind: Literal["gamma"]
    rate_rps: Rate
    cv: float = Field(ge=1e-3, le=100)


class ConstantArrivals(Section):
    kind: Literal["constant"]
    rate_rps: Rate


class MarkovState(Section):
    rate_rps: RateOrNone
    mean_s: Lasting


class MarkovArrivals(Section):
    """Poisson at the rate of a state; after an exponential stay of mean ``mean_s`` the next is any other alike."""

    kind: Literal["markov"]
    states: list[MarkovState] = Field(min_length=2, max_length=8)

    @model_validator(mode="after")
    def _somebody_comes(self) -> "MarkovArrivals":
        if not any(state.rate_rps for state in self.states):
            raise ValueError("states: every rate_rps is 0; expected one above")
        return self


class DiurnalArrivals(Section):
    """Poisson at a rate that is a cosine of time around ``rate_rps``."""

    kind: Literal["diurnal"]
    rate_rps: Rate
    peak_to_mean: float = Field(ge=1, le=2)
    period_s: Lasting = 86_400.0
    peak_at_s: Seconds = 0.0


class RampArrivals(Section):
    """Poisson at a rate that changes evenly over ``over_s`` and then stays."""

    kind: Literal["ramp"]
    from_rps: RateOrNone
    to_rps: Rate
    over_s: Lasting


class ArrivalStep(Section):
    rate_rps: RateOrNone
    for_s: Lasting | None = None


class StepArrivals(Section):
    """Poisson at one rate after the other, over and over, or for ever at the last one if it leaves ``for_s`` out."""

    kind: Literal["steps"]
    steps: list[ArrivalStep] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _it_goes_on(self) -> "StepArrivals":
        for index, step in enumerate(self.steps[:-1]):
            if step.for_s is None:
                raise ValueError(f"steps.{index}.for_s: is missing; only the last step may leave it out")
        for_ever = self.steps[-1:] if self.steps[-1].for_s is None else self.steps
        if not any(step.rate_rps for step in for_ever):
            raise ValueError(f"steps.{len(self.steps) - 1}.rate_rps: the rate would be 0 for ever")
        return self


Arrivals = Annotated[
    PoissonArrivals | GammaArrivals | ConstantArrivals | MarkovArrivals | DiurnalArrivals | RampArrivals | StepArrivals,
    Field(discriminator="kind"),
]


Share = Annotated[float, Field(gt=0, le=1)]
Classes = Annotated[dict[str, Share], Field(min_length=1, max_length=16)]
"""Kinds of requests and their shares, which add up to 1; a request's class is part of its luck."""


class Load(Section):
    classes: Classes | None = None

    @property
    def class_names(self) -> list[str]:
        return list(self.classes or ())

    @model_validator(mode="after")
    def _shares_are_whole(self) -> "Load":
        if self.classes:
            _check_shares("classes", self.classes.values())
        return self


def _check_shares(name: str, shares: Iterable[float]) -> None:
    if abs((total := sum(shares)) - 1) > 1e-9:
        raise ValueError(f"{name}: the shares add up to {total:g}; expected 1")


TraceFormat = Literal[
    "auto",
    "mooncake",
    "mooncake_delta",
    "agentic_mooncake",
    "azure",
    "burstgpt",
    "bailian",
    "vidur",
    "weka",
    "aiperf",
    "otlp",
    "bench",
    "columns",
    "dynamo",
    "applied_compute_agentic",
    "llmservingsim",
    "splitwise",
    "aibrix",
    "apex",
    "copilot",
    "tracelab",
]


class TraceColumns(Section):
    """Names of columns of a table, or keys of JSON objects."""

    arrival: str
    input_tokens: str
    output_tokens: str
    session: str | None = None
    finish: str | None = None  # then a turn comes as long after the end of the one before as it did


class TraceWorkload(Load):
    """``sessions``: a turn of a ``closed`` one comes when what it waits for has finished; ``open``, at its recorded
    time. ``session_starts``: for traces that do not say when sessions start. ``on_error``: what malformed rows do.
    ``columns``, in which times are in ``time_unit``: for tables and JSON lines that are in no known format."""

    kind: Literal["trace"]
    path: str
    format: TraceFormat = "auto"
    columns: TraceColumns | None = None
    time_unit: Literal["s", "ms", "us", "ns", "iso"] = "s"
    on_error: Literal["fail", "skip"] = "fail"
    sessions: Literal["closed", "open"] = "closed"
    session_starts: Arrivals | None = None
    limit: Count | None = None
    window_s: tuple[Seconds, Seconds] | None = Field(default=None, strict=False)  # a list will do
    rate_scale: float = Field(default=1.0, ge=1e-6, le=1e6)
    spread_quantised: bool = True

    @model_validator(mode="after")
    def _window_is_not_empty(self) -> "TraceWorkload":
        if self.window_s and self.window_s[0] >= self.window_s[1]:
            raise ValueError(f"window_s is {list(self.window_s)}; expected [from, to) with from < to")
        return self

    @model_validator(mode="after")
    def _columns_are_asked_for(self) -> "TraceWorkload":
        if self.columns and self.format not in ("auto", "columns"):
            raise ValueError(f"format: found {self.format!r}; with columns it is 'columns', or left out")
        if self.time_unit != "s" and not self.columns:
            raise ValueError("time_unit: goes with columns; the other formats have units of their own")
        return self


class FingerprintWorkload(Load):
    """``fingerprint``: a shipped one by name, or a file. ``rate_scale`` multiplies the rate at every moment; ages of
    prefixes and waits of sessions stay as they are."""

    kind: Literal["fingerprint"]
    fingerprint: str
    requests: Count
    rate_scale: float = Field(default=1.0, ge=1e-6, le=1e6)


class SyntheticWorkload(Load):
    kind: Literal["synthetic"]
    requests: Count
    arrivals: Arrivals
    input_tokens: Length
    output_tokens: Length


class ClosedLoopWorkload(Load):
    """``concurrency`` users, each sends its next request ``think_time_s`` after its last one finished."""

    kind: Literal["closed_loop"]
    requests: Count
    concurrency: Count
    think_time_s: Seconds = 0.0
    input_tokens: Length
    output_tokens: Length


OpenWorkload = TraceWorkload | FingerprintWorkload | SyntheticWorkload


class Slo(Section):
    """What makes a request good, for goodput; each in milliseconds, as AIPerf takes them."""

    time_to_first_token_ms: PositiveFloat | None = None
    time_to_second_token_ms: PositiveFloat | None = None
    inter_token_latency_ms: PositiveFloat | None = None
    request_latency_ms: PositiveFloat | None = None


class Part(Section):
    """A load of a mix. ``share``: of all requests; ``slo``: in place of the scenario's."""

    share: Share | None = None
    slo: Slo | None = None
    workload: OpenWorkload = Field(discriminator="kind")

    @property
    def classes(self) -> list[str]:
        """Its classes, or one without a name."""
        return self.workload.class_names or [""]


PartName = Annotated[str, Field(pattern=r"^\w[\w-]*$", max_length=LONGEST_NAME)]


class MixWorkload(Section):
    """Several loads at once, each with arrivals of its own, until the first of them ends. A part is a class of its
    name; the classes of a part that has some are named part/class. See ``mix.mix`` for shares and ``rate_rps``."""

    kind: Literal["mix"]
    parts: dict[PartName, Part] = Field(min_length=2, max_length=16)
    rate_rps: Rate | None = None
    requests: Count | None = None

    @property
    def shares(self) -> dict[str, float] | None:
        return {name: part.share for name, part in self.parts.items() if part.share} or None

    @property
    def class_names(self) -> list[str]:
        return [f"{name}/{of}" if of else name for name, part in self.parts.items() for of in part.classes]

    @model_validator(mode="after")
    def _shares_are_whole(self) -> "MixWorkload":
        if self.shares:
            for name, part in self.parts.items():
                if part.share is None:
                    raise ValueError(f"parts.{name}.share: is missing; every part has one, or none has")
            _check_shares("parts", self.shares.values())
        return self


Workload = Annotated[OpenWorkload | ClosedLoopWorkload | MixWorkload, Field(discriminator="kind")]
