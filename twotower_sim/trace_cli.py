"""``twotower-sim trace``: public traces, what traces hold, other formats, fingerprints. No file is half written."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer

from twotower_sim.errors import InputError

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
