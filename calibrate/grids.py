"""Samples into a profile's grids, points held out between them, and where the grids need to be finer."""

import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from calibrate.bench import Samples
from calibrate.shapes import Point, Shapes
from twotower_sim.errors import InputError
from twotower_sim.measured import ContextForward, Hull, PassTime
from twotower_sim.profile import AXES, Grid, HeldOut

Axes = dict[str, dict[str, list[int]]]
HULL = Hull("the grid")
NEAREST = 2
"""Smallest gap between neighbours on an axis that has a point inside."""


class GridOf:
    """The grids that ``samples`` make over ``axes``; samples of other points are held out."""

    def __init__(self, axes: Axes, samples: Samples, shapes: Shapes) -> None:
        self.axes, self._samples, self._shapes = axes, samples, shapes

    def has(self, kind: str) -> bool:
        """Whether any point of a kind was measured."""
        return any(point in self._samples for point in _points(kind, self.axes[kind]))

    def grid(self, kind: str) -> Grid:
        samples = [self._samples.get(point, []) for point in _points(kind, self.axes[kind])]
        low, middle, high = ([float(np.quantile(of, q)) if of else None for of in samples] for q in (0.2, 0.5, 0.8))
        at: dict[str, Any] = {}
        if "+" in kind:
            at = {"at_context": self._shapes.at_context}
            at |= {"at_block_size": self._shapes.block_sizes[0]} if kind == "extend+prefill" else {}
        return Grid(axes=self.axes[kind], median_s=middle, p20_s=low, p80_s=high, samples_s=samples, **at)

    def held_out(self) -> list[Point]:
        """A point inside every interval of every axis, at grid points of the other axes, which take turns."""
        out = []
        for kind, axes in self.axes.items():
            for axis, known in axes.items():
                if axis == "block_size":
                    continue
                for turn, (low, high) in enumerate(pairwise(known)):
                    if high - low < NEAREST:
                        continue
                    at = {other: values[turn % len(values)] for other, values in axes.items()}
                    out.append(Point(kind, tuple((at | {axis: _between(low, high)})[name] for name in AXES[kind])))
        return list(dict.fromkeys(out))

    def predicted(self, point: Point) -> float:
        """What the simulator makes of a point; NaN where the grids do not say."""
        values = dict(zip(AXES[point.kind], point.values, strict=True))
        size = values.pop("block_size", self._shapes.block_sizes[0])
        parts = [point.kind.partition("+")[0], "prefill", point.kind] if "+" in point.kind else [point.kind]
        if not all(kind in self.axes and self.has(kind) for kind in parts):
            return float("nan")
        if "+" not in point.kind:
            return self._time(point.kind, size).measured(*values.values())
        shared, prefill = self._time(parts[0], size), self._time("prefill", size)
        forward = ContextForward(shared, prefill, self.grid(point.kind), HULL)
        n, tokens, context = values["sequences"], values["tokens"], self._shapes.at_context
        try:
            return forward(shared.measured(n, context), n, tokens, context + tokens, 1)
        except InputError:
            return float("nan")

    def _time(self, kind: str, block_size: int) -> PassTime:
        return PassTime(kind, self.grid(kind), HULL, block_size)


def _points(kind: str, axes: dict[str, list[int]]) -> list[Point]:
    grid = np.stack(np.meshgrid(*axes.values(), indexing="ij"), axis=-1).reshape(-1, len(axes))
    return [Point(kind, tuple(values)) for values in grid.tolist()]


def _between(low: int, high: int) -> int:
    """The geometric mean, inside the interval; times bend on logarithmic axes."""
    return min(max(round((max(low, 1) * high) ** 0.5), low + 1), high - 1)


@dataclass
class Errors:
    """Relative errors of held-out points of a kind: all of them, and the worst along each axis with its place."""

    all: list[float] = field(default_factory=list)
    worst: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, error: float, axis: str, value: int) -> None:
        self.all.append(error)
        if error > self.worst.get(axis, (-1.0, 0))[0]:
            self.worst[axis] = error, value

    def summary(self) -> HeldOut:
        return HeldOut(points=len(self.all), median_error=statistics.median(self.all), worst_error=max(self.all))


def held_out_errors(grids: GridOf, samples: Samples) -> dict[str, Errors]:
    """Of every sampled point that is not on the grid."""
    out: dict[str, Errors] = {}
    for point, of in samples.items():
        axes = grids.axes[point.kind]
        off = [axis for axis, value in zip(axes, point.values, strict=True) if value not in axes[axis]]
        if not off:
            continue
        predicted, measured = grids.predicted(point), statistics.median(of)
        if predicted == predicted:
            value = point.values[list(axes).index(off[0])]
            out.setdefault(point.kind, Errors()).add(abs(predicted / measured - 1), off[0], value)
    return out


def refined(axes: Axes, errors: dict[str, Errors], tolerance: float) -> Axes:
    """``axes`` with the worst held-out point of every kind and axis on them, where its error is above ``tolerance``."""
    out = {kind: dict(values) for kind, values in axes.items()}
    for kind, of in errors.items():
        for axis, (error, value) in of.worst.items():
            if error > tolerance:
                out[kind][axis] = sorted({*out[kind][axis], value})
    return out
