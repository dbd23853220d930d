"""A trace beside one that was drawn from its fingerprint: figures, and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower_sim.fingerprint.bursts import FEWEST_WINDOWS, WINDOWS_S, dispersion
from twotower_sim.fingerprint.sessions import turns_of
from twotower_sim.kv_cache import infinite_hits, seen_before
from twotower_sim.pairs_plot import check_plot, save
from twotower_sim.requests import Requests

PROBABILITIES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
WIDTH, HEIGHT = 360, 220  # pixels of a panel
POINTS = 200  # of a quantile function


@dataclass(frozen=True)
class Figure:
    name: str
    source: float
    drawn: float

    @property
    def off(self) -> float:
        """Relative to the source; infinite where that has nothing to compare with."""
        return self.drawn / self.source - 1 if self.source else float("inf") * bool(self.drawn)


@dataclass(frozen=True)
class Comparison:
    """``counts``: requests a minute, of the source and drawn. Rates and dispersion are of what waits for nothing: with
    sessions, their starts."""

    source: Requests
    drawn: Requests
    figures: list[Figure]
    counts: tuple[np.ndarray, np.ndarray]


def compare(source: Requests, drawn: Requests) -> Comparison:
    """Side by side: quantiles of lengths, rate, dispersion, and, where prefixes are known, the share of hash blocks
    that an unbounded cache would hit."""
    both = source, drawn
    starts = [_starts_s(of) for of in both]
    figures = []
    for name in ("input_tokens", "output_tokens"):
        quantiles = [np.quantile(getattr(of, name), PROBABILITIES).tolist() for of in both]
        figures += [Figure(f"{name} p{p * 100:g}", *pair) for p, *pair in zip(PROBABILITIES, *quantiles, strict=True)]
    figures.append(Figure("requests per minute", *(60 * len(at) / max(at[-1], 1e-9) for at in starts)))
    for window in WINDOWS_S:
        if all(at[-1] >= FEWEST_WINDOWS * window for at in starts):
            indices = [dispersion(at, window, at[-1]) for at in starts]
            figures.append(Figure(f"index of dispersion over {window} s", *indices))
    if source.prefixes and drawn.prefixes:
        ratios = [hit / all for hit, all in map(infinite_hits, both)]
        figures.append(Figure("infinite-cache hit ratio", *ratios))
    first, second = (np.bincount((at / 60).astype(int)) for at in starts)
    return Comparison(source, drawn, figures, (first, second))


def _starts_s(requests: Requests) -> np.ndarray:
    first = slice(None) if requests.sessions is None else turns_of(requests.sessions)[1] < 0
    arrival_ns = requests.arrival_ns[first]
    return (arrival_ns - arrival_ns[0]) / 1e9


# ---------------------------------------------------------------------- picture


def plot_comparison(comparison: Comparison, title: str, path: Path, suffix: str = "") -> None:
    """Draw to ``path``; ``suffix`` says the format where the path's own does not. Raises InputError."""
    check_plot(path.with_suffix(suffix) if suffix else path)
    import altair

    both = comparison.source, comparison.drawn
    tokens = [np.bincount(_minute(of), of.output_tokens) for of in both]
    panels = [
        _lines(altair, "arrivals", "minute", "requests", _whole_minutes(comparison.counts)),
        _lines(altair, "work", "minute", "output tokens", _whole_minutes(tokens)),
        *(_lines(altair, name, "share of requests below", "tokens", _quantile_functions(both, name), log=True)
          for name in ("input_tokens", "output_tokens")),
        _lines(altair, "burstiness", "window (s)", "index of dispersion", _dispersion(comparison), log=True),
    ]  # fmt: skip
    if all(of.prefixes for of in both):
        panels.append(_lines(altair, "prefixes", "minute", "blocks seen before, so far", [_hits(of) for of in both]))
    save(altair.concat(*panels, columns=2, title=title), path, suffix)


Curve = tuple[np.ndarray, np.ndarray]


def _whole_minutes(both: Sequence[np.ndarray]) -> list[Curve]:
    """Without the last one, in which requests end somewhere."""
    return [(np.arange(max(len(of) - 1, 1)), of[: max(len(of) - 1, 1)]) for of in both]


def _minute(requests: Requests) -> np.ndarray:
    return (requests.arrival_ns // 60_000_000_000).astype(int)


def _quantile_functions(both: tuple[Requests, ...], name: str) -> list[Curve]:
    p = np.linspace(0, 1, POINTS)
    return [(p, np.quantile(getattr(of, name), p)) for of in both]


def _dispersion(comparison: Comparison) -> list[Curve]:
    rows = [figure for figure in comparison.figures if figure.name.startswith("index of dispersion")]
    windows = np.array([float(figure.name.split()[-2]) for figure in rows])
    return [(windows, np.array([figure.source for figure in rows])),
            (windows, np.array([figure.drawn for figure in rows]))]  # fmt: skip


def _hits(requests: Requests) -> Curve:
    """Minutes, and the share of blocks until then that came before."""
    prefixes = requests.prefixes
    assert prefixes is not None
    minute = np.repeat(_minute(requests), np.diff(prefixes.first))
    blocks, old = (np.cumsum(np.bincount(minute, weights)) for weights in (None, seen_before(prefixes)))
    return np.arange(len(blocks)), old / np.maximum(blocks, 1)


def _lines(altair: Any, title: str, x: str, y: str, curves: list[Curve], log: bool = False) -> Any:
    rows = [
        {"x": a, "y": b, "of": of}
        for of, (across, up) in zip(("source", "drawn"), curves, strict=True)
        for a, b in zip(across.tolist(), up.tolist(), strict=True)
        if b > 0 or not log
    ]
    logarithmic = altair.Scale(type="log", nice=False)
    return (
        altair.Chart(altair.Data(values=rows), title=title, width=WIDTH, height=HEIGHT)
        .mark_line(opacity=0.8)
        .encode(
            x=altair.X("x:Q", title=x, scale=logarithmic if "window" in x else altair.Undefined),
            y=altair.Y("y:Q", title=y, scale=logarithmic if log else altair.Undefined),
            color=altair.Color("of:N", title=None, sort=["source", "drawn"]),
        )
    )
