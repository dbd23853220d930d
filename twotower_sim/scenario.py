"""The scenario file: what a user asks. Frozen; unknown keys are errors; every section but ``workload`` has defaults."""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from twotower_sim.requests import MOST_TOKENS
from twotower_sim.yaml_file import read_document

Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Rate = Annotated[float, Field(ge=1e-6, le=1e9)]  # per second
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Milliseconds = Annotated[float, Field(ge=0, le=1e6)]
LONGEST_NAME = 100


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


# ---------------------------------------------------------------------- workload


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


Arrivals = Annotated[PoissonArrivals | GammaArrivals | ConstantArrivals, Field(discriminator="kind")]


class TraceWorkload(Section):
    kind: Literal["trace"]
    path: str
    format: Literal["auto", "mooncake", "azure"] = "auto"
    limit: Count | None = None
    window_s: tuple[Seconds, Seconds] | None = Field(default=None, strict=False)  # a list will do
    rate_scale: float = Field(default=1.0, ge=1e-6, le=1e6)
    spread_quantised: bool = True

    @model_validator(mode="after")
    def _window_is_not_empty(self) -> "TraceWorkload":
        if self.window_s and self.window_s[0] >= self.window_s[1]:
            raise ValueError(f"window_s is {list(self.window_s)}; expected [from, to) with from < to")
        return self


class SyntheticWorkload(Section):
    kind: Literal["synthetic"]
    requests: Count
    arrivals: Arrivals
    input_tokens: Length
    output_tokens: Length


class ClosedLoopWorkload(Section):
    """``concurrency`` users, each sends its next request ``think_time_s`` after its last one finished."""

    kind: Literal["closed_loop"]
    requests: Count
    concurrency: Count
    think_time_s: Seconds = 0.0
    input_tokens: Length
    output_tokens: Length


Workload = Annotated[TraceWorkload | SyntheticWorkload | ClosedLoopWorkload, Field(discriminator="kind")]


# ---------------------------------------------------------------------- decoding


class TwoTower(Section):
    kind: Literal["two_tower"] = "two_tower"
    gamma: float = Field(default=0.8, gt=0, lt=1)
    block_size: int = Field(default=16, ge=1, le=1024)
    steps_per_block: int = Field(default=16, ge=1, le=1024)

    @property
    def most_steps(self) -> int:
        """Steps that a block can take: every one commits a token, whatever ``steps_per_block`` allows."""
        return min(self.steps_per_block, self.block_size)


class Autoregressive(Section):
    kind: Literal["autoregressive"]


Decoding = Annotated[TwoTower | Autoregressive, Field(discriminator="kind")]


# ---------------------------------------------------------------------- deployment


class Colocated(Section):
    """Both towers on the same GPUs; their passes take turns."""

    kind: Literal["colocated"]


class Split(Section):
    """Each tower on its own GPUs; a round ends when both have finished and states are transferred."""

    kind: Literal["split"] = "split"
    link: str | None = None  # of the GPU file; null: its fastest


Placement = Annotated[Colocated | Split, Field(discriminator="kind")]


class Deployment(Section):
    gpu: str | None = None  # null: the device of the latency's profile, h100-sxm where there is none
    replicas: int = Field(default=1, ge=1, le=10_000)
    placement: Placement = Split()
    tensor_parallel: int = Field(default=1, ge=1, le=1024)


class Scheduler(Section):
    policy: Literal["fdfo"] = "fdfo"
    max_num_seqs: int = Field(default=128, ge=1, le=16_384)
    max_num_batched_tokens: int = Field(default=8192, ge=1, le=1_048_576)
    chunked_prefill: bool = True
    prefill: Literal["mixed", "first"] = "mixed"
    admission: Literal["fcfs", "shortest_prompt"] = "fcfs"
    host_overhead_ms: Milliseconds = 0.0


class Memory(Section):
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    kv_block_tokens: Tokens = 16
    kv_blocks: Count | None = None
    state_slots: Count | None = None
    state_dtype: Literal["float32", "bfloat16"] | None = None
    oversized: Literal["fail", "reject"] = "fail"


class Router(Section):
    kind: Literal["round_robin", "random", "least_outstanding_requests", "least_outstanding_tokens", "power_of_two"] = (
        "round_robin"
    )


# ---------------------------------------------------------------------- latency and commits


class RooflineLatency(Section):
    kind: Literal["roofline"] = "roofline"
    moe_routing: Literal["observed", "independent"] = "observed"
    cuda_graphs: bool = True


class PrefillCost(Section):
    base_ms: Milliseconds = 0.0
    per_new_token_ms: Milliseconds = 0.0


class PassCost(Section):
    base_ms: Milliseconds = 0.0
    per_seq_ms: Milliseconds = 0.0
    per_context_token_ms: Milliseconds = 0.0


class AffineLatency(Section):
    """Typed-in costs of each pass; ``compose`` says how the passes of one round add up."""

    kind: Literal["affine"]
    prefill: PrefillCost
    decode: PassCost | None = None
    denoise: PassCost | None = None
    extend: PassCost | None = None
    compose: Literal["sum", "max"] = "sum"


class ProfileLatency(Section):
    """Measured by ``calibrate``. ``extrapolate``: go beyond what was measured, and say how often."""

    kind: Literal["profile"]
    path: str
    extrapolate: bool = False


Latency = Annotated[RooflineLatency | AffineLatency | ProfileLatency, Field(discriminator="kind")]


class ObservedCommits(Section):
    kind: Literal["observed"] = "observed"
    class_: Literal["mixed", "math", "code"] = Field(default="mixed", alias="class")
    extrapolate: bool = False


class ProfileCommits(Section):
    kind: Literal["profile"]
    path: str | None = None  # null: the latency's profile
    class_: str = Field(default="mixed", alias="class")
    extrapolate: bool = False


class ConstantCommits(Section):
    kind: Literal["constant"]
    tokens_per_step: float = Field(ge=1, le=1024)


Commits = Annotated[ObservedCommits | ProfileCommits | ConstantCommits, Field(discriminator="kind")]


# ---------------------------------------------------------------------- the whole


class Slo(Section):
    """What makes a request good, for goodput; each in milliseconds, as AIPerf takes them."""

    time_to_first_token_ms: PositiveFloat | None = None
    time_to_second_token_ms: PositiveFloat | None = None
    inter_token_latency_ms: PositiveFloat | None = None
    request_latency_ms: PositiveFloat | None = None


class Scenario(Section):
    name: str = Field(default="", max_length=LONGEST_NAME, pattern=r"^(\w[\w.-]*)?$")
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    workload: Workload
    model: str = "nemotron-twotower-30b-a3b"
    decoding: Decoding = TwoTower()
    deployment: Deployment = Deployment()
    scheduler: Scheduler = Scheduler()
    memory: Memory = Memory()
    router: Router = Router()
    latency: Latency = RooflineLatency()
    commits: Commits = ObservedCommits()
    slo: Slo = Slo()

    @property
    def pass_tokens(self) -> int:
        """Tokens of the round's budget that a decoding sequence takes."""
        return self.decoding.block_size if isinstance(self.decoding, TwoTower) else 1

    @model_validator(mode="after")
    def _budget_holds_every_sequence(self) -> "Scenario":
        scheduler, needed = self.scheduler, self.scheduler.max_num_seqs * self.pass_tokens
        if scheduler.max_num_batched_tokens < needed:
            raise ValueError(
                f"scheduler.max_num_batched_tokens is {scheduler.max_num_batched_tokens}; "
                f"{scheduler.max_num_seqs} sequences (max_num_seqs) of {self.pass_tokens} tokens a round need {needed}"
            )
        return self

    @model_validator(mode="after")
    def _commits_are_in_a_profile(self) -> "Scenario":
        commits = self.commits
        if isinstance(commits, ProfileCommits) and not commits.path and not isinstance(self.latency, ProfileLatency):
            raise ValueError("commits.path: is missing; only with latency.kind profile it may be left out")
        return self


def load_scenario(path: Path, overrides: list[str] | None = None) -> Scenario:
    """Read a scenario file, apply ``section.key=value`` overrides and validate. Raises InputError."""
    document = read_document(path)
    for assignment in overrides or []:
        document.override(_from_here(assignment, path.parent))
    document.data.setdefault("name", re.sub(r"[^\w.-]", "-", path.stem).lstrip("-.")[:LONGEST_NAME] or "scenario")
    _default_kinds(document.data, Scenario.model_construct())
    return document.validate(Scenario)


def _from_here(assignment: str, base: Path) -> str:
    """A file named on the command line is looked for from the working directory first, then as if in the file."""
    key, _, value = assignment.partition("=")
    if key.strip().rpartition(".")[2] in ("path", "model", "gpu") and os.path.isfile(value):
        return f"{key}={json.dumps(os.path.relpath(Path(value).resolve(), base.resolve()))}"  # not to be read as YAML
    return assignment


def _default_kinds(data: dict, defaults: BaseModel) -> None:
    """A section that leaves its ``kind`` out is of the kind that is the default."""
    for name in type(defaults).model_fields:
        section, default = data.get(name), getattr(defaults, name, None)
        if isinstance(section, dict) and isinstance(default, BaseModel):
            if "kind" in type(default).model_fields:
                section.setdefault("kind", default.model_dump()["kind"])
            else:
                _default_kinds(section, default)
