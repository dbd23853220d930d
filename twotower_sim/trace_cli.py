"""``twotower-sim trace``: public traces, what traces hold, other formats, fingerprints. No file is half written."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Literal

import typer

from twotower_sim.errors import InputError

TraceFile = Annotated[Path, typer.Argument(metavar="FILE", help="A trace; plain, .gz, .zst or .parquet.")]
Format = Annotated[str, typer.Option(help="As trace list shows them; auto goes by the content.")]
OnError = Annotated[Literal["fail", "skip"], typer.Option(help="What to do about malformed rows.")]

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
    from twotower_sim.trace_list import print_list

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
    from twotower_sim.public_traces import public_traces
    from twotower_sim.trace_fetch import fetch_traces

    if bool(names) == all:
        raise InputError(f"trace fetch: expected names, or --all for {', '.join(public_traces())}")
    fetch_traces(names or list(public_traces()), to, mirror, force)


@trace_app.command()
@_interruptible
def describe(
    file: TraceFile,
    format: Format = "auto",
    on_error: OnError = "fail",
    plot: Annotated[Path | None, typer.Option(help="Also draw it to this file (.html, .png or .svg).")] = None,
) -> None:
    """Print what a trace is like: rates, bursts, lengths, shared prefixes, sessions, and what looks odd."""
    from twotower_sim.trace_report import describe_trace

    describe_trace(file, _known(format), on_error, plot)


@trace_app.command()
@_interruptible
def convert(
    file: TraceFile,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="*.jsonl (Mooncake), *.csv (Azure; both .gz or .zst), *.parquet.")
    ],
    format: Format = "auto",
    on_error: OnError = "fail",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many requests.")] = None,
    window: Annotated[
        tuple[float, float] | None, typer.Option(metavar="FROM TO", help="Seconds from the trace's start: [from, to).")
    ] = None,
) -> None:
    """Write a trace, or a part of it, in another format; what that cannot hold is said."""
    from twotower_sim.trace_convert import convert_trace

    convert_trace(file, out, _known(format), on_error, limit, window)


def _known(format: str) -> str:
    from twotower_sim.readers import FORMATS
    from twotower_sim.yaml_file import did_you_mean

    if format != "auto" and format not in FORMATS:
        close = did_you_mean(format, FORMATS)
        raise InputError(f"--format: found {format!r:.99}{close}; allowed: auto, {', '.join(FORMATS)}")
    return format
