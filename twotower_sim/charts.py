"""Charts of a page: Vega-Lite, as wide as where they stand, without colours of their own (the page has two themes)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from twotower_sim.pairs_plot import load_altair

QUANTILES = 200
"""Of a distribution: closer together in its tails."""
SHOWN = np.sin(np.linspace(0, np.pi / 2, QUANTILES)) ** 2
HEIGHT, ROW = 180, 28  # pixels
Limit = tuple[str, float]
"""What it is called, and where it lies."""


class Chart(NamedTuple):
    title: str
    note: str
    spec: dict[str, Any]
    wide: bool = True


def distribution(title: str, unit: str, samples: np.ndarray, limits: Iterable[Limit] = ()) -> Chart | None:
    """The share of samples that is at most as large, and limits as lines; None without samples above 0. What is 0 has
    no place on a logarithmic axis; the note says that there is some."""
    altair = load_altair()
    above, limits = samples[samples > 0], list(limits)
    if not len(above):
        return None
    zero = len(samples) - len(above)
    share = (zero + SHOWN * len(above)) / len(samples)
    rows = _rows(x=np.quantile(above, SHOWN), p=share)
    ends = [float(above.min()), float(above.max()), *(at for _, at in limits)]
    scale = altair.Scale(type="log", domain=[min(ends) / 1.05, max(ends) * 1.05], nice=False)
    across = altair.X("x:Q", title=unit, scale=scale, axis=altair.Axis(tickCount=5))
    up = altair.Y("p:Q", title="share at most", axis=altair.Axis(format="%"), scale=altair.Scale(domain=[0, 1]))
    told = [altair.Tooltip("x:Q", title=unit, format=",.4g"), altair.Tooltip("p:Q", title="share", format=".1%")]
    layers = [_chart(altair, rows).mark_line(aria=False).encode(x=across, y=up, tooltip=told)]
    for name, value in limits:
        at = _chart(altair, [{"x": value, "name": name}])
        layers.append(at.mark_rule(strokeDash=[5, 4], aria=False).encode(x="x:Q", tooltip="name:N"))
    note = "; ".join(
        [f"dashed: {' and '.join(name for name, _ in limits)}"] * bool(limits) + ["some are 0"] * bool(zero)
    )
    return Chart(
        title, note, _spec(altair.layer(*layers), f"{title}: share of them at most as large, in {unit}"), False
    )


def over_time(
    title: str, unit: str, edges_s: np.ndarray, curves: Mapping[str, np.ndarray], share: bool = False
) -> Chart:
    """Values of bins, NaN where there is none; one curve is an area, several are lines."""
    altair = load_altair()
    unit_s, of_time = next((of for of in UNITS if edges_s[-1] >= 3 * of[0]), UNITS[-1])
    rows = [  # the last value holds until the last edge
        row | {"curve": name}
        for name, values in curves.items()
        for row in _rows(x=edges_s / unit_s, y=np.append(values, values[-1]))
    ]
    axis = altair.Axis(format="%") if share else altair.Axis(tickMinStep=1, tickCount=5)
    ticks = altair.Axis(tickCount=8)
    across = altair.X("x:Q", title=f"{of_time} from the start", scale=altair.Scale(nice=False), axis=ticks)
    up = altair.Y("y:Q", title=unit, axis=axis, scale=altair.Scale(domain=[0, 1]) if share else altair.Undefined)
    told = [
        altair.Tooltip("x:Q", title=of_time, format=",.4g"),
        altair.Tooltip("y:Q", title=unit, format=".1%" if share else ",.4g"),
    ]
    base = _chart(altair, rows)
    if len(curves) == 1:
        drawn = base.mark_area(interpolate="step-after", aria=False).encode(x=across, y=up, tooltip=told)
    else:
        legend = altair.Legend(title=None, orient="top")
        color = altair.Color("curve:N", sort=list(curves), legend=legend)
        told = [altair.Tooltip("curve:N", title="what"), *told]
        dash = altair.StrokeDash("curve:N", sort=list(curves), legend=None)
        drawn = base.mark_line(interpolate="step-after", aria=False).encode(
            x=across, y=up, color=color, strokeDash=dash, tooltip=told
        )
    width_s = float(edges_s[1] - edges_s[0])
    note = f"averages over {width_s:.2g} s" if width_s < 10 else f"averages over {width_s:.0f} s"
    return Chart(title, note, _spec(drawn, f"{title} over time: {', '.join(curves)}"))


UNITS = ((86_400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


def histogram(title: str, what: str, unit: str, counts: Mapping[int, int]) -> Chart | None:
    """How many there are of each kind, kinds in order; None without any."""
    if not counts:
        return None
    altair = load_altair()
    rows = [{"x": x, "y": y} for x, y in counts.items()]
    across = altair.X("x:O", title=what, axis=altair.Axis(labelAngle=0, labelOverlap="greedy"))
    told = [altair.Tooltip("x:O", title=what), altair.Tooltip("y:Q", title=unit, format=",")]
    bars = _chart(altair, rows).mark_bar(aria=False).encode(x=across, y=altair.Y("y:Q", title=unit), tooltip=told)
    return Chart(title, "", _spec(bars, f"{title}: {unit} by {what}"), False)


def shares(title: str, note: str, parts: Sequence[tuple[str, float]]) -> Chart:
    """A bar for each part of a whole."""
    altair = load_altair()
    rows = [{"part": name, "share": value} for name, value in parts]
    names = altair.Y("part:N", title=None, sort=[name for name, _ in parts], axis=altair.Axis(labelLimit=200))
    across = altair.X("share:Q", title="share of time", axis=altair.Axis(format="%"), scale=altair.Scale(domain=[0, 1]))
    told = [altair.Tooltip("part:N"), altair.Tooltip("share:Q", format=".1%")]
    bars = _chart(altair, rows, ROW * len(rows)).mark_bar(aria=False).encode(x=across, y=names, tooltip=told)
    return Chart(title, note, _spec(bars, f"{title}: {note}"), False)


def _rows(**columns: np.ndarray) -> list[dict[str, Any]]:
    """To six digits, which no eye can tell apart; None for NaN."""
    kept = ([None if np.isnan(of) else float(f"{of:.6g}") for of in column] for column in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*kept, strict=True)]


def _chart(altair: Any, rows: list[dict[str, Any]], height: int = HEIGHT) -> Any:
    return altair.Chart(altair.Data(values=rows), width="container", height=height)


def _spec(chart: Any, description: str) -> dict[str, Any]:
    spec = chart.properties(width="container", description=description).to_dict()
    del spec["config"]  # the page's
    return spec
