"""The measuring of all passes: a grid, points held out between its points, more points where it bends, and drift."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console

from calibrate import checkpoint
from calibrate.bench import WARM_UP, Bench, Samples, Skipped, measure
from calibrate.grids import GridOf, held_out_errors, refined
from calibrate.journal import Journal
from calibrate.shapes import Point, Shapes, Sizes, points
from twotower_sim.console import progress_bar
from twotower_sim.profile import Drift, Grid, MeasuredLatency, MeasuredMemory
from twotower_sim.profile import Skipped as SkippedPoint


class Survey:
    """Times the passes of ``bench`` over ``shapes``; what the journal has is not measured again."""

    def __init__(
        self, bench: Bench, shapes: Shapes, sizes: Sizes, repetitions: int, journal: Journal, console: Console
    ) -> None:
        self._bench, self._shapes, self._sizes = bench, shapes, sizes
        self._repetitions, self._journal, self._console = repetitions, journal, console
        self._samples: Samples = {}
        self._skipped: Skipped = {}

    def run(self, refine: int, tolerance: float) -> MeasuredLatency:
        """``refine`` times, points that are off by more than ``tolerance`` join the grid."""
        axes = self._shapes.axes(self._bench.model.split)
        first_s, spread = self._reference("first")
        self._measure(list(points(axes)), "passes")
        for again in range(refine + 1):
            grids = GridOf(axes, self._samples, self._shapes)
            self._measure(grids.held_out(), "held-out points")
            errors = held_out_errors(grids, self._samples)
            if again < refine:
                axes = refined(axes, errors, tolerance)
                self._measure(list(points(axes)), "refined points")
        again_s, _ = self._reference("again")
        drift = Drift(first_s=first_s, again_s=again_s, spread=spread, moved=abs(again_s / first_s - 1) > spread)
        if drift.moved:
            self._console.print(
                f"Warning: the first point moved from {first_s:.6f} to {again_s:.6f} s, more than its spread"
            )
        return self._section(GridOf(axes, self._samples, self._shapes), drift)

    def _measure(self, which: list[Point], what: str) -> None:
        new = [point for point in which if point not in self._samples and point not in self._skipped]
        with progress(self._console, len(new) * self._repetitions, what) as done:
            found, left_out = measure(self._bench, self._sizes, new, self._repetitions, self._journal, done)
        self._samples.update(found)
        self._skipped.update(left_out)

    def _reference(self, when: str) -> tuple[float, float]:
        """Median and relative spread of the smallest denoise pass, at the start and at the end."""
        shapes = self._shapes
        point = Point("denoise", (shapes.block_sizes[0], shapes.sequences[0], shapes.context[0]))
        key = ("drift", when) if when == "first" else ("drift", when, self._repetitions)
        samples = self._journal.get(*key)
        if samples is None:
            self._bench.room([point])
            samples = [self._bench.time(point) for _ in range(WARM_UP + self._repetitions)][WARM_UP:]
            self._journal.add(samples, *key)
        p20, p80 = np.quantile(samples, (0.2, 0.8))
        median = statistics.median(samples)
        return median, float((p80 - p20) / median)

    def _section(self, grids: GridOf, drift: Drift) -> MeasuredLatency:
        model = self._bench.model
        measured: dict[Any, Grid] = {kind: grids.grid(kind) for kind in grids.axes if grids.has(kind)}
        errors = held_out_errors(grids, self._samples)
        cache = model.cache(1, 1).context
        return MeasuredLatency(
            transfer=measured.pop("transfer", None),
            passes=measured,
            held_out={kind: of.summary() for kind, of in errors.items()},
            drift=drift,
            memory=MeasuredMemory(
                bytes_per_sequence=cache.state_bytes,
                bytes_per_token=cache.token_bytes,
                weights_bytes=sum(checkpoint.weight_bytes(model).values()),
            ),
            skipped=[
                SkippedPoint(**{"pass": point.kind}, point=list(point.values), why=why)
                for point, why in self._skipped.items()
            ],
        )


@contextmanager
def progress(console: Console, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar that hears of every further piece of work; silent where the console is no terminal."""
    so_far = 0
    with progress_bar(console, total, what) as show:

        def done(more: int) -> None:
            nonlocal so_far
            so_far += more
            show(so_far)

        yield done
