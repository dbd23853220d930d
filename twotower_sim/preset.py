"""Files that ship with the package and are named in scenarios: GPUs, models, profiles."""

import os
from pathlib import Path

from twotower_sim.errors import InputError

ROOT = Path(__file__).parent / "presets"


def names(kind: str) -> list[str]:
    """Names of the presets of a kind ("gpus", "models", "profiles")."""
    return sorted(path.name.split(".")[0] for path in (ROOT / kind).iterdir())


def preset_path(kind: str, name: str, suffix: str) -> Path | None:
    """The file of a preset; None where ``name`` is none of them."""
    return ROOT / kind / f"{name}{suffix}" if name in names(kind) else None


def named_file(what: str, name: str, suffix: str, base: Path) -> Path:
    """The file of a preset ``what`` ("gpu", "model"), or one by path relative to ``base``. Raises InputError."""
    kind = f"{what}s"
    path = preset_path(kind, name, suffix) or base / name
    if not os.path.isfile(path):  # False too for what is no path, where Path.is_file raises
        raise InputError(f"{what} {name!r:.99} is neither a preset ({', '.join(names(kind))}) nor a file")
    return path
