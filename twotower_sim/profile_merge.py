"""One profile from several: sections of different files, or grids of the same device that complement each other."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import ValidationError

from twotower_sim.errors import InputError
from twotower_sim.profile import EngineFigures, Grid, MeasuredLatency, Profile, Section, load_profile, save_profile

SAME_LATENCY = ("device", "model", "dtype", "placement", "backend")
"""What two measurements of latency must have in common to stand in one grid."""


def merge_profiles(out: Path, names: Sequence[str]) -> Profile:
    """Write all of the profiles ``names`` as one to ``out``. Raises InputError where they contradict each other."""
    merged = load_profile(names[0])
    for name in names[1:]:
        try:
            merged = joined(merged, load_profile(name))
        except ValidationError as error:
            raise InputError(f"{name}: cannot be merged: {error.errors()[0]['msg']}") from None
        except ValueError as error:
            raise InputError(f"{name}: cannot be merged: {error}") from None
    save_profile(merged, out)
    return merged


def joined(a: Profile, b: Profile) -> Profile:
    """Both, with the provenance of each section; that of latency leads. Raises ValueError naming what differs."""
    lead, other = (b, a) if b.latency and not a.latency else (a, b)
    provenance = lead.of("latency") if lead.latency else lead.provenance
    sections: dict[str, Any] = {"device": lead.device if lead.latency else lead.device or other.device}
    if a.device and b.device and a.device != b.device and bool(a.latency) == bool(b.latency):
        raise ValueError(f"device differs: {a.device.name} and {b.device.name}, or its figures")
    origins = {}
    for section, join in JOINS.items():
        one, two = getattr(lead, section), getattr(other, section)
        origin = lead.of(section) if one or not two else other.of(section)
        if one and two and one != two:
            same = SAME_LATENCY if section == "latency" else ("model",)
            for field in same:
                found = getattr(lead.of(section), field), getattr(other.of(section), field)
                if found[0] != found[1]:
                    raise ValueError(f"{section} is of another {field}: {found[1]}, not {found[0]}")
            one = join(section, one, two)
            also = f"{section} also from {other.of(section)}, {other.of(section).date}"
            origin = origin.model_copy(update={"notes": [*origin.notes, also]})
            provenance = origin if section == "latency" else provenance
        sections[section] = one or two
        if sections[section] and origin != provenance:
            origins[section] = origin
    return Profile(provenance=provenance, provenance_of=origins, **sections)


def _conflict(section: str, *_: Any) -> None:
    raise ValueError(f"{section} differs")


def _latency(section: str, a: MeasuredLatency, b: MeasuredLatency) -> MeasuredLatency:
    grids = a.grids | b.grids
    both = [name for name in grids if name in a.grids and name in b.grids and a.grids[name] != b.grids[name]]
    for name in both:
        grids[name] = _grid(f"{section}: {name}", a.grids[name], b.grids[name])
    if a.memory and b.memory and a.memory != b.memory:
        raise ValueError(f"{section}: memory differs")
    drifts = [drift for drift in (a.drift, b.drift) if drift]
    return MeasuredLatency(
        transfer=grids.pop("transfer", None),
        engine=_engine(a, b, grids),
        passes=grids,  # type: ignore[arg-type]
        held_out={name: held for name, held in (a.held_out | b.held_out).items() if name not in both},
        drift=max(drifts, key=lambda drift: drift.moved, default=None),
        memory=a.memory or b.memory,
        skipped=a.skipped + b.skipped,
    )


def _engine(a: MeasuredLatency, b: MeasuredLatency, grids: dict[str, Grid]) -> EngineFigures | None:
    """At each batch the ratio of whoever measured it, between batches what lies between; the rest by rounds."""
    known = [of for of in (a, b) if of.engine]
    figures = [of.engine for of in known if of.engine]
    if not figures:
        return None
    ratios = {}
    for name in {name for engine in figures for name in engine.ratios}:
        at: dict[int, float] = {}
        for of in known:
            if of.engine and name in of.engine.ratios:
                at = dict(zip(_batches(of.grids, name), of.engine.ratios[name], strict=True)) | at
        ratios[name] = np.interp(_batches(grids, name), sorted(at), [at[n] for n in sorted(at)]).tolist()
    rounds = [engine.rounds for engine in figures]
    beside = {
        name: float(np.average([getattr(engine, name) for engine in figures], weights=rounds))
        for name in ("host_s", "wake_s", "probe_s")
    }
    return EngineFigures(ratios=dict(sorted(ratios.items())), rounds=sum(rounds), **beside)


def _batches(grids: dict[str, Grid], name: str) -> list[int]:
    return grids[name].axes["sequences"]


def _grid(where: str, a: Grid, b: Grid) -> Grid:
    """The points of both on the union of their axes; quantiles only where both have them."""
    if (a.at_context, a.at_block_size) != (b.at_context, b.at_block_size):
        raise ValueError(f"{where}: at_context or at_block_size differs")
    cells: dict[tuple[int, ...], tuple] = {}
    for grid in (a, b):
        columns = (getattr(grid, column) or [None] * len(grid.median_s) for column in COLUMNS)
        for at, cell in zip(product(*grid.axes.values()), zip(*columns, strict=True), strict=True):
            if cells.get(at, cell)[0] not in (None, cell[0]) and cell[0] is not None:
                raise ValueError(f"{where} differs at {', '.join(map(str, at))}: {cells[at][0]} s and {cell[0]} s")
            if cell[0] is not None or at not in cells:
                cells[at] = cell
    axes = {axis: sorted({*a.axes[axis], *b.axes[axis]}) for axis in a.axes}
    found = [cells.get(at, (None,) * len(COLUMNS)) for at in product(*axes.values())]
    merged: dict[str, list] = dict(zip(COLUMNS, map(list, zip(*found, strict=True)), strict=True))
    if not (a.p20_s and b.p20_s and a.p80_s and b.p80_s):
        del merged["p20_s"], merged["p80_s"]
    merged["samples_s"] = [samples or [] for samples in merged["samples_s"]] if a.samples_s or b.samples_s else []
    return Grid(axes=axes, at_context=a.at_context, at_block_size=a.at_block_size, **merged)


COLUMNS = ("median_s", "p20_s", "p80_s", "samples_s")


def _records(section: str, a: list, b: list) -> list:
    """Both lists; what describes the same prompt or operating point must say the same."""
    keys = ("class_", "prompt", "gamma", "steps_per_block", "task")
    known = {tuple(getattr(item, key, None) for key in keys): item for item in a}
    for item in b:
        key = tuple(getattr(item, key, None) for key in keys)
        if known.setdefault(key, item) != item:
            raise ValueError(f"{section} differs for {', '.join(str(part) for part in key if part is not None)}")
    return list(known.values())


JOINS: dict[Section, Callable] = {
    "latency": _latency,
    "commits": _conflict,
    "commit_records": _records,
    "quality": _records,
    "routing": _conflict,
}
assert set(JOINS) == set(get_args(Section)) - {"device"}
