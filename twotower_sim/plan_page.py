"""The page of a plan: the answer and its margin, what else there is at what cost, and a closer look at the answer."""

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

from twotower_sim.capacity import Objective
from twotower_sim.charts import Chart, Spot, bars, plane
from twotower_sim.experiments import Experiment
from twotower_sim.html_page import page
from twotower_sim.interval import Estimate
from twotower_sim.plan_file import LEAST
from twotower_sim.result import plain_json
from twotower_sim.run_charts import charts_of, watch
from twotower_sim.saturation import STABLE
from twotower_sim.tables import axis_in_words, value_in_words

Trial = dict[str, Any]
"""As plan.json has it."""
MOST_TRIALS = 2000
"""On a page."""


def write_plan_page(path: Path, data: dict[str, Any], shown: Experiment | None, command: list[str]) -> None:
    """``data``: plan.json; ``shown``: a run of the deployment that it shows, which is simulated once more."""
    data = plain_json(data)
    charts = {"costs": list(_costs(data)), "front": list(_front(data))}
    charts |= charts_of(watch(shown)) if shown else {}
    more = {"shares": lambda of: _shares(of, data), "is_stable": _is_stable, "least": LEAST}
    more |= {"most": MOST_TRIALS, "words": value_in_words, "choice": axis_in_words}
    path.write_text(page("plan.html", data, charts, command, **more), encoding="utf-8")


def _is_stable(of: Trial) -> bool:
    return set(of["saturation"]) == {STABLE}


def _shares(of: Trial, data: dict[str, Any]) -> dict[str, float]:
    """Of each objective, how much of its bound the bad end of the interval is: up to 1 meets it."""
    return {
        name: Objective(name, bound, name in LEAST).ratio(_estimate(of["objectives"].get(name)))
        for name, bound in data["plan"]["objectives"].items()
    }


def _estimate(of: dict[str, Any] | None) -> Estimate | None:
    if of is None:
        return None
    return Estimate(of["n"], of["mean"], of["std"], None if of["high"] is None else of["high"] - of["mean"])


def _costs(data: dict[str, Any]) -> Iterator[Chart]:
    rows = [(f"{of['replicas']} x {of['gpu']}, {of['decoding']}", of["usd_per_hour"]) for of in data["cheapest"]]
    if rows:
        yield bars(
            "Cost", "the cheapest that meets the objectives, by GPU type and way of decoding", "$ per hour", rows
        )


def _front(data: dict[str, Any]) -> Iterator[Chart]:
    front = [(of["candidate"], of["replicas"]) for of in data["front"]]
    stable = [of for of in data["trials"] if _is_stable(of)]
    spots = []
    for of in sorted(stable, key=lambda of: (of["candidate"], of["replicas"]) not in front)[:MOST_TRIALS]:
        share = max(_shares(of, data).values())
        best = (of["candidate"], of["replicas"]) in front
        if share < inf:
            spots.append(
                Spot(
                    x=of["usd_per_hour"],
                    y=share,
                    name=f"{of['replicas']} x {of['candidate']}",
                    kind=of["decoding"],
                    shape=of["gpu"],
                    filled=of["meets"],
                    label=f"{of['replicas']} x {of['gpu']}" if best else "",
                    line=_quality(of) if best else "",
                )
            )
    if spots:
        note = "filled: meets all objectives; joined: nothing is better in cost, distance from the bounds and quality"
        unstable = len(data["trials"]) - len(stable)
        note += f"; left out: {unstable} that do not bear the load" if unstable else ""
        yield plane("All trials", note, "$ per hour", "worst share of its bound", spots, ("the bound", 1.0), True)


def _quality(of: Trial) -> str:
    return "not published" if of["quality"] is None else f"{of['quality']:.1%}"
