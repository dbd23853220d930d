"""Pictures of a profile: time over each axis of every pass, tokens per step over gamma. HTML files work offline."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.profile import Grid, Profile, load_profile
from twotower_sim.profile_report import tokens_per_step

SUFFIXES = (".html", ".png", ".svg")
WIDTH, HEIGHT = 320, 220  # pixels of one panel
Row = dict[str, Any]


def plot_profile(name: str, out: Path) -> None:
    """Draw a profile to ``out``. Raises InputError without altair or for a suffix that is none of SUFFIXES."""
    profile = load_profile(name)
    if out.suffix not in SUFFIXES:
        raise InputError(f"--plot {out}: found suffix {out.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise InputError(f"--plot needs {error.name}: pip install 'twotower-sim[plot]'") from None
    panels = [
        _row_of_panels(altair, name, grid) for name, grid in (profile.latency.grids if profile.latency else {}).items()
    ]
    if commits := _commits_panel(altair, profile):
        panels.append(commits)
    if not panels:
        raise InputError(f"{name}: holds neither latency nor commits to plot")
    title = altair.Title(profile.provenance.device, subtitle=f"{profile.provenance.model}, {profile.provenance}")
    chart = altair.vconcat(*panels, title=title).resolve_scale(color="independent", strokeDash="independent")
    try:
        chart.save(str(out), **({"inline": True} if out.suffix == ".html" else {"scale_factor": 2}))
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None


def _row_of_panels(altair: Any, name: str, grid: Grid) -> Any:
    free = [axis for axis in grid.axes if axis != "block_size"]
    panels = [_panel(altair, name, axis, list(_curves(grid, axis, free))) for axis in free]
    return altair.hconcat(*panels).resolve_scale(color="independent")


def _curves(grid: Grid, x: str, free: list[str]) -> Iterator[Row]:
    """Points over the axis ``x``, a curve for each number of tokens (else for each point of the other free axis); of a
    third axis the first point."""
    others = [axis for axis in free if axis != x]
    by = "tokens" if "tokens" in others else others[0]
    columns = [grid.median_s, grid.p20_s or grid.median_s, grid.p80_s or grid.median_s]
    for point, *seconds in zip(product(*grid.axes.values()), *columns, strict=True):
        at = dict(zip(grid.axes, point, strict=True))
        fixed = [axis for axis in free if axis not in (x, by)]
        if seconds[0] is None or any(at[axis] != grid.axes[axis][0] for axis in fixed):
            continue
        sizes = f", block {at['block_size']}" if len(grid.axes.get("block_size", [])) > 1 else ""
        ms = dict(zip(("ms", "low", "high"), (s * 1e3 for s in seconds), strict=True))
        held = "".join(f", {axis} {at[axis]}" for axis in fixed)
        yield {"x": at[x], "order": at[by], "curve": f"{at[by]}{sizes}", "by": f"{by}{held}", **ms}


def _panel(altair: Any, name: str, x: str, rows: list[Row]) -> Any:
    curves = list(dict.fromkeys(row["curve"] for row in sorted(rows, key=lambda row: row["order"])))
    legend = altair.Legend(title=rows[0]["by"], symbolOpacity=1, symbolType="stroke")
    color = altair.Color("curve:N", sort=curves, legend=legend, scale=altair.Scale(scheme="viridis"))
    ticks = altair.Axis(values=sorted({row["x"] for row in rows}), labelOverlap="greedy")
    across = altair.X("x:Q", title=x, axis=ticks, scale=altair.Scale(type="symlog"))
    up = altair.Y("low:Q", title="ms (band: p20 to p80)", scale=altair.Scale(type="log"))
    base = altair.Chart(altair.Data(values=rows), title=name, width=WIDTH, height=HEIGHT).encode(x=across, color=color)
    return base.mark_area(opacity=0.2).encode(y=up, y2="high:Q") + base.mark_line(point=True).encode(y="ms:Q")


def _commits_panel(altair: Any, profile: Profile) -> Any:
    rows = [
        {"class": class_, "gamma": gamma, "T": steps, "tokens": tokens}
        for (class_, gamma, steps), tokens in sorted(tokens_per_step(profile).items())
    ]
    if not rows:
        return None
    base = altair.Chart(altair.Data(values=rows), title="commits", width=WIDTH, height=HEIGHT)
    return base.mark_line(point=True).encode(
        x=altair.X("gamma:Q", scale=altair.Scale(zero=False)),
        y=altair.Y("tokens:Q", title="tokens per step"),
        color="class:N",
        strokeDash=altair.StrokeDash("T:O", title="steps per block", legend=altair.Legend(symbolType="stroke")),
    )
