"""What a trace is like, as a person reads it on the terminal."""

from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from twotower_sim.pairs_plot import check_plot
from twotower_sim.readers import Format, OnError, Trace, read_trace
from twotower_sim.result import all_or_nothing
from twotower_sim.trace.plot import plot_trace
from twotower_sim.trace.stats import QUANTILES, Arrivals, Reuse, Sessions, Spread, TraceStats, describe
from twotower_sim.workload import skipped


def describe_trace(path: Path, format: Format, on_error: OnError, plot: Path | None) -> None:
    """Print what a trace is like, and draw it to ``plot``. Raises InputError."""
    if plot:
        check_plot(plot)
    with all_or_nothing() as stage:
        picture = stage(plot) if plot else None
        trace = read_trace(path, format, on_error)
        _print(path, trace, describe(trace))
        if plot and picture:
            plot_trace(trace, path.name, picture, plot.suffix)


def _print(path: Path, trace: Trace, stats: TraceStats) -> None:
    console = Console()
    lines = [f"Trace       {path}: {len(trace.requests):,} requests, format {trace.format}", *_skipped(trace)]
    lines += (
        list(_time(stats.arrivals)) if stats.arrivals else ["Arrivals    unknown: times are from each session's start"]
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_lengths(stats))
    for line in _rest(stats):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _skipped(trace: Trace) -> Iterator[str]:
    yield from (f"Skipped     {line.removeprefix('rows skipped: ')}" for line in skipped(trace))


def _time(of: Arrivals) -> Iterator[str]:
    rate = "all at one time" if of.rate_rps is None else f"{of.rate_rps:,.4g} requests/s on average"
    minute, most = of.peak
    yield f"Span        {_seconds(of.span_s)}, {rate}; at most {most:,} in a minute, that from {minute:,} min on"
    if of.gap_cv is not None:
        spread = f", time stamps spread over {of.bin_s:g} s" if of.bin_s else ""
        yield f"Gaps        coefficient of variation {of.gap_cv:.3f} (Poisson: 1){spread}"
    if of.dispersion:
        indices = ", ".join(f"{index:.2f} in {window} s" for window, index in of.dispersion.items())
        yield f"Bursts      index of dispersion {indices} (Poisson: 1)"


def _seconds(seconds: float) -> str:
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.4g} s"


def _lengths(stats: TraceStats) -> Table:
    table = Table(title="Lengths (tokens)", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in ("mean", *(f"p{q}" for q in QUANTILES[:-1]), "max"):
        table.add_column(name, justify="right")
    for name, of in (("Input", stats.input_tokens), ("Output", stats.output_tokens)):
        table.add_row(name, *(f"{figure:,.0f}" for figure in (of.mean, *of.quantiles)))
    return table


def _rest(stats: TraceStats) -> Iterator[str]:
    if stats.rank_correlation is not None:
        yield f"Together    rank correlation of input and output {stats.rank_correlation:+.3f}"
    yield _prefixes(stats.reuse)
    yield from _sessions(stats.sessions)
    yield from (f"Odd         {oddity}" for oddity in stats.oddities)


def _prefixes(of: Reuse | None) -> str:
    if of is None:
        return "Prefixes    not in the trace"
    common = f"{of.shared_by:,} requests begin with the same {of.shared_tokens:,}"
    common = common if of.shared_by > 1 else "no two begin alike"
    held = f"an unbounded cache would hold {of.hit_ratio:.1%} of input tokens"
    return f"Prefixes    blocks of {of.block_tokens} tokens; {held}; {common}"


def _sessions(of: Sessions | None) -> Iterator[str]:
    if of is None:
        yield "Sessions    not in the trace"
        return
    joins = f", {of.joins:,} of them for several" if of.joins else ""
    yield f"Sessions    {of.count:,} of {_quantiles(of.turns)} turns; {of.waiting:,} requests wait for others{joins}"
    if of.think_s:
        yield f"Think time  {_quantiles(of.think_s)} s after what a request waits for"


def _quantiles(of: Spread) -> str:
    _, _, p50, p90, _, most = of.quantiles
    return f"{p50:,.4g} (p90 {p90:,.4g}, max {most:,.4g})"
