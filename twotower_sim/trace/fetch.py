"""Downloads of public traces: whole and checked, or not at all; what was there before stays until then."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pooch import HTTPDownloader
from requests.exceptions import HTTPError, RequestException
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from twotower_sim.errors import InputError
from twotower_sim.readers import read_trace
from twotower_sim.result import all_or_nothing
from twotower_sim.trace.public import PublicTrace, downloads, public_traces, sha256
from twotower_sim.yaml_file import did_you_mean

TIMEOUT_S = 30.0
"""Without a connection, or without a byte."""
CHUNK = 1 << 16


class Fetched(NamedTuple):
    """A trace that is there now, and what happened."""

    trace: PublicTrace
    file: Path
    said: str


def fetch_traces(names: list[str], folder: Path | None, mirror: str | None, force: bool) -> None:
    """Fetch traces, and print what happened. Raises InputError."""
    for got in fetched(names, folder, mirror, force, Console(stderr=True)):
        source = got.trace.source
        print(f"{got.trace.name}: {got.said}\n  {source.attribution} ({source.repository}), {source.licence}")


def fetched(
    names: Sequence[str], folder: Path | None, mirror: str | None, force: bool, errors: Console
) -> Iterator[Fetched]:
    """Download what is not there yet into ``folder`` (default: ``downloads()``), one after the other. ``mirror``: the
    address of a folder with files of the same names. Raises InputError that says what to do."""
    known = public_traces()
    if unknown := [name for name in names if name not in known]:
        close = did_you_mean(unknown[0], known)
        raise InputError(f"trace fetch: {unknown[0]!r:.99} is no public trace{close}; there are: {', '.join(known)}")
    for name in names:
        trace = known[name]
        target = (folder or downloads()) / trace.file
        yield Fetched(trace, target, _fetch(trace, target, mirror, force, errors))


def _fetch(trace: PublicTrace, target: Path, mirror: str | None, force: bool, errors: Console) -> str:
    """What happened. Where no hash is known, that of the first file is recorded beside it and holds from then on."""
    record = target.with_name(f"{target.name}.sha256")
    expected = trace.of.sha256 or _recorded(record)
    if target.is_file() and not force:
        found = sha256(target)
        if expected is None:
            with all_or_nothing() as stage:
                _record(trace, target, str(target), found, stage(record))
            return f"{target} is there; {_now_known(found)}"
        if found != expected:
            raise InputError(
                f"{target}: found sha256 {found}; expected {expected}; --force downloads it and replaces this"
            )
        return f"{target} is there, sha256 as expected"
    url = f"{mirror.rstrip('/')}/{trace.file}" if mirror else trace.url
    with all_or_nothing() as stage:
        file = stage(target)
        with _bar(trace.name, errors) as bar:
            _download(url, file, bar, f"By hand: put it at {target}" + (f", from {trace.url}" if mirror else ""))
        found, megabytes = sha256(file), f"{file.stat().st_size / 1e6:.1f} MB"
        if expected is None:
            _record(trace, file, url, found, stage(record))
            return f"{target}, {megabytes}; {_now_known(found)}"
        if found != expected:
            recorded = "" if trace.of.sha256 else f" (recorded in {record}; remove that to accept another)"
            raise InputError(
                f"{url}: found sha256 {found}; expected {expected}{recorded}: damaged on the way, or not the same "
                "file; try again, or another source with --from"
            )
        return f"{target}, {megabytes}, sha256 as expected"


def _now_known(found: str) -> str:
    return f"sha256 {found} was not known before and is now recorded beside it"


def _record(trace: PublicTrace, file: Path, said: str, found: str, record: Path) -> None:
    """Records the hash of a file if that is a trace of the right number of requests; errors call it ``said``."""
    try:
        count = len(read_trace(file).requests)
    except InputError:
        count = 0
    if count != trace.of.requests:
        raise InputError(f"{said}: found {count:,} requests; expected the {trace.of.requests:,} of {trace.name}")
    record.write_text(f"{found}  {trace.file}\n")


def _recorded(record: Path) -> str | None:
    """The hash in a file as sha256sum writes it."""
    if not record.is_file():
        return None
    words = record.read_text(errors="replace").split()
    return words[0] if words else None


def _download(url: str, file: Path, bar: Any, by_hand: str) -> None:
    unpacked = {"Accept-Encoding": "identity"}  # so that the number of bytes is known, and checked
    try:
        HTTPDownloader(bar, CHUNK, timeout=TIMEOUT_S, headers=unpacked)(url, str(file), None)
    except RequestException as error:
        raise InputError(f"{url}: cannot be downloaded: {_why(error)}. {by_hand}") from None


def _why(error: RequestException) -> str:
    if isinstance(error, HTTPError) and error.response is not None:
        return f"{error.response.status_code} {error.response.reason}"
    cause = error.args[0] if error.args else error
    return str(getattr(cause, "reason", cause)).rpartition(": ")[2].rstrip(".")


class _Bar:
    """pooch's idea of a progress bar, drawn by rich."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._task = progress, progress.add_task(name, total=None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "total":
            self._progress.update(self._task, total=value or None)
        else:
            super().__setattr__(name, value)

    def update(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        self._progress.stop()


@contextmanager
def _bar(name: str, console: Console) -> Iterator[_Bar]:
    """Silent where the console is no terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal or console.quiet
    ) as progress:
        yield _Bar(progress, name)
