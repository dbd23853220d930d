"""Public traces by name: what they are, where they are from and where they are put."""

import hashlib
import os
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from twotower_sim.errors import InputError
from twotower_sim.preset import ROOT
from twotower_sim.yaml_file import load_model

REGISTRY = ROOT / "traces" / "public.yaml"
URL = "https://raw.githubusercontent.com/{repository}/{commit}/{path}"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Trace(_Section):
    path: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    requests: int = Field(gt=0)
    span_s: int = Field(gt=0)


class _Source(_Section):
    repository: str
    commit: str = Field(pattern="^[0-9a-f]{40}$")
    licence: str
    attribution: str
    traces: dict[str, _Trace]


class _Registry(_Section):
    sources: list[_Source]


class PublicTrace(NamedTuple):
    name: str
    of: _Trace
    source: _Source

    @property
    def file(self) -> str:
        """Its name among the downloads, which scenarios expect."""
        return self.name + Path(self.of.path).suffix

    @property
    def url(self) -> str:
        return URL.format(repository=self.source.repository, commit=self.source.commit, path=self.of.path)


def public_traces(registry: Path = REGISTRY) -> dict[str, PublicTrace]:
    sources = load_model(_Registry, registry).sources
    return {name: PublicTrace(name, of, source) for source in sources for name, of in source.traces.items()}


def sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None


def downloads() -> Path:
    """traces/downloads in the checkout; where the package is installed elsewhere, in the working directory."""
    checkout = Path(__file__).parent.parent.parent
    base = checkout if (checkout / "traces" / "README.md").is_file() else Path()
    folder = base / "traces" / "downloads"
    here = os.path.relpath(folder)
    return folder if here.startswith(os.pardir) else Path(here)
