"""The profile: measured figures of one device and model, as one versioned JSON file (plain or gzip).

``calibrate`` writes it, the simulator reads it. Version 1 holds, each optional but ``provenance``:

- ``provenance``: what was measured, by whom, on what; ``kind`` is "measured" or "observed" (public figures);
- ``commits``: the figures of the law in ``commits.py``, where each class was measured, and how well they fit;
- ``routing``: distinct experts touched, over tokens of one text and over single tokens of different ones.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from twotower_sim.commits import Difficulty, Figures
from twotower_sim.errors import InputError
from twotower_sim.preset import preset_path

VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Provenance(_Part):
    kind: Literal["measured", "observed"]
    source: str
    device: str
    model: str
    date: str
    notes: list[str] = []


class CommitClass(_Part):
    """A class of requests, and where it was measured: points of (gamma, T), and the first ``blocks`` of an answer."""

    mean: float
    sd: PositiveFloat
    blocks: PositiveInt
    points: list[tuple[float, PositiveInt]] = Field(min_length=1)

    def covers(self, gamma: float, steps: int) -> bool:
        """Whether a point lies between measured ones: T between theirs, gamma between the bounds at that T."""
        bounds: dict[int, list[float]] = {}
        for measured, at in self.points:
            bounds.setdefault(at, []).append(measured)
        known = sorted(bounds)
        low, high = (np.interp(steps, known, [edge(bounds[at]) for at in known]) for edge in (min, max))
        return bool(known[0] <= steps <= known[-1] and low <= gamma <= high)


class CommitFigures(_Part):
    gamma: float
    committed: float
    steps: float
    steps_committed: float
    block: float
    block_sd: PositiveFloat
    concentration: PositiveFloat
    block_size: PositiveInt
    classes: dict[str, CommitClass]
    fit: dict[str, float] = {}  # relative error of the mean NFE by configuration, log-likelihood, …

    def figures(self) -> Figures:
        plain = self.model_dump(exclude={"classes", "block_size", "fit"})
        classes = {name: Difficulty(of.mean, of.sd, of.blocks) for name, of in self.classes.items()}
        return Figures(classes=classes, **plain)


class RoutingFigures(_Part):
    experts: PositiveInt
    experts_per_token: PositiveInt
    blocks: dict[int, PositiveFloat]
    singles: dict[int, PositiveFloat]


class Profile(_Part):
    format: Literal["twotower-sim profile"] = "twotower-sim profile"
    version: Literal[1] = 1
    provenance: Provenance
    commits: CommitFigures | None = None
    routing: RoutingFigures | None = None


def load_profile(profile: str, base: Path = Path()) -> Profile:
    """A profile that ships with the package, by name, or a file by path relative to ``base``. Raises InputError."""
    path = preset_path("profiles", profile, ".json") or base / profile
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        data = json.loads(text)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: not a profile: {getattr(error, 'strerror', None) or error}") from None
    if isinstance(data, dict) and data.get("version", VERSION) != VERSION:
        raise InputError(f"{path}: profile version {data['version']!r}; this program reads {VERSION}")
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "top level"
        raise InputError(f"{path}: {key}: found {first['input']!r:.60}; {first['msg'].lower()}") from None
