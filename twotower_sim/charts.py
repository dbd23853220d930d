"""Charts of a page: Vega-Lite, as wide as where they stand, without colours of their own (the page has two themes)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from twotower_sim.pairs_plot import load_altair

QUANTILES = 200
"""Of a distribution: closer together in its tails."""
SHOWN = np.sin(np.linspace(0, np.pi / 2, QUANTILES)) ** 2
HEIGHT, TALL, ROW = 180, 240, 28  # pixels
FAR = 8.0  # from each other: values that a linear axis does not show
LABEL = np.array([0.14, 0.07])  # widths and heights of a chart that a label takes
WIDTH = 40  # letters of a legend that fits a telephone
Limit = tuple[str, float]
"""What it is called, and where it lies."""
Curve = tuple[np.ndarray, np.ndarray]
"""Edges of bins in seconds (k + 1,), and values (k,)."""


class Chart(NamedTuple):
    title: str
    note: str
    spec: dict[str, Any]
    wide: bool = True


def distribution(title: str, unit: str, curves: Mapping[str, np.ndarray], limits: Iterable[Limit] = ()) -> Chart | None:
    """Of each curve the share of its samples that is at most as large, and limits as lines; None without samples above
    0. What is 0 has no place on a logarithmic axis; the note says that there is some."""
    altair = load_altair()
    above = {name: samples[samples > 0] for name, samples in curves.items() if (samples > 0).any()}
    if not above:
        return None
    limits, zero = list(limits), any((samples == 0).any() for samples in curves.values())
    rows = [row | {"curve": name} for name, of in above.items() for row in _quantiles(of, len(curves[name]))]
    ends = [*(float(end(of)) for of in above.values() for end in (np.min, np.max)), *(at for _, at in limits)]
    scale = altair.Scale(type="log", domain=[min(ends) / 1.05, max(ends) * 1.05], nice=False)
    across = altair.X("x:Q", title=unit, scale=scale, axis=altair.Axis(tickCount=5))
    up = altair.Y("p:Q", title="share at most", axis=altair.Axis(format="%"), scale=altair.Scale(domain=[0, 1]))
    told = [altair.Tooltip("x:Q", title=unit, format=",.4g"), altair.Tooltip("p:Q", title="share", format=".1%")]
    layers = [_lines(altair, _chart(altair, rows).mark_line(aria=False), list(curves), x=across, y=up, tooltip=told)]
    for name, value in limits:
        at = _chart(altair, [{"x": value, "name": name}])
        layers.append(at.mark_rule(strokeDash=[5, 4], aria=False).encode(x="x:Q", tooltip="name:N"))
    note = "; ".join([f"dashed: {' and '.join(name for name, _ in limits)}"] * bool(limits) + ["some are 0"] * zero)
    return Chart(
        title, note, _spec(altair.layer(*layers), f"{title}: share of them at most as large, in {unit}"), False
    )


def _quantiles(above: np.ndarray, of_all: int) -> list[dict[str, Any]]:
    """``above``: samples above 0; the rest of all are 0."""
    return _rows(x=np.quantile(above, SHOWN), p=(of_all - len(above) + SHOWN * len(above)) / of_all)


def over_time(title: str, unit: str, curves: Mapping[str, Curve], share: bool = False) -> Chart:
    """Values of bins, NaN where there is none; one curve is an area, several are lines."""
    altair = load_altair()
    last_s = max(edges_s[-1] for edges_s, _ in curves.values())
    unit_s, of_time = next((of for of in UNITS if last_s >= 3 * of[0]), UNITS[-1])
    rows = [  # the last value holds until the last edge
        row | {"curve": name}
        for name, (edges_s, values) in curves.items()
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
    mark = base.mark_area if len(curves) == 1 else base.mark_line
    drawn = _lines(altair, mark(interpolate="step-after", aria=False), list(curves), x=across, y=up, tooltip=told)
    widths_s = sorted({float(f"{edges_s[1] - edges_s[0]:.2g}") for edges_s, _ in curves.values()})
    note = f"averages over {' or '.join(f'{width_s:g}' for width_s in widths_s)} s"
    return Chart(title, note, _spec(drawn, f"{title} over time: {', '.join(curves)}"))


def _lines(altair: Any, marks: Any, names: Sequence[str], tooltip: list[Any], **encoded: Any) -> Any:
    """Several are told apart by colour and by dashes."""
    if len(names) == 1:
        return marks.encode(**encoded, tooltip=tooltip)
    color, _ = _kinds(altair, "curve", names)
    dash = altair.StrokeDash("curve:N", sort=names, legend=None)
    return marks.encode(
        **encoded, color=color, strokeDash=dash, tooltip=[altair.Tooltip("curve:N", title="what"), *tooltip]
    )


UNITS = ((86_400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


def histogram(title: str, what: str, unit: str, counts: Mapping[int, int]) -> Chart | None:
    """How many there are of each kind, kinds in order; None without any."""
    if not counts:
        return None
    altair = load_altair()
    rows = [{"x": x, "y": int(y)} for x, y in counts.items()]
    across = altair.X("x:O", title=what, axis=altair.Axis(labelAngle=0, labelOverlap="greedy"))
    told = [altair.Tooltip("x:O", title=what), altair.Tooltip("y:Q", title=unit, format=",")]
    bars = _chart(altair, rows).mark_bar(aria=False).encode(x=across, y=altair.Y("y:Q", title=unit), tooltip=told)
    return Chart(title, "", _spec(bars, f"{title}: {unit} by {what}"), False)


def bars(title: str, note: str, unit: str, parts: Sequence[tuple[str, float]], share: bool = False) -> Chart:
    """One for each part; ``share``: of a whole."""
    altair = load_altair()
    rows = [{"part": name, "value": float(value)} for name, value in parts]
    names = altair.Y("part:N", title=None, sort=[name for name, _ in parts], axis=altair.Axis(labelLimit=200))
    axis = altair.Axis(format="%") if share else altair.Axis(tickCount=6)
    scale = altair.Scale(domain=[0, 1]) if share else altair.Undefined
    across = altair.X("value:Q", title=unit, axis=axis, scale=scale)
    told = [altair.Tooltip("part:N"), altair.Tooltip("value:Q", title=unit, format=".1%" if share else ",.4g")]
    drawn = _chart(altair, rows, ROW * len(rows)).mark_bar(aria=False).encode(x=across, y=names, tooltip=told)
    return Chart(title, note, _spec(drawn, f"{title}: {note}"), not share)


class Spot(NamedTuple):
    """A point of a plane. ``kind``: what is coloured alike; ``shape``: what is shaped alike, "" for its kind;
    ``filled``: else hollow; ``label``: beside it; ``line``: the one that joins it with others, "" for none."""

    x: float
    y: float
    name: str
    kind: str
    filled: bool
    label: str = ""
    line: str = ""
    shape: str = ""


def plane(
    title: str, note: str, x: str, y: str, spots: Sequence[Spot], limit: Limit | None = None, share: bool = False
) -> Chart:
    """Spots by two figures; ``limit`` of y, as a line; ``share``: whether y is one."""
    altair = load_altair()
    across = altair.X("x:Q", title=x, scale=_scale(altair, [spot.x for spot in spots]), axis=altair.Axis(tickCount=6))
    axis = altair.Axis(tickCount=6, **({"format": "~%"} if share else {}))
    up = altair.Y("y:Q", title=y, scale=_scale(altair, [*(spot.y for spot in spots), *(limit or ())[1:]]), axis=axis)
    color, shape = _kinds(altair, "kind", list(dict.fromkeys(spot.kind for spot in spots)))
    if any(spot.shape for spot in spots):
        _, shape = _kinds(altair, "shape", list(dict.fromkeys(spot.shape for spot in spots)))
    told = [altair.Tooltip("name:N", title="what"), altair.Tooltip("x:Q", title=x, format=",.4g")]
    told.append(altair.Tooltip("y:Q", title=y, format=".1%" if share else ",.4g"))

    def layer(some: Iterable[Spot], mark: str, **marked: Any) -> Any:
        chart = _chart(altair, [spot._asdict() for spot in some], TALL)
        return getattr(chart, f"mark_{mark}")(aria=False, **marked).encode(x=across, y=up)

    joined = layer(sorted(spot for spot in spots if spot.line), "line", style="quiet", strokeDash=[2, 3])
    layers = [joined.encode(detail="line:N")]
    for filled in (False, True):
        points = layer((spot for spot in spots if spot.filled == filled), "point", filled=filled, opacity=1, size=70)
        layers.append(points.encode(color=color, shape=shape, tooltip=told))
    named = _apart([spot for spot in spots if spot.label])
    layers.append(layer(named, "text", align="left", dx=8, dy=-6).encode(text="label:N"))
    if limit:
        at = _chart(altair, [{"y": limit[1], "name": limit[0]}], TALL)
        layers.append(at.mark_rule(strokeDash=[5, 4], aria=False).encode(y="y:Q", tooltip="name:N"))
    return Chart(title, note, _spec(altair.layer(*layers), f"{title}: {y} by {x}"), share)


def _apart(spots: Sequence[Spot]) -> list[Spot]:
    """Those whose labels do not cover one another."""
    kept: list[tuple[Any, Spot]] = []
    across, up = _placed([spot.x for spot in spots]), _placed([spot.y for spot in spots])
    for spot, place in zip(spots, np.transpose([across, up]), strict=True):
        if all((abs(place - other) > LABEL).any() for other, _ in kept):
            kept.append((place, spot))
    return [spot for _, spot in kept]


def _placed(values: Sequence[float]) -> np.ndarray:
    """Where they are between the ends of their axis, as shares of its length."""
    of = np.log(values) if _are_far(values) else np.array(values)
    return (of - of.min()) / (np.ptp(of) or 1.0) if len(of) else of


def _are_far(values: Sequence[float]) -> bool:
    """Whether they are on a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) > FAR * min(values)


def _scale(altair: Any, values: Sequence[float]) -> Any:
    low, high = min(values), max(values)
    if _are_far(values):
        return altair.Scale(type="log", domain=[low / 1.2, high * 1.2], nice=False)
    room = (high - low or abs(high) or 1.0) * 0.08
    return altair.Scale(domain=[low - room, high + room], nice=False)


class Ratio(NamedTuple):
    """Of a figure to another, and its interval; ``kind``: better, worse, or something else."""

    name: str
    ratio: float
    low: float | None
    high: float | None
    kind: str


def ratios(title: str, note: str, rows: Sequence[Ratio]) -> Chart:
    """One above the other, by a line at 1."""
    altair = load_altair()
    names = [row.name for row in rows]
    ends = [1.0, *(end for row in rows for end in (row.ratio, row.low, row.high) if end is not None)]
    log = min(ends) > 0
    room = 1.1 if log else 0.05 * (max(ends) - min(ends))
    domain = [min(ends) / room, max(ends) * room] if log else [min(ends) - room, max(ends) + room]
    scale = altair.Scale(type="log" if log else "linear", domain=domain, nice=False)
    axis = altair.Axis(tickCount=6)
    across, low = (altair.X(f"{end}:Q", title="ratio", scale=scale, axis=axis) for end in ("ratio", "low"))
    up = altair.Y("name:N", title=None, sort=names, axis=altair.Axis(labelLimit=180))
    color, shape = _kinds(altair, "kind", [*VERDICTS, *{row.kind for row in rows}.difference(VERDICTS)])
    told = [altair.Tooltip("name:N", title="what"), altair.Tooltip("kind:N", title="is")]
    told += [altair.Tooltip(f"{of}:Q", format=",.4g") for of in ("ratio", "low", "high")]
    height = ROW * len(rows)
    base = _chart(altair, [row._asdict() for row in rows], height).encode(y=up, color=color)
    layers = [_chart(altair, [{"one": 1}], height).mark_rule(strokeDash=[5, 4], aria=False).encode(x="one:Q")]
    layers += [base.mark_rule(aria=False).encode(x=low, x2="high:Q")] * any(row.low is not None for row in rows)
    points = base.mark_point(filled=True, opacity=1, size=80, aria=False)
    layers.append(points.encode(x=across, shape=shape, tooltip=told))
    return Chart(title, note, _spec(altair.layer(*layers), f"{title}: ratios"))


VERDICTS = ("better", "worse", "not told apart")


class Level(NamedTuple):
    """A mean and its interval, at a place on an axis; ``line``: which joins it with others; ``kind``: what is coloured
    alike."""

    x: Any
    mean: float
    low: float | None
    high: float | None
    kind: str
    line: str
    name: str


def levels(
    title: str, note: str, x: str, levels_: Sequence[Level], places: Sequence[Any], kinds: Sequence[str]
) -> Chart:
    """Means with intervals over an axis: ``places`` in order, or none for numbers of any value; ``kinds``: all that
    charts beside this one tell apart."""
    altair = load_altair()
    rows = [of._asdict() for of in levels_]
    if places:
        axis, scale = altair.Axis(labelAngle=0, labelLimit=120), altair.Scale(padding=0.5)
        across = altair.X("x:N", title=x, sort=list(places), axis=axis, scale=scale)
    else:
        across = altair.X("x:Q", title=x, scale=_scale(altair, [of.x for of in levels_]))
    ends = [end for of in levels_ for end in (of.mean, of.low, of.high) if end is not None]
    up, low = (altair.Y(f"{end}:Q", title=None, scale=_scale(altair, ends)) for end in ("mean", "low"))
    color, shape = _kinds(altair, "kind", kinds)
    told = [altair.Tooltip("name:N", title="what"), altair.Tooltip("mean:Q", title=title, format=",.4g")]
    told += [altair.Tooltip(f"{end}:Q", format=",.4g") for end in ("low", "high")]
    base = _chart(altair, rows).encode(x=across, y=up, color=color)
    layers = [base.mark_rule(aria=False).encode(y=low, y2="high:Q")] * any(of.low is not None for of in levels_)
    if places:
        layers.append(base.mark_line(aria=False, opacity=0.6).encode(detail="line:N"))
    layers.append(base.mark_point(filled=True, opacity=1, size=50, aria=False).encode(shape=shape, tooltip=told))
    return Chart(title, note, _spec(altair.layer(*layers), f"{title} by {x}"), False)


def _kinds(altair: Any, field: str, names: Sequence[str]) -> tuple[Any, Any]:
    """Colour and shape of what is told apart, in one legend."""
    columns = max(WIDTH // (max(map(len, names)) + 3), 1)
    legend = altair.Legend(title=None, orient="top", columns=columns, labelLimit=280) if len(names) > 1 else None
    scale = altair.Scale(domain=list(names))
    return (
        altair.Color(f"{field}:N", scale=scale, legend=legend),
        altair.Shape(f"{field}:N", scale=scale, legend=legend),
    )


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
