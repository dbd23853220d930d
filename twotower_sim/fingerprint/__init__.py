"""A fingerprint: figures measured from a trace, from which faithful traces of any length and rate are drawn. It holds
no request of the trace."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field, NonNegativeInt, field_validator, model_validator

from twotower_sim.errors import InputError
from twotower_sim.fingerprint.bursts import Arrivals, bins_of, draw_arrivals, measure_arrivals
from twotower_sim.fingerprint.check import Comparison, compare, plot_comparison
from twotower_sim.fingerprint.lengths import draw_ranks, measure_kinds, strata_of, tokens
from twotower_sim.fingerprint.quantiles import Part, Table, between, quantiles
from twotower_sim.fingerprint.reuse import Reuse, draw_prefixes, measure_reuse
from twotower_sim.fingerprint.sessions import Sessions, draw_sessions, draw_turns, measure_sessions, turns_of
from twotower_sim.preset import named_file
from twotower_sim.requests import MOST_TOKENS, Requests
from twotower_sim.yaml_file import load_model

__all__ = ["Comparison", "Fingerprint", "compare", "draw", "load_fingerprint", "measure", "plot_comparison", "text_of"]

WIDTH = 110  # of lines in a file, about


class Source(Part):
    """What was measured; ``notes`` say what was done to it and what cannot be matched."""

    trace: str
    licence: str | None = None
    requests: int = Field(ge=2)
    span_s: float = Field(gt=0)
    notes: list[str] = Field(default=[])


class Fingerprint(Part):
    """Quantiles of all inputs and outputs. ``joint``: of each kind of requests the shares of the cells of a square grid
    over the ranks of input (rows) and output."""

    version: Literal[1] = 1
    source: Source
    arrivals: Arrivals
    input_tokens: Table
    output_tokens: Table
    joint: list[list[list[NonNegativeInt]]]
    prefixes: Reuse | None = None
    sessions: Sessions | None = None

    @field_validator("input_tokens", "output_tokens")
    @classmethod
    def _lengths(cls, table: Table) -> Table:
        return between(1, MOST_TOKENS)(table)

    @model_validator(mode="after")
    def _kinds_fit(self) -> "Fingerprint":
        kinds = len(self.arrivals.counts)
        if len(self.joint) != kinds or (self.sessions and kinds > 1):
            allowed = "1, as there are sessions" if self.sessions else f"{kinds}, as in arrivals.counts"
            raise ValueError(f"joint: found {len(self.joint)} kinds; expected {allowed}")
        for board in self.joint:
            if not board or any(len(row) != len(board) for row in board) or not sum(map(sum, board)):
                raise ValueError("joint: expected as many rows as columns, and not only zeros")
        return self


def measure(requests: Requests, source: str, licence: str | None = None, notes: list[str] | None = None) -> Fingerprint:
    """The figures of a trace whose bunched time stamps are spread already. Raises InputError."""
    arrival_s = (requests.arrival_ns - requests.arrival_ns[0]) / 1e9
    if len(requests) < 2 or arrival_s[-1] <= 0:
        raise InputError(f"{source}: {len(requests)} requests at one time have no rate; expected at least 2 times")
    previous = turns_of(requests.sessions)[1] if requests.sessions is not None else None
    starts = arrival_s if previous is None else arrival_s[previous < 0]
    if previous is not None and (len(starts) < 2 or starts[-1] <= 0):
        raise InputError(f"{source}: all sessions start at one time; expected at least 2 times")
    bins, bin_s, bin_count = bins_of(starts)
    lengths = requests.input_tokens, requests.output_tokens
    if previous is None:
        counts, joint = measure_kinds(*lengths, bins, bin_count)
    else:
        joint = measure_kinds(*lengths, np.zeros(len(requests), int), 1, most=1)[1]
        counts = np.bincount(bins, minlength=bin_count)[None, :]
    arrivals, unmatched = measure_arrivals(starts, counts, bin_s)
    prefixes = requests.prefixes
    return Fingerprint(
        source=Source(
            trace=source,
            licence=licence,
            requests=len(requests),
            span_s=round(float(arrival_s[-1]), 3),
            notes=[*(notes or []), *unmatched],
        ),
        arrivals=arrivals,
        input_tokens=quantiles(requests.input_tokens),
        output_tokens=quantiles(requests.output_tokens),
        joint=joint,
        prefixes=measure_reuse(prefixes, arrival_s, requests.input_tokens, previous, strata_of(len(requests)))
        if prefixes
        else None,
        sessions=measure_sessions(requests) if previous is not None else None,
    )


def draw(fingerprint: Fingerprint, requests: int, rate_scale: float, seed: int) -> Requests:
    """So many requests in order of arrival; the same bytes for the same seed. ``rate_scale``: see ``draw_arrivals``;
    ages of prefixes and waits of sessions stay as they are, in seconds. Raises InputError."""
    if fingerprint.sessions:
        drawn = _draw_sessions(fingerprint, fingerprint.sessions, requests, rate_scale, seed)
    else:
        times_s, kinds = draw_arrivals(fingerprint.arrivals, requests, rate_scale, seed)
        input_rank, output_rank = draw_ranks(kinds, fingerprint.joint, fingerprint.source.requests, seed)
        drawn = Requests(
            np.rint(times_s * 1e9).astype(np.int64),
            tokens(fingerprint.input_tokens, input_rank),
            tokens(fingerprint.output_tokens, output_rank),
        )
    if not fingerprint.prefixes:
        return drawn
    previous = turns_of(drawn.sessions)[1] if drawn.sessions is not None else None
    p, x = np.array(fingerprint.input_tokens).T
    rank = np.interp(drawn.input_tokens, x, p)
    at = drawn.arrival_ns / 1e9, drawn.input_tokens, rank
    return replace(drawn, prefixes=draw_prefixes(fingerprint.prefixes, *at, previous, seed))


def _draw_sessions(of: Fingerprint, sessions: Sessions, requests: int, rate_scale: float, seed: int) -> Requests:
    """The first requests of so many sessions that later ones would not have come between."""
    count = 1
    while True:
        count = min(2 * count, requests)
        start_s = draw_arrivals(of.arrivals, count, rate_scale, seed)[0]
        turns = draw_turns(sessions, count, seed)
        drawn = draw_sessions(sessions, start_s, turns, of.joint[0], of.input_tokens, of.output_tokens, seed)
        if count == requests or (drawn.arrival_ns <= start_s[-1] * 1e9).sum() >= requests:
            return drawn.take(slice(requests))


# ---------------------------------------------------------------------- files


def load_fingerprint(name: str, base: Path) -> Fingerprint:
    """A preset by name, or a file by path relative to ``base``. Raises InputError that names file and field."""
    return load_model(Fingerprint, named_file("fingerprint", name, ".yaml", base))


class _Dumper(yaml.SafeDumper):
    """Whole numbers without a point."""


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    return dumper.represent_int(int(value)) if value.is_integer() else dumper.represent_float(value)


_Dumper.add_representer(float, _number)
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def text_of(fingerprint: Fingerprint, header: str = "") -> str:
    """YAML that ``load_fingerprint`` reads, with ``header`` as comments above."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + _section(fingerprint.model_dump(exclude_none=True), "")


def _section(value: dict[str, Any], indent: str) -> str:
    """Mappings over lines, lists flowing."""
    text = ""
    for key, of in value.items():
        if isinstance(of, dict):
            text += f"{indent}{key}:\n{_section(of, indent + '  ')}"
        else:
            flow = yaml.dump(of, Dumper=_Dumper, default_flow_style=True, width=WIDTH, sort_keys=False)
            lines = flow.removesuffix("...\n").splitlines()
            text += f"{indent}{key}: {lines[0]}\n" + "".join(f"{indent}  {line}\n" for line in lines[1:])
    return text
