"""The page of a sweep: the answer, trade-offs, each metric over what varies, all points, and a closer look at one."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from twotower_sim.charts import Chart, Level, Spot, levels, plane
from twotower_sim.figures import is_felt
from twotower_sim.html_page import page
from twotower_sim.result import plain_json
from twotower_sim.run_charts import charts_of, watch
from twotower_sim.study import Point
from twotower_sim.tables import axis_in_words, first_alike_at, heading, value_in_words

MOST_POINTS = 2000
"""On a page; more make it slow, and no eye tells them apart."""
MOST_KINDS = 8
"""That colours tell apart."""
MOST_PLACES = 16
"""Of an axis on which each value has a place of its own."""


def write_sweep_page(path: Path, data: dict[str, Any], points: Sequence[Point], command: list[str]) -> None:
    """``data``: sweep.json. The first run of the point that the answer names is simulated once more."""
    data = plain_json(data)
    drawn = {**data, "points": _some(data)}
    charts = {"fronts": list(_fronts(drawn)), "metrics": list(_metrics(drawn))}
    if shown := data["shown"]:
        charts |= charts_of(watch(points[shown["point"] - 1].runs[0]))
    text = page(
        "sweep.html",
        data,
        charts,
        command,
        alike=first_alike_at,
        keys=_keys(data),
        verdicts=_verdicts(data),
        most=MOST_POINTS,
        is_felt=is_felt,
        words=value_in_words,
        axis=axis_in_words,
        few=_few_points,
    )
    path.write_text(text, encoding="utf-8")


def _some(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Points that charts show: all, or as many as they bear, with those on fronts."""
    best = {number for front in data["fronts"] for number in front["points"]}
    kept = sorted(data["points"], key=lambda of: of["point"] not in best)[:MOST_POINTS]
    return sorted(kept, key=lambda of: of["point"])


def _keys(data: dict[str, Any]) -> list[str]:
    """Of what varies, in order."""
    return list(dict.fromkeys(key for point in data["points"] for key in point["values"]))


def _varied(data: dict[str, Any]) -> list[str]:
    """First those that vary among the points that could be run."""
    ran = [point["values"] for point in data["points"] if any(point["metrics"].values())]
    return sorted(_keys(data), key=lambda key: len({value_in_words(values.get(key)) for values in ran}) < 2)


def _verdicts(data: dict[str, Any]) -> dict[int, list[str]]:
    """Of the points that do not bear their load, or could not be run."""
    found: dict[int, list[str]] = {}
    for key, words in (("unstable", "saturation"), ("failed", None)):
        for of in data[key]:
            found.setdefault(of["point"], []).append(of[words] if words else "failed")
    return {point: list(dict.fromkeys(words)) for point, words in found.items()}


def _few_points(numbers: Sequence[int]) -> str:
    """Or how many there are, if they are many."""
    if len(numbers) > MOST_KINDS:
        return f"{len(numbers)} points"
    return f"point{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


# ---------------------------------------------------------------------- charts


def _fronts(data: dict[str, Any]) -> Iterator[Chart]:
    kinds = _kinds(data)
    for front in data["fronts"]:
        paid, felt = front["paid"], front["felt"]
        spots = []
        for point in sorted(data["points"], key=lambda of: -(of["quality"] or 0)):
            x, y = point["metrics"][paid], point["metrics"][felt]
            if point["stable"] and x and y:
                best = point["point"] in front["points"]
                kind = kinds[point["point"]]
                label = f"№ {point['point']}" if best else ""
                spots.append(Spot(x["mean"], y["mean"], _name(point), kind, best, label, _quality(point) * best))
        if len({spot.x for spot in spots}) > 1 and len({spot.y for spot in spots}) > 1:
            note = "filled: no other point is better in all of it"
            yield plane(f"{heading(felt)} against {heading(paid)}", note, heading(paid), heading(felt), spots)


def _kinds(data: dict[str, Any]) -> dict[int, str]:
    """Of points by their numbers: how good the text is, if that varies; else the first of what varies."""
    points, keys = data["points"], _varied(data)
    qualities = {point["point"]: _quality(point) for point in points}
    values = {point["point"]: _value(point, keys[0]) for point in points}
    several = len({qualities[point["point"]] for point in points if point["stable"]}) > 1
    return qualities if several else _few(values, keys[0])


def _few(values: dict[int, str], key: str) -> dict[int, str]:
    """``values`` of a key by points, if colours tell them apart."""
    if len(set(values.values())) > MOST_KINDS:
        return dict.fromkeys(values, "")
    return {point: f"{key.rpartition('.')[2]} {value}" for point, value in values.items()}


def _quality(point: dict[str, Any]) -> str:
    return "quality not published" if point["quality"] is None else f"quality {point['quality']:.1%}"


def _metrics(data: dict[str, Any]) -> Iterator[Chart]:
    points, (first, *others) = data["points"], _varied(data)
    kinds = _few({of["point"]: _value(of, others[0]) for of in points}, others[0]) if others else {}
    values = [of["values"].get(first) for of in points]
    places = _places(values)
    for metric in data["study"]["metrics"]:
        there = [of for of in points if of["metrics"][metric] and (of["stable"] or not is_felt(metric))]
        left_out = sum(of["metrics"][metric] is not None for of in points) - len(there)
        note = f"without {left_out} that do not bear their load" if left_out else ""
        found = [
            Level(
                x=_value(of, first) if places else of["values"][first],
                **{end: of["metrics"][metric][end] for end in ("mean", "low", "high")},
                kind=kinds.get(of["point"], ""),
                line=json.dumps([of["values"].get(key) for key in others]),
                name=_name(of),
            )
            for of in there
        ]
        if found:
            yield levels(heading(metric), note, first, found, places, list(dict.fromkeys(kinds.values())) or [""])


def _places(values: Sequence[Any]) -> list[str]:
    """Of the values of an axis in order; none where they are numbers, and many."""
    distinct = list({json.dumps(value): value for value in values}.values())
    if all(isinstance(value, int | float) for value in distinct):
        return [] if len(distinct) > MOST_PLACES else [value_in_words(value) for value in sorted(distinct)]
    return list(dict.fromkeys("as is" if value is None else value_in_words(value) for value in distinct))


def _value(point: dict[str, Any], key: str) -> str:
    return value_in_words(point["values"][key]) if key in point["values"] else "as is"


def _name(point: dict[str, Any]) -> str:
    values = (f"{key.rpartition('.')[2]} {value_in_words(value)}" for key, value in point["values"].items())
    return f"№ {point['point']}: {', '.join(values)}"
