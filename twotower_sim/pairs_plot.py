"""Predicted against measured, a point a request. HTML files work offline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twotower_sim.errors import InputError

SUFFIXES = (".html", ".png", ".svg")
SIZE = 300  # pixels of a panel's side
COLUMNS = 3
MOST_POINTS = 2000  # of a panel; of more, as many are drawn, evenly over the requests
Panel = tuple[str, str, np.ndarray, np.ndarray]
"""Title, unit, measured (n,), predicted (n,)."""


def check_plot(path: Path) -> None:
    """Raises InputError without altair or for a suffix that is none of SUFFIXES."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"--plot {path}: found suffix {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    load_altair()


def load_altair() -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise InputError(f"--plot needs {error.name}: pip install 'twotower-sim[plot]'") from None
    return altair


def plot_pairs(panels: Sequence[Panel], path: Path, suffix: str = "") -> None:
    """Draw panels on logarithmic axes to ``path``; ``suffix`` says the format where the path's own does not. Pairs that
    are not both above 0 have no place on such axes; a panel's subtitle counts them. Raises InputError."""
    altair = load_altair()
    charts = [_panel(altair, *panel) for panel in panels]
    save(altair.concat(*charts, columns=COLUMNS), path, suffix)


def save(chart: Any, path: Path, suffix: str = "") -> None:
    """Write a chart in the format of ``suffix``, or else of the path's own. Raises InputError."""
    suffix = suffix or path.suffix
    try:
        chart.save(str(path), format=suffix[1:], **({"inline": True} if suffix == ".html" else {"scale_factor": 2}))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _panel(altair: Any, title: str, unit: str, measured: np.ndarray, predicted: np.ndarray) -> Any:
    there = (measured > 0) & (predicted > 0)
    x, y = (_sampled(of[there]) for of in (measured, predicted))
    notes = [f"{len(x):,} of {len(measured):,} requests"] if len(x) < len(measured) else []
    if missing := len(measured) - int(there.sum()):
        notes.append(f"{missing:,} are 0 or unknown")
    ends = _ends(np.concatenate([x, y]))
    scale = altair.Scale(type="log", domain=ends, nice=False)
    across = altair.X("x:Q", title=f"measured ({unit})", scale=scale)
    up = altair.Y("y:Q", title=f"predicted ({unit})", scale=scale)
    points = [{"x": a, "y": b} for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    diagonal = altair.Chart(altair.Data(values=[{"x": end, "y": end} for end in ends])).mark_line(color="gray")
    pairs = altair.Chart(altair.Data(values=points)).mark_circle(size=14, opacity=0.4)
    layers = [layer.encode(x=across, y=up) for layer in (diagonal, pairs)]
    head = altair.Title(title, subtitle="; ".join(notes))
    return altair.layer(*layers, title=head, width=SIZE, height=SIZE)


def _sampled(of: np.ndarray) -> np.ndarray:
    if len(of) <= MOST_POINTS:
        return of
    return of[np.linspace(0, len(of) - 1, MOST_POINTS).astype(int)]


def _ends(values: np.ndarray) -> list[float]:
    """Of both axes, a little beyond all values."""
    if not len(values):
        return [1.0, 10.0]
    return [float(values.min()) / 1.1, float(values.max()) * 1.1]
