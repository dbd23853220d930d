"""What a profile holds, whether it can be trusted, and how two differ: what a person reads on the terminal."""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from twotower_sim.commits import FittedCommits
from twotower_sim.measured import Hull, PassTime, overlap, rising
from twotower_sim.profile import Grid, MeasuredLatency, Profile, load_profile
from twotower_sim.tables import Sheet

QUALITY = ("score", "bits_per_byte", "autoregressive_bits_per_byte")
HELD_OUT_ERROR = 0.1
"""Median error at held-out points above which interpolation between the measured ones is worth a warning."""
Point = tuple[str, float, int]
"""An operating point: class, gamma, steps per block."""


def show_profile(name: str) -> None:
    """Print provenance, device, passes and commits."""
    profile, console = load_profile(name), Console()
    for line in _origin(profile):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if profile.latency:
        console.print(_latency_table(profile))
    if profile.commits or profile.commit_records:
        console.print(_commits_table(profile))


def check_profile(name: str) -> None:
    """Print what limits the use of a profile. Raises InputError where it is none."""
    profile = load_profile(name)
    print(f"{name}: fine")
    for line in facts(profile):
        print(f"  {line}")
    if profile.latency:
        Console().print(_latency_table(profile))
    for warning in doubts(profile):
        print(f"  warning: {warning}")


def compare_profiles(first: str, second: str) -> None:
    """Print the second's times relative to the first's at common points, and tokens per step side by side."""
    a, b = load_profile(first), load_profile(second)
    times = _table(f"{second} / {first}", "Pass", "points", "median", "least", "most")
    for name, points, *figures in ratios(a, b).rows:
        times.add_row(name, str(points), *("" if figure is None else f"{figure:.3f}" for figure in figures))
    tokens = _table("Tokens per step", "Class", "gamma", "T", first, second)
    for class_, gamma, steps, *pair in tokens_beside(a, b).rows:
        tokens.add_row(class_, f"{gamma:g}", str(steps), *(f"{figure:.3f}" for figure in pair))
    for table in (times, tokens):
        Console().print(table)


def ratios(a: Profile, b: Profile) -> Sheet:
    """A row a pass that both have: the times of ``b`` relative to those of ``a`` at common points."""
    rows: list[list[Any]] = []
    grids = [profile.latency.grids if profile.latency else {} for profile in (a, b)]
    for name in (name for name in grids[0] if name in grids[1]):
        of = _ratios(grids[0][name], grids[1][name])
        figures = [float(np.median(of)), float(of.min()), float(of.max())] if len(of) else [None] * 3
        rows.append([name, len(of), *figures])
    return Sheet(["pass", "points", "median", "least", "most"], rows)


def tokens_beside(a: Profile, b: Profile) -> Sheet:
    """A row an operating point that both have: tokens per step."""
    left, right = tokens_per_step(a), tokens_per_step(b)
    rows = [[*point, left[point], right[point]] for point in sorted(left.keys() & right.keys())]
    return Sheet(["class", "gamma", "steps_per_block", "first", "second"], rows)


def passes(profile: Profile) -> Sheet:
    """A row a pass: where it was measured, how long it takes, and between which quantiles half a point's samples lie,
    relative to their median."""
    rows: list[list[Any]] = []
    for name, grid in (profile.latency.grids if profile.latency else {}).items():
        seconds = grid.seconds()
        spread = np.nanmedian((grid.seconds("p80_s") - grid.seconds("p20_s")) / seconds)
        axes = ", ".join(_range(axis, points) for axis, points in grid.axes.items())
        ms = [float(of(seconds)) * 1e3 for of in (np.nanmin, np.nanmax)]
        rows.append(
            [name, axes, int(np.isfinite(seconds).sum()), seconds.size, *ms, float(spread) if grid.p20_s else None]
        )
    return Sheet(["pass", "axes", "measured", "points", "fastest_ms", "slowest_ms", "p20_to_p80"], rows)


def commits(profile: Profile) -> Sheet:
    """A row an operating point: tokens committed per denoise step, and quality."""
    source = "records" if profile.commit_records else "fitted law"
    quality = {(of.class_, of.gamma, of.steps_per_block): of for of in profile.quality}
    rows = [
        [*point, tokens, source, *(getattr(quality.get(point), column, None) for column in QUALITY)]
        for point, tokens in sorted(tokens_per_step(profile).items())
    ]
    return Sheet(["class", "gamma", "steps_per_block", "tokens_per_step", "source", *QUALITY], rows)


def tokens_per_step(profile: Profile) -> dict[Point, float]:
    """Tokens committed per denoise step at each operating point: as recorded, else as the law says (2,000 requests)."""
    tokens: dict[Point, list[int]] = {}
    for record in profile.commit_records:
        point = record.class_, record.gamma, record.steps_per_block
        tokens.setdefault(point, []).extend(size for sizes in record.blocks for size in sizes)
    found = {point: float(np.mean(sizes)) for point, sizes in tokens.items()}
    if profile.commits and not found:
        size, figures = profile.commits.block_size, profile.commits.figures()
        for name, of in profile.commits.classes.items():
            request, block = np.divmod(np.arange(2000 * of.blocks), of.blocks)
            for gamma, steps in of.points:
                law = FittedCommits(figures, name, gamma, size, min(steps, size))
                found[name, gamma, steps] = size / float(law.steps(0, request, block).mean())
    return found


def _table(title: str, *columns: str, words: tuple[str, ...] = ()) -> Table:
    """``words``: columns beside the first that hold no numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in (columns[0], *words) else "right")
    return table


def _origin(profile: Profile) -> Iterator[str]:
    of, device = profile.provenance, profile.device
    yield f"Provenance  {of}, {of.model}, {of.date}"
    for section, other in profile.provenance_of.items():
        yield f"            {section}: {other}, {other.model}, {other.date}"
    details = {"dtype": of.dtype, "placement": of.placement, "backend": of.backend, "weights": of.weights}
    known = {key: value for key, value in (details | of.environment).items() if value is not None}
    if known:
        yield "Details     " + ", ".join(f"{key} {value}" for key, value in known.items())
    if device:
        ceilings = f"{device.memory_bandwidth_gb_per_s:,.0f} GB/s, {device.bf16_tflops:,.2f} TFLOP/s"
        yield f"Device      {device.count} x {device.name}: {device.memory_mib:,} MiB, {ceilings}"
    if profile.latency and (memory := profile.latency.memory):
        sizes = f"{memory.bytes_per_sequence:,} bytes a sequence, {memory.bytes_per_token:,} bytes a token"
        yield f"Memory      weights {memory.weights_bytes / 1e9:,.3f} GB, {sizes}"
    if profile.latency and (engine := profile.latency.engine):
        ratios = ", ".join(f"{name} {np.mean(ratio):.2f}" for name, ratio in engine.ratios.items())
        beside = f"{engine.host_s * 1e3:.2f} ms a round beside, {engine.wake_s * 1e3:.2f} ms to wake"
        yield f"Engine      passes inside over alone: {ratios}; {beside}; {engine.rounds:,} rounds"
    yield from (f"Note        {note}" for note in of.notes)


def _range(axis: str, points: list[int]) -> str:
    return f"{axis} {points[0]}" if len(points) == 1 else f"{axis} {points[0]}…{points[-1]} ({len(points)})"


def _latency_table(profile: Profile) -> Table:
    table = _table("Latency (ms)", "Pass", "axes", "points", "fastest", "slowest", "p20-p80", words=("axes",))
    for name, axes, measured, points, low, high, spread in passes(profile).rows:
        share = "" if spread is None else f"{spread:.1%}"
        table.add_row(name, axes, f"{measured} of {points}", f"{low:,.3f}", f"{high:,.3f}", share)
    return table


def _commits_table(profile: Profile) -> Table:
    table = _table("Commits", "Class", "gamma", "T", "tokens/step", "from", "score", "bits/byte", "AR", words=("from",))
    for class_, gamma, steps, tokens, source, *figures in commits(profile).rows:
        known = ("" if figure is None else f"{figure:.3f}" for figure in figures)
        table.add_row(class_, f"{gamma:g}", str(steps), f"{tokens:.3f}", source, *known)
    return table


def facts(profile: Profile) -> Iterator[str]:
    of = profile.of("latency")
    age = _age_days(of.date)
    yield f"{of}; {of.date}{'' if age is None else f' ({age} days ago)'}"
    yield f"code {of.environment.get('commit', 'of unstated commit')}"
    if not profile.latency:
        yield "holds no latency"
        return
    for name, held in profile.latency.held_out.items():
        errors = f"median {held.median_error:.1%}, worst {held.worst_error:.1%}"
        yield f"{name}: {held.points} points held out, error of interpolation {errors}"


def doubts(profile: Profile) -> Iterator[str]:
    of, latency = profile.of("latency"), profile.latency
    if of.environment.get("dirty"):
        yield "measured with uncommitted changes in the code"
    if of.weights == "random":
        yield "measured with random weights: routing and commits are no checkpoint's"
    if not latency:
        return
    for name, grid in latency.grids.items():
        yield from _raised(name, grid)
    yield from _raised_mixes(latency)
    for name, held in latency.held_out.items():
        if held.median_error > HELD_OUT_ERROR:
            yield f"{name}: interpolation is off by {held.median_error:.1%} at half of the points held out"
    if (drift := latency.drift) and drift.moved:
        change = drift.again_s / drift.first_s - 1
        yield f"the device drifted while measuring: {change:+.1%} at a point whose samples spread {drift.spread:.1%}"
    for skipped in latency.skipped:
        yield f"{skipped.pass_} at {', '.join(map(str, skipped.point))} was skipped: {skipped.why}"


def _raised(name: str, grid: Grid) -> Iterator[str]:
    """Medians that fall along an axis, which the simulator raises to the running maximum."""
    seconds = grid.seconds()
    slices = seconds if "block_size" in grid.axes else seconds[None]
    raised = np.concatenate([(rising(part) / part - 1).ravel() for part in slices])
    if fallen := int((raised > 0).sum()):
        yield f"{name}: {fallen} medians fall along an axis; they are raised by up to {np.nanmax(raised):.1%}"


def _raised_mixes(latency: MeasuredLatency) -> Iterator[str]:
    """Mixes that took less than their longer part alone, which they are raised to."""
    for shared in ("extend", "decode"):
        name, grids = f"{shared}+prefill", latency.grids
        if name not in grids or shared not in grids or "prefill" not in grids:
            continue
        alone, prompts = (
            PassTime(part, grids[part], Hull(""), latency.mixed_block_size) for part in (shared, "prefill")
        )
        if faster := int((overlap(alone, prompts, grids[name]) == 0).sum()):
            yield f"{name}: {faster} points took no longer than their longer part alone and are taken as long"


def _age_days(date: str) -> int | None:
    try:
        return (datetime.now(UTC).date() - datetime.fromisoformat(date).date()).days
    except ValueError:
        return None


def _ratios(a: Grid, b: Grid) -> np.ndarray:
    """Times of ``b`` over those of ``a`` where both have one."""
    if (a.at_context, a.at_block_size) != (b.at_context, b.at_block_size):
        return np.zeros(0)
    left, right = (dict(zip(product(*grid.axes.values()), grid.median_s, strict=True)) for grid in (a, b))
    pairs = ((seconds, right.get(at)) for at, seconds in left.items())
    return np.array([theirs / mine for mine, theirs in pairs if mine and theirs])
