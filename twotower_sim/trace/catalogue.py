"""The traces that there are by name, and the formats that are read."""

import re
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from twotower_sim.preset import names
from twotower_sim.readers import FORMATS
from twotower_sim.tables import Sheet
from twotower_sim.trace.public import downloads, public_traces


@dataclass(frozen=True)
class Catalogue:
    """``public``: a row a trace that can be fetched, into ``folder``; ``there``: names of those that were;
    ``fingerprints``: names of those that ship; ``formats``: a row a format that is read."""

    public: Sheet
    folder: Path
    there: list[str]
    fingerprints: list[str]
    formats: Sheet


def catalogue() -> Catalogue:
    folder, traces = downloads(), public_traces()
    public = [
        [name, of.of.requests, of.of.span_s, of.source.licence, of.source.repository] for name, of in traces.items()
    ]
    return Catalogue(
        Sheet(["name", "requests", "span_s", "licence", "repository"], public),
        folder,
        [name for name, trace in traces.items() if (folder / trace.file).is_file()],
        names("fingerprints"),
        Sheet(["name", "what"], [[name, _first(family.__doc__ or "")] for name, family in FORMATS.items()]),
    )


def print_list() -> None:
    found, console = catalogue(), Console()
    public = _table("Public traces", "Name", "Requests", "Min", "Licence", "Where from")
    for name, requests, span_s, *source in found.public.rows:
        public.add_row(name, f"{requests:,}", f"{span_s / 60:.0f}", *source)
    console.print(public)
    print(f"In {found.folder}: {', '.join(found.there) or 'none yet'}. To get one: twotower-sim trace fetch NAME\n")
    print(f"Fingerprints, to draw from: {', '.join(found.fingerprints)}\n")
    formats = _table("Formats that are read", "Name", "What")
    for row in found.formats.rows:
        formats.add_row(*row)
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
