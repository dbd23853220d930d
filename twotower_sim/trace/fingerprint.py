"""Fingerprints of trace files, and trace files drawn from fingerprints."""

import sys
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from twotower_sim import workload
from twotower_sim.errors import InputError
from twotower_sim.fingerprint import (
    Comparison,
    Fingerprint,
    compare,
    draw,
    load_fingerprint,
    measure,
    plot_comparison,
    text_of,
)
from twotower_sim.pairs_plot import check_plot
from twotower_sim.readers import Format, OnError
from twotower_sim.requests import Requests
from twotower_sim.result import all_or_nothing
from twotower_sim.trace.public import public_traces, sha256
from twotower_sim.trace.write import ending, write_trace


class Fingerprinted(NamedTuple):
    """What was measured, of how many requests, and, if it was asked for, how near a drawn trace comes."""

    fingerprint: Fingerprint
    requests: int
    comparison: Comparison | None


def fingerprint_trace(path: Path, out: Path, format: Format, on_error: OnError, check: bool, plot: Path | None) -> None:
    """Fingerprint a trace, and print what happened. Raises InputError."""
    done = fingerprinted(path, out, format, on_error, check, plot)
    for note in done.fingerprint.source.notes:
        print(f"Note: {note}", file=sys.stderr)
    print(f"{out}: fingerprint of {done.requests:,} requests, {out.stat().st_size / 1e3:.1f} kB")
    if done.comparison:
        Console().print(_table(done.comparison))


def fingerprinted(
    path: Path, out: Path, format: Format, on_error: OnError, check: bool, plot: Path | None
) -> Fingerprinted:
    """Measure a trace as a scenario replays it and write its fingerprint; ``check``: find, and draw to ``plot``, how
    near a drawn trace of as many requests comes. Raises InputError."""
    if plot and not check:
        raise InputError("trace fingerprint --plot: has no effect without --check")
    if plot:
        check_plot(plot)
    with all_or_nothing() as stage:
        written, picture = stage(out), stage(plot) if plot else None
        trace = workload.trace(path, format=format, on_error=on_error)
        found = measure(trace.requests, *_origin(path), trace.notes)
        written.write_text(text_of(found, f"twotower-sim trace fingerprint {path} {out}"), encoding="utf-8")
        drawn = draw(found, len(trace.requests), 1.0, seed=0) if check else None
        comparison = compare(trace.requests, drawn) if drawn else None
        if plot and picture and comparison:
            plot_comparison(comparison, f"{path.name}: trace and drawn", picture, plot.suffix)
    return Fingerprinted(found, len(trace.requests), comparison)


def _origin(path: Path) -> tuple[str, str | None]:
    """What a file is, and its licence, if it is one of the public traces."""
    found = sha256(path) if path.is_file() else None
    for trace in public_traces().values():
        if trace.of.sha256 == found:
            return f"{trace.source.repository} @ {trace.source.commit[:7]}, {trace.of.path}", trace.source.licence
    return path.name, None


def _table(comparison: Comparison) -> Table:
    table = Table(title="Trace and drawn", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Figure")
    for column in ("trace", "drawn", "off"):
        table.add_column(column, justify="right")
    for figure in comparison.figures:
        table.add_row(figure.name, _number(figure.source), _number(figure.drawn), f"{figure.off:+.1%}")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


class Sampled(NamedTuple):
    """What was drawn, and what the file cannot hold of it."""

    requests: Requests
    lost: list[str]


def sample_trace(name: str, out: Path, requests: int, rate_scale: float, seed: int) -> None:
    """Draw a trace, and print what happened. Raises InputError."""
    drawn, lost = sampled(name, out, requests, rate_scale, seed)
    for what in lost:
        print(f"Warning: not in {out}: {what}", file=sys.stderr)
    print(f"{out}: {requests:,} requests in {drawn.arrival_ns[-1] / 1e9:,.1f} s, drawn from {name}")


def sampled(name: str, out: Path, requests: int, rate_scale: float, seed: int) -> Sampled:
    """Write requests drawn from a fingerprint as ``out``'s ending says. Raises InputError."""
    if not 1e-6 <= rate_scale <= 1e6:
        raise InputError(f"--rate-scale: found {rate_scale:g}; expected a number from 1e-06 to 1e+06")
    kind = ending(out)
    with all_or_nothing() as stage:
        staged, found = stage(out), load_fingerprint(name, Path())
        try:
            drawn = draw(found, requests, rate_scale, seed)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        lost = write_trace(drawn, staged, kind)
    return Sampled(drawn, lost)
