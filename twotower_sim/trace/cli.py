"""``twotower-sim trace``: public traces, what traces hold, other formats, fingerprints. No file is half written."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from twotower_sim.errors import InputError

TraceFile = Annotated[Path, typer.Argument(metavar="FILE", help="A trace; plain, .gz, .zst or .parquet.")]
Format = Annotated[str, typer.Option(help="As trace list shows them; auto goes by the content.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="FIELD=NAME", help=(
        "Of a file in no known format, the name of the column of a field: arrival, input_tokens, output_tokens, "
        "first_token, finish, session; to be repeated."
    )),
]  # fmt: skip
TimeUnit = Annotated[Literal["s", "ms", "us", "ns", "iso"] | None, typer.Option(help="Of these columns; default: s.")]
OUT = typer.Argument(metavar="OUT", help="*.jsonl (Mooncake), *.csv (Azure; both also .gz or .zst), *.parquet.")
OnError = Annotated[Literal["fail", "skip"], typer.Option(help="What to do about malformed rows.")]

if TYPE_CHECKING:
    from twotower_sim import readers

trace_app = typer.Typer(no_args_is_help=True, help="Get, look at, convert, fingerprint and draw traces of requests.")


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def guarded(*args, **options) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            print("Interrupted; earlier files are as they were.", file=sys.stderr)
            raise typer.Exit(130) from None

    return guarded


@trace_app.command("list")
@_interruptible
def list_() -> None:
    """List public traces, shipped fingerprints, and the formats that are read."""
    from twotower_sim.trace.catalogue import print_list

    print_list()


@trace_app.command()
@_interruptible
def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Names that trace list shows.")] = None,
    all: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder; default: traces/downloads.")] = None,
    mirror: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="Where files of these names lie, instead of GitHub.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Download again what is there, and replace it.")] = False,
) -> None:
    """Download public traces, checked by their hashes; what is there already is not fetched again."""
    from twotower_sim.trace.fetch import fetch_traces
    from twotower_sim.trace.public import public_traces

    if bool(names) == all:
        raise InputError(f"trace fetch: expected names, or --all for {', '.join(public_traces())}")
    fetch_traces(names or list(public_traces()), to, mirror, force)


@trace_app.command()
@_interruptible
def describe(
    file: TraceFile,
    format: Format = "auto",
    column: Columns = None,
    time_unit: TimeUnit = None,
    on_error: OnError = "fail",
    plot: Annotated[Path | None, typer.Option(help="Also draw it to this file (.html, .png or .svg).")] = None,
) -> None:
    """Print what a trace is like: rates, bursts, lengths, shared prefixes, sessions, and what looks odd."""
    from twotower_sim.trace.report import describe_trace

    describe_trace(file, _format(format, column, time_unit), on_error, plot)


@trace_app.command()
@_interruptible
def convert(
    file: TraceFile,
    out: Annotated[Path, OUT],
    format: Format = "auto",
    column: Columns = None,
    time_unit: TimeUnit = None,
    on_error: OnError = "fail",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many requests.")] = None,
    window: Annotated[
        tuple[float, float] | None, typer.Option(metavar="FROM TO", help="Seconds from the trace's start: [from, to).")
    ] = None,
) -> None:
    """Write a trace, or a part of it, in another format; what that cannot hold is said."""
    from twotower_sim.trace.convert import convert_trace

    convert_trace(file, out, _format(format, column, time_unit), on_error, limit, window)


@trace_app.command()
@_interruptible
def fingerprint(
    file: TraceFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write (YAML).")],
    format: Format = "auto",
    column: Columns = None,
    time_unit: TimeUnit = None,
    on_error: OnError = "fail",
    check: Annotated[bool, typer.Option("--check", help="Print how near a drawn trace comes.")] = False,
    plot: Annotated[Path | None, typer.Option(help="With --check: draw both (.html, .png or .svg).")] = None,
) -> None:
    """Measure figures of a trace from which ones like it can be drawn, of any length and rate (kind: fingerprint)."""
    from twotower_sim.trace.fingerprint import fingerprint_trace

    fingerprint_trace(file, out, _format(format, column, time_unit), on_error, check, plot)


@trace_app.command()
@_interruptible
def sample(
    fingerprint: Annotated[str, typer.Argument(metavar="FINGERPRINT", help="A file, or the name of a shipped one.")],
    out: Annotated[Path, OUT],
    requests: Annotated[int, typer.Option(min=1, help="How many.")],
    rate_scale: Annotated[float, typer.Option(help="Times the rate at every moment.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Another one draws another trace.")] = 0,
) -> None:
    """Draw a trace from a fingerprint."""
    from twotower_sim.trace.fingerprint import sample_trace

    sample_trace(fingerprint, out, requests, rate_scale, seed)


def _format(name: str, columns: list[str] | None, time_unit: TimeUnit) -> "readers.Format":
    from twotower_sim.trace.format import format_of

    named = (text.partition("=") for text in columns or [])
    return format_of(name, {field: column for field, _, column in named}, time_unit)
