"""The profile: measured figures of one device and model, as one versioned JSON file (plain or gzip).

``calibrate`` writes it, users may write one by hand, the simulator reads it. Version 1 holds, each optional but
``provenance``:

- ``provenance``: what was measured, by whom, on what; ``kind`` is "measured" or "observed" (public figures).
  ``environment`` holds any details (versions, clocks, seeds); of these ``commit`` (of the code) and ``dirty`` are
  read again;
- ``provenance_of``: the same for a section that is from elsewhere, as in a merged file;
- ``device``: the device that was measured, as far as a GPU file describes one;
- ``latency``: seconds of every kind of pass (``passes``), of the transfer between split towers (``transfer``), what
  becomes of them inside an engine (``engine``), and how far they can be trusted;
- ``commits``: the figures of the law in ``commits.py``, where each class was measured, and how well they fit;
- ``commit_records``: what that law is fitted to, the sizes of the commits of every block;
- ``quality``: how good the text was at an operating point;
- ``routing``: distinct experts touched, over tokens of one text and over single tokens of different ones.

A grid of ``latency`` has ``axes`` (ordered as below, each a rising list of integers) and times in seconds, flat and
row-major (the last axis varies fastest), null where nothing was measured. ``context`` is what a sequence has in the
cache before the pass, ``tokens`` what it brings, both of each sequence (where sequences differ, the mean):

- "denoise", "extend": block_size, sequences, context; "decode": sequences, context;
- "prefill": sequences, tokens, context;
- "extend+prefill", "decode+prefill": sequences, tokens: one forward of so many extends (decodes) and of one prompt's
  chunk of so many tokens, all at ``at_context``; where extends have several block sizes, at ``at_block_size``;
- ``transfer``: sequences, tokens: states and new keys and values of so many sequences to the other tower's device.
"""

import gzip
import json
import zlib
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from twotower_sim.commits import Difficulty, Figures
from twotower_sim.errors import InputError
from twotower_sim.gpu import Gpu
from twotower_sim.preset import preset_path

VERSION = 1
AXES = {
    "denoise": ("block_size", "sequences", "context"),
    "extend": ("block_size", "sequences", "context"),
    "decode": ("sequences", "context"),
    "prefill": ("sequences", "tokens", "context"),
    "extend+prefill": ("sequences", "tokens"),
    "decode+prefill": ("sequences", "tokens"),
    "transfer": ("sequences", "tokens"),
}
Pass = Literal["denoise", "extend", "decode", "prefill", "extend+prefill", "decode+prefill"]
Section = Literal["device", "latency", "commits", "commit_records", "quality", "routing"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Provenance(_Part):
    kind: Literal["measured", "observed"]
    source: str
    device: str
    model: str
    date: str
    notes: list[str] = []
    environment: dict[str, str | int | float | bool] = {}
    dtype: str | None = None
    placement: Literal["colocated", "split"] | None = None
    backend: str | None = None
    weights: Literal["checkpoint", "random"] | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.source} ({self.device})"


class MeasuredDevice(Gpu):
    """A device that stands in for a GPU file: bandwidth of a copy (read + write) and FLOP/s of a matrix product, both
    measured (on a CPU in fp32); ``efficiency`` is usually not known."""

    count: PositiveInt = 1


class Grid(_Part):
    axes: dict[str, list[NonNegativeInt]]
    median_s: list[PositiveFloat | None]
    p20_s: list[PositiveFloat | None] = []
    p80_s: list[PositiveFloat | None] = []
    samples_s: list[list[PositiveFloat]] = []  # of each point
    at_context: NonNegativeInt | None = None
    at_block_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _holds_a_time_for_each_point(self) -> "Grid":
        for name, points in self.axes.items():
            if not points or any(a >= b for a, b in pairwise(points)) or (points[0] == 0 and name != "context"):
                raise ValueError(f"axes.{name} is {points}; expected rising integers above 0 (context: from 0)")
        cells = prod(map(len, self.axes.values()))
        for column in ("median_s", "p20_s", "p80_s", "samples_s"):
            found = len(getattr(self, column))
            if found != cells and (found or column == "median_s"):
                raise ValueError(f"{column} has {found} entries; the axes have {cells} points")
        low, median, high = self.seconds("p20_s"), self.seconds(), self.seconds("p80_s")
        if not ((low <= median) & (median <= high) | np.isnan(low) & np.isnan(median) & np.isnan(high)).all():
            raise ValueError("p20_s <= median_s <= p80_s does not hold, or they are not null at the same points")
        if np.isnan(median).all():
            raise ValueError("median_s is null at every point")
        return self

    def seconds(self, column: Literal["median_s", "p20_s", "p80_s"] = "median_s") -> np.ndarray:
        """Times over the axes, NaN where nothing was measured; the median's where a file leaves quantiles out."""
        flat = getattr(self, column) or self.median_s
        return np.array(flat, np.float64).reshape([len(points) for points in self.axes.values()])


class HeldOut(_Part):
    """Points that were measured to compare with what the grid gives there: errors relative to the measured time."""

    points: PositiveInt
    median_error: NonNegativeFloat
    worst_error: NonNegativeFloat


class Drift(_Part):
    """The same point at the start and at the end; ``moved``: further apart than its samples' relative ``spread``."""

    first_s: PositiveFloat
    again_s: PositiveFloat
    spread: NonNegativeFloat
    moved: bool


class MeasuredMemory(_Part):
    """Bytes of a sequence's states, of a token's keys and values, and of the weights of both towers."""

    bytes_per_sequence: PositiveInt
    bytes_per_token: PositiveInt
    weights_bytes: PositiveInt


class EngineFigures(_Part):
    """Inside a serving engine. ``ratios``: by kind of pass, what it takes over what it takes alone, at each number of
    sequences of its grid; ``host_s``: of a round, what is no pass; ``wake_s``: what a round takes longer that ends an
    idle time; ``probe_s``: of a denoise pass of one sequence without context meanwhile, which tells later how fast the
    machine is; ``rounds``: over which that was measured."""

    ratios: dict[str, list[PositiveFloat]]
    host_s: NonNegativeFloat
    wake_s: NonNegativeFloat
    probe_s: PositiveFloat
    rounds: PositiveInt


class Skipped(_Part):
    """A point that was asked for and not measured: its place on each axis, and why."""

    pass_: str = Field(validation_alias="pass", serialization_alias="pass")
    point: list[int]
    why: str


class MeasuredLatency(_Part):
    passes: dict[Pass, Grid]
    transfer: Grid | None = None
    engine: EngineFigures | None = None
    held_out: dict[str, HeldOut] = {}
    drift: Drift | None = None
    memory: MeasuredMemory | None = None
    skipped: list[Skipped] = []

    @model_validator(mode="after")
    def _axes_are_those_of_the_pass(self) -> "MeasuredLatency":
        for name, grid in self.grids.items():
            if tuple(grid.axes) != AXES[name]:
                raise ValueError(f"{name} has the axes {', '.join(grid.axes)}; expected {', '.join(AXES[name])}")
            if "+" in name and grid.at_context is None:
                raise ValueError(f"{name} does not say at_context")
        for name, ratios in (self.engine.ratios if self.engine else {}).items():
            held = len(self.grids[name].axes["sequences"]) if name in self.grids else 0
            if len(ratios) != held:
                raise ValueError(f"engine.ratios.{name} has {len(ratios)} entries; its grid has {held} sequences")
        mix, extend = self.grids.get("extend+prefill"), self.grids.get("extend")
        if mix and extend and self.mixed_block_size not in extend.axes["block_size"]:
            sizes = ", ".join(map(str, extend.axes["block_size"]))
            raise ValueError(f"extend+prefill.at_block_size is {mix.at_block_size}; extend was measured at {sizes}")
        return self

    @property
    def mixed_block_size(self) -> int | None:
        """Of the extends in "extend+prefill"; None where nothing says it."""
        mix, extend = self.grids.get("extend+prefill"), self.grids.get("extend")
        sizes = extend.axes["block_size"] if extend else []
        return (mix.at_block_size if mix else None) or (sizes[0] if len(sizes) == 1 else None)

    def ratios(self, name: str) -> np.ndarray:
        """Of a kind of pass inside an engine, over the sequences of its grid; 1 where nothing says it."""
        known = self.engine.ratios if self.engine else {}
        return np.array(known.get(name) or [1.0] * len(self.grids[name].axes["sequences"]))

    @property
    def grids(self) -> dict[str, Grid]:
        """All of them, the transfer included."""
        return {str(name): grid for name, grid in self.passes.items()} | (
            {"transfer": self.transfer} if self.transfer else {}
        )


Coefficient = Annotated[float, Field(ge=-1e4, le=1e4)]
LEAST_SPREAD = 1e-6
Spread = Annotated[float, Field(ge=LEAST_SPREAD, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
OwnParameter = Literal[
    "gamma", "committed", "steps", "steps_committed", "block", "block_sd", "concentration", "hard", "hard_by"
]  # fmt: skip


class CommitClass(_Part):
    """A class of requests, and where it was measured: points of (gamma, T), and the first ``blocks`` of an answer.
    ``own``: parameters of the law that it does not share with other classes."""

    mean: Coefficient
    sd: Spread
    blocks: int = Field(ge=1, le=1024)
    points: list[tuple[float, PositiveInt]] = Field(min_length=1)
    own: dict[OwnParameter, Annotated[float, Field(ge=-1e12, le=1e12)]] = {}

    @property
    def named(self) -> dict[str, float]:
        return {str(name): value for name, value in self.own.items()}

    @model_validator(mode="after")
    def _own_parameters_are_in_range(self) -> "CommitClass":
        least = {"block_sd": LEAST_SPREAD, "concentration": LEAST_SPREAD, "hard": 0, "hard_by": 0}
        for name, value in self.named.items():
            if value < least.get(name, value):
                raise ValueError(f"own.{name} is {value}; expected at least {least[name]}")
        if self.own.get("hard", 0) > 1:
            raise ValueError(f"own.hard is {self.own['hard']}; expected at most 1")
        return self

    def covers(self, gamma: float, steps: int) -> bool:
        """Whether a point lies between measured ones: T between theirs, gamma between the bounds at that T."""
        bounds: dict[int, list[float]] = {}
        for measured, at in self.points:
            bounds.setdefault(at, []).append(measured)
        known = sorted(bounds)
        low, high = (np.interp(steps, known, [edge(bounds[at]) for at in known]) for edge in (min, max))
        return bool(known[0] <= steps <= known[-1] and low <= gamma <= high)


class CommitFigures(_Part):
    gamma: Coefficient
    committed: Coefficient
    steps: Coefficient
    steps_committed: Coefficient
    block: Coefficient
    block_sd: Spread
    concentration: Spread
    hard: Share = 0.0
    hard_by: NonNegativeFloat = 0.0
    block_size: int = Field(ge=1, le=1024)
    classes: dict[str, CommitClass] = Field(min_length=1)
    fit: dict[str, float] = {}  # relative error of the mean NFE by configuration, log-likelihood, …

    def figures(self) -> Figures:
        plain = self.model_dump(exclude={"classes", "block_size", "fit"})
        classes = {name: Difficulty(of.mean, of.sd, of.blocks, of.named) for name, of in self.classes.items()}
        return Figures(classes=classes, **plain)


class CommitRecord(_Part):
    """One prompt decoded at one operating point: the sizes of the commits of each of its blocks."""

    class_: str = Field(validation_alias="class", serialization_alias="class")
    prompt: int | str
    gamma: float = Field(gt=0, lt=1)
    steps_per_block: PositiveInt
    blocks: list[list[PositiveInt]] = Field(min_length=1)

    @model_validator(mode="after")
    def _obeys_the_decoding_rule(self) -> "CommitRecord":
        for block, sizes in enumerate(self.blocks):
            masked = sum(sizes)
            for step, committed in enumerate(sizes):
                left = self.steps_per_block - step
                if left < 1 or committed * left < masked:
                    raise ValueError(
                        f"block {block} commits {committed} of {masked} masked tokens at step {step} of at most "
                        f"{self.steps_per_block}"
                    )
                masked -= committed
        return self


class Quality(_Part):
    """How good the text was: a task's score, and bits per byte under the context tower beside its own decoding's."""

    class_: str = Field(validation_alias="class", serialization_alias="class")
    gamma: float = Field(gt=0, lt=1)
    steps_per_block: PositiveInt
    score: float | None = None
    task: str | None = None
    bits_per_byte: PositiveFloat | None = None
    autoregressive_bits_per_byte: PositiveFloat | None = None


class RoutingFigures(_Part):
    experts: PositiveInt
    experts_per_token: PositiveInt
    blocks: dict[int, PositiveFloat]
    singles: dict[int, PositiveFloat]


class Profile(_Part):
    format: Literal["twotower-sim profile"] = "twotower-sim profile"
    version: Literal[1] = 1
    provenance: Provenance
    provenance_of: dict[Section, Provenance] = {}
    device: MeasuredDevice | None = None
    latency: MeasuredLatency | None = None
    commits: CommitFigures | None = None
    commit_records: list[CommitRecord] = []
    quality: list[Quality] = []
    routing: RoutingFigures | None = None

    @model_validator(mode="after")
    def _sections_agree(self) -> "Profile":
        sizes = {sum(block) for record in self.commit_records for block in record.blocks}
        sizes |= {self.commits.block_size} if self.commits else set()
        if len(sizes) > 1:
            raise ValueError(f"commits are of blocks of {', '.join(map(str, sorted(sizes)))} tokens; expected one size")
        if self.latency and self.latency.transfer and self.of("latency").placement != "split":
            raise ValueError("latency.transfer is measured between split towers; provenance.placement is not split")
        return self

    def of(self, section: Section) -> Provenance:
        """Where a section is from."""
        return self.provenance_of.get(section, self.provenance)


def load_profile(profile: str, base: Path = Path()) -> Profile:
    """A profile that ships with the package, by name, or a file by path relative to ``base``. Raises InputError."""
    path = preset_path("profiles", profile, ".json") or base / profile
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        data = json.loads(text)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a profile: {getattr(error, 'strerror', None) or error}") from None
    if isinstance(data, dict) and data.get("version", VERSION) != VERSION:
        raise InputError(f"{path}: profile version {data['version']!r}; this program reads {VERSION}")
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        first: Any = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "top level"
        said = first.get("ctx", {}).get("error") or f"found {first['input']!r:.60}; {first['msg'].lower()}"
        raise InputError(f"{path}: {key}: {said}") from None


def save_profile(profile: Profile, path: Path, packed: bool = False) -> None:
    """As JSON; ``packed``, the same bytes for the same profile, or where ``path`` ends in .gz. Raises InputError."""
    data = profile.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    text = json.dumps({"format": profile.format, "version": profile.version} | data, indent=1) + "\n"
    try:
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if packed or path.suffix == ".gz" else text.encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
