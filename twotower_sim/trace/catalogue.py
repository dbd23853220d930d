"""The traces that there are by name, and the formats that are read."""

import re

from rich import box
from rich.console import Console
from rich.table import Table

from twotower_sim.preset import names
from twotower_sim.readers import FORMATS
from twotower_sim.trace.public import downloads, public_traces


def print_list() -> None:
    folder, console, traces = downloads(), Console(), public_traces()
    public = _table("Public traces", "Name", "Requests", "Min", "Licence", "Where from")
    for name, trace in traces.items():
        figures = f"{trace.of.requests:,}", f"{trace.of.span_s / 60:.0f}"
        public.add_row(name, *figures, trace.source.licence, trace.source.repository)
    console.print(public)
    there = [name for name, trace in traces.items() if (folder / trace.file).is_file()]
    print(f"In {folder}: {', '.join(there) or 'none yet'}. To get one: twotower-sim trace fetch NAME\n")
    print(f"Fingerprints, to draw from: {', '.join(names('fingerprints'))}\n")
    formats = _table("Formats that are read", "Name", "What")
    for name, family in FORMATS.items():
        formats.add_row(name, _first(family.__doc__ or ""))
    console.print(formats)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in ("Requests", "Min") else "left")
    return table


def _first(docstring: str) -> str:
    """Up to the first colon, semicolon or full stop that is not in code."""
    found = re.match(r"(``.*?``|[^:;.]|[:;.](?! ))*", " ".join(docstring.split()))
    return found[0].rstrip(".").replace("``", "") if found else ""
