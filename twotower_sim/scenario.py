"""The scenario file: what a user asks. Frozen; unknown keys are errors; every section but ``workload`` has defaults."""

import json
import os
import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, Field, WithJsonSchema, model_validator

from twotower_sim.errors import InputError
from twotower_sim.scenario_workload import (
    LONGEST_NAME,
    Count,
    Lasting,
    Milliseconds,
    MixWorkload,
    Seconds,
    Section,
    Slo,
    Tokens,
    Workload,
)
from twotower_sim.yaml_file import Document, Source, path_of, read_document

# ---------------------------------------------------------------------- decoding


Gamma = Annotated[float, Field(gt=0, lt=1)]


class FixedGamma(Section):
    """Each class of requests keeps its gamma, whatever the load."""

    kind: Literal["fixed"] = "fixed"


class GammaLevel(Section):
    waiting: int = Field(ge=1, le=100_000_000)
    gamma: Gamma


class GammaByQueue(Section):
    """A block that starts while at least ``waiting`` requests wait on its replica gets at most the level's gamma."""

    kind: Literal["by_queue"]
    levels: list[GammaLevel] = Field(min_length=1, max_length=8)

    @model_validator(mode="after")
    def _levels_fall(self) -> "GammaByQueue":
        for low, high in pairwise(self.levels):
            if low.waiting >= high.waiting or low.gamma <= high.gamma:
                raise ValueError("levels: expected rising waiting and falling gamma")
        return self


GammaPolicy = Annotated[FixedGamma | GammaByQueue, Field(discriminator="kind")]


class _Blocks(Section):
    """Decoding by blocks of masks."""

    gamma: Gamma = 0.8
    gamma_by_class: dict[str, Gamma] = Field(default_factory=dict)
    gamma_policy: GammaPolicy = FixedGamma()
    steps_per_block: int = Field(default=16, ge=1, le=1024)
    block_size: int

    @property
    def most_steps(self) -> int:
        """Steps that a block can take: every one commits a token, whatever ``steps_per_block`` allows."""
        return min(self.steps_per_block, self.block_size)

    @property
    def pass_tokens(self) -> int:
        return self.block_size

    @property
    def gammas(self) -> list[float]:
        """Every gamma that a block may get, rising."""
        by_queue = self.gamma_policy.levels if isinstance(self.gamma_policy, GammaByQueue) else []
        return sorted({self.gamma, *self.gamma_by_class.values(), *(level.gamma for level in by_queue)})


class TwoTower(_Blocks):
    kind: Literal["two_tower"] = "two_tower"
    block_size: int = Field(default=16, ge=1, le=1024)


class BlockDiffusion(_Blocks):
    """One tower in both roles, as LLaDA2 or DiffusionGemma: denoised blocks and extends share its forward."""

    kind: Literal["block_diffusion"]
    block_size: int = Field(default=32, ge=1, le=256)


class Autoregressive(Section):
    kind: Literal["autoregressive"]
    pass_tokens: ClassVar[int] = 1


class MockAr(Section):
    """The denoiser predicts one token a round while the context tower reads the one before."""

    kind: Literal["mock_ar"]
    pass_tokens: ClassVar[int] = 1


class MtpDrafter(Section):
    """A multi-token-prediction layer of the model itself."""

    kind: Literal["mtp"] = "mtp"


class NgramDrafter(Section):
    """Look-up in the prompt, on the host."""

    kind: Literal["ngram"]
    ms_per_round: Milliseconds = 0.0


class ModelDrafter(Section):
    """A small model beside the large one on the same GPUs."""

    kind: Literal["model"]
    model: str


Drafter = Annotated[MtpDrafter | NgramDrafter | ModelDrafter, Field(discriminator="kind")]
Probability = Annotated[float, Field(ge=0, le=1)]


class Speculative(Section):
    """In every round ``draft_tokens`` drafts of each sequence are verified in one pass of the model. ``acceptance``: of
    each position, if those before it were accepted; one number for all, or a list."""

    kind: Literal["speculative"]
    draft_tokens: int = Field(default=3, ge=1, le=16)
    acceptance: Probability | list[Probability]
    drafter: Drafter = MtpDrafter()
    pass_tokens: ClassVar[int] = 1  # of a round's token budget, as DynoSim counts

    @model_validator(mode="after")
    def _a_probability_a_position(self) -> "Speculative":
        if isinstance(self.acceptance, list) and len(self.acceptance) != self.draft_tokens:
            raise ValueError(f"acceptance: found {len(self.acceptance)} values; draft_tokens is {self.draft_tokens}")
        return self


Decoding = Annotated[TwoTower | Autoregressive | MockAr | Speculative | BlockDiffusion, Field(discriminator="kind")]


# ---------------------------------------------------------------------- deployment


class Colocated(Section):
    """Both towers on the same GPUs; their passes take turns."""

    kind: Literal["colocated"]


class Split(Section):
    """Each tower on its own GPUs. ``synchronous``: a round ends when both have finished and states are transferred.
    ``asynchronous``: two servers in tandem, each with its own batch; while a ``blocking`` transfer is under way its
    context GPUs wait, while an ``overlapped`` one is, they work on."""

    kind: Literal["split"] = "split"
    link: str | None = None  # of the GPU file; null: its fastest
    mode: Literal["synchronous", "asynchronous"] = "synchronous"
    transfer: Literal["overlapped", "blocking"] = "overlapped"


class Pools(Section):
    """``context`` and ``denoiser`` servers in tandem behind a router. A ``sticky`` sequence stays with its denoiser; a
    ``free`` one goes to the one with the fewest sequences at every block, and its keys and values with it."""

    kind: Literal["pools"]
    context: int = Field(default=1, ge=1, le=64)
    denoiser: int = Field(default=1, ge=1, le=64)
    link: str | None = None
    transfer: Literal["overlapped", "blocking"] = "overlapped"
    assignment: Literal["sticky", "free"] = "sticky"


Placement = Annotated[Colocated | Split | Pools, Field(discriminator="kind")]
Degree = Annotated[int, Field(ge=1, le=1024)]


class TensorParallel(Section):
    """GPUs of each tower."""

    context: Degree
    denoiser: Degree


class Deployment(Section):
    gpu: str | None = None  # null: the device of the latency's profile, h100-sxm where there is none
    replicas: int = Field(default=1, ge=1, le=10_000)
    placement: Placement = Split()
    tensor_parallel: Degree | TensorParallel = 1
    expert_parallel: bool = False

    @property
    def degrees(self) -> tuple[int, int]:
        """GPUs of the context tower and of the denoiser."""
        of = self.tensor_parallel
        return (of, of) if isinstance(of, int) else (of.context, of.denoiser)

    @property
    def tandem(self) -> tuple[int, int] | None:
        """Context and denoiser servers, where they work in tandem."""
        at = self.placement
        if isinstance(at, Pools):
            return at.context, at.denoiser
        return (1, 1) if isinstance(at, Split) and at.mode == "asynchronous" else None


class Scheduler(Section):
    """``steps_per_round``: denoise passes between two decisions; a sequence whose block is done keeps its place until
    the next. ``overlap: hidden``: host work happens while the GPUs compute."""

    policy: Literal["fdfo", "lockstep"] = "fdfo"
    steps_per_round: int = Field(default=1, ge=1, le=1024)
    max_extends_per_round: int | None = Field(default=None, ge=1, le=16_384)
    max_num_seqs: int = Field(default=128, ge=1, le=16_384)
    max_num_batched_tokens: int = Field(default=8192, ge=1, le=1_048_576)
    chunked_prefill: bool = True
    prefill: Literal["mixed", "first", "last"] = "mixed"
    admission: Literal["fcfs", "shortest_prompt"] = "fcfs"
    host_overhead_ms: Milliseconds = 0.0
    overlap: Literal["none", "hidden"] = "none"


class NoPrefixCache(Section):
    kind: Literal["none"] = "none"


class AttentionPrefixCache(Section):
    """Blocks of keys and values alone resume a prompt, as for a model without Mamba layers."""

    kind: Literal["attention"]


class HybridPrefixCache(Section):
    """A prompt resumes where its blocks are resident and its Mamba state was kept: every so many tokens."""

    kind: Literal["hybrid"]
    state_checkpoint_every: Tokens = 1024


PrefixCache = Annotated[NoPrefixCache | AttentionPrefixCache | HybridPrefixCache, Field(discriminator="kind")]


class Memory(Section):
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    kv_block_tokens: Tokens = 16
    kv_blocks: Count | None = None
    state_slots: Count | None = None
    state_dtype: Literal["float32", "bfloat16"] | None = None
    oversized: Literal["fail", "reject"] = "fail"
    prefix_cache: PrefixCache = NoPrefixCache()


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
    draft: PassCost | None = None  # of a round, all drafts together
    transfer: PassCost | None = None  # from tower to tower: for each state and each token
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

Amount = Annotated[float, Field(ge=0, le=1e9)]


class Measurement(Section):
    """Figures are of the requests that arrive in [warm_up_s, warm_up_s + for_s); all others are simulated alike."""

    warm_up_s: Seconds = 0.0
    for_s: Lasting | None = None  # null: until the end

    @property
    def end_s(self) -> float:
        return inf if self.for_s is None else self.warm_up_s + self.for_s


class Cost(Section):
    """What a GPU costs and draws, in place of what its file says; null: as that says."""

    price_usd_per_hour: Amount | None = None
    power_w: Amount | None = None
    idle_power_w: Amount | None = None


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
    measurement: Measurement = Measurement()
    cost: Cost = Cost()
    slo: Slo = Slo()

    @property
    def slos(self) -> list[Slo]:
        """What makes a request of each class good; of all, without classes."""
        load = self.workload
        if isinstance(load, MixWorkload):
            return [self.slo if part.slo is None else part.slo for part in load.parts.values() for _ in part.classes]
        return [self.slo] * max(len(load.class_names), 1)

    @property
    def split(self) -> bool:
        """Whether the towers are on different GPUs."""
        together = isinstance(self.deployment.placement, Colocated)
        return isinstance(self.decoding, TwoTower | MockAr) and not together

    @property
    def tandem(self) -> tuple[int, int] | None:
        """Context and denoiser servers of a replica, where towers work in tandem."""
        return self.deployment.tandem if isinstance(self.decoding, TwoTower) else None

    @model_validator(mode="after")
    def _budget_holds_every_sequence(self) -> "Scenario":
        scheduler, each = self.scheduler, self.decoding.pass_tokens
        if scheduler.max_num_batched_tokens < (needed := scheduler.max_num_seqs * each):
            raise ValueError(
                f"scheduler.max_num_batched_tokens is {scheduler.max_num_batched_tokens}; "
                f"{scheduler.max_num_seqs} sequences (max_num_seqs) of {each} tokens a round need {needed}"
            )
        return self

    @model_validator(mode="after")
    def _classes_are_known(self) -> "Scenario":
        if isinstance(self.decoding, TwoTower | BlockDiffusion):
            known = self.workload.class_names
            for name in self.decoding.gamma_by_class:
                if name not in known:
                    allowed = ", ".join(known) or "none: workload.classes names them"
                    raise ValueError(f"decoding.gamma_by_class: found {name!r}; allowed: {allowed}")
        return self

    @model_validator(mode="after")
    def _towers_in_tandem_schedule_themselves(self) -> "Scenario":
        scheduler = self.scheduler
        if scheduler.policy == "lockstep" and scheduler.steps_per_round != 1:
            raise ValueError("scheduler.steps_per_round: with policy lockstep a round lasts until every block is done")
        if isinstance(self.decoding, MockAr) and self.deployment.tandem:
            raise ValueError(
                "deployment.placement: decoding.kind mock_ar takes colocated, or split with mode synchronous"
            )
        plain = (scheduler.policy, scheduler.steps_per_round, scheduler.prefill) == ("fdfo", 1, "mixed")
        if self.tandem and not plain:
            raise ValueError(
                "scheduler: towers in tandem (placement asynchronous or pools) take policy fdfo, "
                "steps_per_round 1 and prefill mixed"
            )
        return self

    @model_validator(mode="after")
    def _commits_are_in_a_profile(self) -> "Scenario":
        commits = self.commits
        if isinstance(commits, ProfileCommits) and not commits.path and not isinstance(self.latency, ProfileLatency):
            raise ValueError("commits.path: is missing; only with latency.kind profile it may be left out")
        return self


@dataclass(frozen=True)
class Setting:
    """A value that something other than the command line puts into a scenario, and where that is from. Files that it
    names are looked for from the folder ``here`` first, then as if it stood in the scenario."""

    key: str  # dotted
    value: Any
    place: str
    here: Path


Change = str | Setting
"""``section.key=value`` as on the command line, or a setting."""


def said_by(change: Change) -> tuple[str, str]:
    """Its key, and what to call it."""
    if isinstance(change, Setting):
        return change.key, f"{change.place}: {change.key}"
    key = change.partition("=")[0].strip()
    return key, f"--set {key}"


def load_scenario(source: Source, changes: Iterable[Change] = ()) -> Scenario:
    """Read a scenario, apply changes in their order and validate. Raises InputError."""
    document, path = read_document(source), path_of(source)
    _default_kinds(document.data, Scenario.model_construct())
    for change in changes:
        if isinstance(change, str):
            document.override(_from_here(change, path.parent))
        else:
            file = _found(change.key, change.value, change.here, path.parent)
            value = deepcopy(change.value) if file is None else file
            document.put(tuple(change.key.split(".")), value, change.place)
    document.data.setdefault(
        "name", re.sub(r"[^\w.-]", "-", path.stem.strip("<>")).lstrip("-.")[:LONGEST_NAME] or "scenario"
    )
    _default_kinds(document.data, Scenario.model_construct())
    return document.validate(Scenario)


def _named_or_held(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise ValueError(f"found {value!r:.99}; expected the path of a scenario, or a scenario")
    return value


Asked = Annotated[Any, AfterValidator(_named_or_held), WithJsonSchema({"type": ["string", "object"]})]
"""Of a study or plan, the path of its scenario from its own folder, or the scenario."""


def asked_of(document: Document, asked: Any) -> Source:
    """The scenario of a study or plan. Raises InputError where it names no file."""
    if isinstance(asked, dict):
        return document.part("scenario")
    path = document.path.parent / asked
    if not path.is_file():
        raise InputError(f"{document.where(('scenario',))}: scenario: {path} is no file")
    return path


def _from_here(assignment: str, base: Path) -> str:
    """A file named on the command line is looked for from the working directory first, then as if in the file."""
    key, _, value = assignment.partition("=")
    file = _found(key, value, Path(), base)
    return assignment if file is None else f"{key}={json.dumps(file)}"  # not to be read as YAML


def _found(key: str, value: Any, here: Path, base: Path) -> str | None:
    """The path from ``base`` of a file that ``key`` names from ``here``; None where it does not."""
    names_one = key.strip().rpartition(".")[2] in ("path", "model", "gpu", "fingerprint") and isinstance(value, str)
    if not names_one or not os.path.isfile(here / value):
        return None
    return os.path.relpath((here / value).resolve(), base.resolve())


def _default_kinds(data: dict, defaults: BaseModel) -> None:
    """A section that leaves its ``kind`` out is of the kind that is the default."""
    for name in type(defaults).model_fields:
        section, default = data.get(name), getattr(defaults, name, None)
        if isinstance(section, dict) and isinstance(default, BaseModel):
            if "kind" in type(default).model_fields:
                section.setdefault("kind", default.model_dump()["kind"])
            else:
                _default_kinds(section, default)
