"""The page of a comparison: the answer, ratios with their intervals, and the runs of all sides over each other."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twotower_sim.charts import Chart, Ratio, ratios
from twotower_sim.experiments import Experiment
from twotower_sim.html_page import page
from twotower_sim.result import plain_json
from twotower_sim.run_charts import charts_beside, watch, work
from twotower_sim.tables import first_alike_at, heading, value_in_words

Keys = tuple[str, ...]
MISSING = object()


def write_compare_page(path: Path, data: dict[str, Any], runs: Mapping[str, Experiment], command: list[str]) -> None:
    """``data``: compare.json; ``runs``: of each side the first, which is simulated once more."""
    data = plain_json(data)
    sides = data["scenarios"]
    seen = {name: watch(run) for name, run in runs.items()}
    charts = {"ratios": list(_ratios(data))} | charts_beside(seen)
    charts |= {f"work of {index}": list(work(of)) for index, of in enumerate(seen.values())}
    text = page(
        "compare.html",
        data,
        charts,
        command,
        fallen=[side["name"] for side in sides if set(side["saturation"]) != {"STABLE"}],
        alike=first_alike_at,
        differing=_differing([side["scenario"] for side in sides]),
        sources=_sources(sides),
        words=value_in_words,
    )
    path.write_text(text, encoding="utf-8")


def _ratios(data: dict[str, Any]) -> Iterator[Chart]:
    first, *others = data["scenarios"]
    for side in others:
        rows = []
        for metric, of in side["metrics"].items():
            if of and of["comparable"] and of.get("ratio"):
                low, high = of["ratio_interval"] or (None, None)
                name = heading(metric).removesuffix(" (ms)")
                rows.append(Ratio(name, of["ratio"], low, high, of["verdict"] or "other"))
        if rows:
            note = "ratios of means" + ", with 95 % intervals" * (data["replications"] > 1)
            yield ratios(f"{side['name']} to {first['name']}", note, rows)


def _differing(scenarios: list[dict[str, Any]]) -> list[tuple[Keys, list[bool]]]:
    """Where they are not the same, and which of them has something there; a section whose kind differs as a whole."""

    def below(keys: Keys, parts: list[Any]) -> Iterator[tuple[Keys, list[bool]]]:
        if all(isinstance(part, dict) and part.get("kind") == parts[0].get("kind") for part in parts):
            for key in dict.fromkeys(key for part in parts for key in part):
                yield from below((*keys, key), [part.get(key, MISSING) for part in parts])
        elif any(part != parts[0] for part in parts):
            yield keys, [part is not MISSING for part in parts]

    return [found for found in below((), scenarios) if found[0] != ("name",)]


def _sources(sides: list[dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """Of a part and what it is from, the sides that have it so."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, side in enumerate(sides):
        for of in side["provenance"].items():
            found[of].append(index)
    return found
