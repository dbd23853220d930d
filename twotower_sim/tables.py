"""Tables of results: as files, as data frames, and estimates as cells of them."""

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from twotower_sim.console import TITLES
from twotower_sim.interval import Estimate

if TYPE_CHECKING:
    import pandas


class Sheet(NamedTuple):
    """Rows under a header; None where a cell is empty."""

    header: list[str]
    rows: Sequence[Sequence[Any]]

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()

    def frame(self) -> "pandas.DataFrame":
        """Columns of numbers have NaN where a cell is empty, also where all are."""
        import pandas  # takes a while to import

        frame = pandas.DataFrame(self.rows, columns=self.header)
        return frame.astype(dict.fromkeys(frame.columns[frame.isna().all()], float))


def plain_estimate(of: Estimate | None) -> dict[str, Any] | None:
    return None if of is None else {"n": of.n, "mean": of.mean, "std": of.std, "low": of.low, "high": of.high}


def first_alike(texts: Iterable[str]) -> list[str]:
    """The first of those that differ in numbers alone."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(re.sub(r"\d[\d,.]*", "0", text), text)
    return list(found.values())


def first_alike_at(texts: Sequence[str]) -> dict[int, bool]:
    """Where these stand, and whether there are others like them."""
    kinds = [re.sub(r"\d[\d,.]*", "0", text) for text in texts]
    return {kinds.index(kind): kinds.count(kind) > 1 for kind in dict.fromkeys(kinds)}


def shown(of: Estimate | None) -> str:
    if of is None:
        return ""
    return number(of.mean) if of.half is None else f"{number(of.mean)} ± {number(float(f'{of.half:.2g}'))}"


def in_words(name: str) -> str:
    """A dotted name as a heading that can be broken over lines."""
    return name.replace("_", " ").replace(".", " ")


def heading(name: str) -> str:
    """A figure's dotted name as it stands over a column or beside an axis."""
    metric, _, statistic = name.removeprefix("metrics.").partition(".")
    if metric not in TITLES:
        return COSTS.get(name, in_words(name))
    title, bracket, unit = TITLES[metric].partition(" (")
    return f"{title} {statistic}".rstrip() + bracket + unit


COSTS = {
    "cost.usd": "$",
    "cost.usd_per_million_output_tokens": "$ per million output tokens",
    "cost.kwh_per_million_output_tokens": "kWh per million output tokens",
    "cost.gpu_hours": "GPU hours",
}


def value_in_words(value: Any) -> str:
    """A value of a scenario as people say it."""
    if isinstance(value, dict):
        rest = (f"{name} {value_in_words(of)}" for name, of in value.items() if name != "kind" and of not in (None, {}))
        return ", ".join([*([str(value["kind"])] if "kind" in value else []), *rest])
    if isinstance(value, list):
        return ", ".join(map(value_in_words, value))
    return value if isinstance(value, str) else json.dumps(value)


def axis_in_words(of: list[Any] | dict[str, Any]) -> str:
    """Values that something may have, or their range."""
    if isinstance(of, list):
        return "; ".join(map(value_in_words, of))
    return f"{of['low']:g} to {of['high']:g}" + ", by magnitude" * of["log"] + ", whole" * of["integer"]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
