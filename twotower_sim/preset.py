"""Files that ship with the package and are named in scenarios: GPUs, models, profiles."""

from pathlib import Path

ROOT = Path(__file__).parent / "presets"


def names(kind: str) -> list[str]:
    """Names of the presets of a kind ("gpus", "models", "profiles")."""
    return sorted(path.name.split(".")[0] for path in (ROOT / kind).iterdir())


def preset_path(kind: str, name: str, suffix: str) -> Path | None:
    """The file of a preset; None where ``name`` is none of them."""
    return ROOT / kind / f"{name}{suffix}" if name in names(kind) else None
