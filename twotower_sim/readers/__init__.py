"""Trace files in the formats that users have; each family is one small file with ``sniff`` and ``read``."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

from twotower_sim.errors import InputError
from twotower_sim.readers import azure, mooncake
from twotower_sim.requests import LATEST_NS, Requests
from twotower_sim.text_file import lines

FORMATS = {"mooncake": mooncake, "azure": azure}


def read_trace(path: Path, format: str = "auto") -> Requests:
    """Requests in order of arrival (ties keep the file's order), the first at time 0.

    ``format`` is a name of FORMATS, or "auto" to go by the first line. Plain or gzip. Raises InputError that
    names file, line and field.
    """
    rest = lines(path)
    head = []
    for line in rest:
        head.append(line)
        if not line.isspace():
            break
    else:
        raise InputError(f"{path}: is empty")
    reader = FORMATS[_sniff(line, len(head), path) if format == "auto" else format]
    requests = reader.read(chain(head, rest), path)
    if not len(requests):
        raise InputError(f"{path}: holds no requests")
    order = requests.arrival_ns.argsort(kind="stable")
    requests = requests.take(order)
    first_ns, last_ns = int(requests.arrival_ns[0]), int(requests.arrival_ns[-1])
    if last_ns - first_ns > LATEST_NS:
        raise InputError(f"{path}: spans {(last_ns - first_ns) / 3.156e16:.0f} years; at most 146 are replayed")
    return replace(requests, arrival_ns=requests.arrival_ns - first_ns)


def _sniff(first: str, number: int, path: Path) -> str:
    for name, reader in FORMATS.items():
        if reader.sniff(first):
            return name
    found = first[:60].strip()
    raise InputError(
        f"{path}:{number}: not a known trace format ({', '.join(FORMATS)}); the file starts with {found!r}"
    )
