"""Pictures of a trace: arrivals over time, gaps between them, lengths, what prompts share. HTML files work offline."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from twotower_sim.pairs_plot import load_altair, save
from twotower_sim.readers import Trace
from twotower_sim.requests import Requests
from twotower_sim.trace.stats import reused_tokens, spread_arrivals

WIDTH, HEIGHT = 380, 200  # pixels of a panel
BINS_S = (1, 10, 60, 600, 3600, 86_400)
MOST_BINS = 240
POINTS = 500
"""Of a distribution: quantiles, closer together in its tails."""
SHOWN = np.sin(np.linspace(0, np.pi / 2, POINTS)) ** 2
Row = dict[str, Any]


def plot_trace(trace: Trace, name: str, path: Path, suffix: str) -> None:
    """Draw to ``path`` in the format of ``suffix``. Raises InputError."""
    altair, requests = load_altair(), trace.requests
    panels = [_distribution(altair, "Lengths", "tokens", list(_lengths(requests)), ["input", "output"])]
    if not trace.relative:
        arrival_ns, bin_ns = spread_arrivals(requests.arrival_ns)
        spread = f"time stamps spread over {bin_ns / 1e9:g} s" if bin_ns else ""
        panels = [_arrivals(altair, arrival_ns), *panels]
        if len(gaps := list(_gaps(arrival_ns))):
            panels.append(_distribution(altair, "Gaps between arrivals", "seconds", gaps, ["trace", "Poisson"], spread))
        if requests.prefixes:
            panels.append(_reuse(altair, arrival_ns, requests))
    title = altair.Title(name, subtitle=f"{len(requests):,} requests, format {trace.format}")
    chart = altair.concat(*panels, columns=2, title=title).resolve_scale(color="independent", strokeDash="independent")
    save(chart, path, suffix)


def _bins(arrival_ns: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Seconds of a bin, the bin of each arrival, and where bins begin, and the last one ends."""
    span_s = arrival_ns[-1] / 1e9
    bin_s = next((bin_s for bin_s in BINS_S if span_s / bin_s <= MOST_BINS), int(span_s / MOST_BINS))
    of = arrival_ns // (bin_s * 10**9)
    return bin_s, of, np.arange(int(of[-1]) + 2) * bin_s


def _over_time(altair: Any, bin_s: int, begins_s: np.ndarray, values: np.ndarray) -> tuple[Any, list[Row]]:
    """Axis and rows of values by bin, the last one to its end."""
    unit_s, unit = (60, "minutes") if bin_s <= 60 else (3600, "hours") if bin_s <= 3600 else (86_400, "days")
    x, y = (begins_s / unit_s).tolist(), np.append(values, values[-1]).tolist()
    return altair.X("x:Q", title=f"{unit} from the start"), [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def _arrivals(altair: Any, arrival_ns: np.ndarray) -> Any:
    bin_s, of, begins_s = _bins(arrival_ns)
    across, rows = _over_time(altair, bin_s, begins_s, np.bincount(of) * (60 / bin_s))
    up = altair.Y("y:Q", title="requests a minute")
    chart = _chart(altair, rows, "Arrivals", f"bins of {bin_s:g} s")
    return chart.mark_area(interpolate="step-after").encode(x=across, y=up)


def _reuse(altair: Any, arrival_ns: np.ndarray, requests: Requests) -> Any:
    bin_s, of, begins_s = _bins(arrival_ns)
    held, asked = np.bincount(of, reused_tokens(requests)), np.bincount(of, requests.input_tokens)
    across, rows = _over_time(altair, bin_s, begins_s, held / np.maximum(asked, 1))
    up = altair.Y("y:Q", title="share of input tokens", axis=altair.Axis(format="%"), scale=altair.Scale(domain=[0, 1]))
    chart = _chart(altair, rows, "Prefixes seen before", f"held by a cache without bounds; bins of {bin_s:g} s")
    return chart.mark_line(interpolate="step-after").encode(x=across, y=up)


def _lengths(requests: Requests) -> Iterator[Row]:
    for name, tokens in (("input", requests.input_tokens), ("output", requests.output_tokens)):
        for p, x in zip(SHOWN.tolist(), np.quantile(tokens, SHOWN).tolist(), strict=True):
            yield {"curve": name, "x": x, "p": p}


def _gaps(arrival_ns: np.ndarray) -> Iterator[Row]:
    """Those above 0, and as many of the same mean as a Poisson process has them."""
    gaps_s = np.diff(arrival_ns) / 1e9
    gaps_s = gaps_s[gaps_s > 0]
    if not len(gaps_s):
        return
    inner = SHOWN[(SHOWN > 0.001) & (SHOWN < 1)]
    for curve, quantiles in (
        ("trace", np.quantile(gaps_s, inner)),
        ("Poisson", -np.log1p(-inner) * gaps_s.mean()),
    ):
        for p, x in zip(inner.tolist(), quantiles.tolist(), strict=True):
            yield {"curve": curve, "x": x, "p": p}


def _distribution(altair: Any, title: str, unit: str, rows: list[Row], curves: list[str], note: str = "") -> Any:
    across = altair.X("x:Q", title=unit, scale=altair.Scale(type="log", nice=False))
    up = altair.Y("p:Q", title="share of them at most", axis=altair.Axis(format="%"))
    color = altair.Color("curve:N", sort=curves, title=None)
    return _chart(altair, rows, title, note).mark_line().encode(x=across, y=up, color=color, order="p:Q")


def _chart(altair: Any, rows: list[Row], title: str, note: str) -> Any:
    head = altair.Title(title, subtitle=note) if note else altair.Title(title)
    return altair.Chart(altair.Data(values=rows), title=head, width=WIDTH, height=HEIGHT)
