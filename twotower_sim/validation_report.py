"""What a validation found, as Markdown for people, JSON for programs, and a picture."""

import gzip
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from twotower_sim.fidelity import HEADLINE, Errors, Validated, verdict, worst
from twotower_sim.profile import Profile
from twotower_sim.recorded import RoundLog
from twotower_sim.scenario import Scenario

NAMES = {
    "request_latency.p50": "E2E p50",
    "request_latency.p90": "E2E p90",
    "time_to_first_token.avg": "mean TTFT",
    "output_token_throughput.avg": "throughput",
}
REQUEST_TIMES = ("arrival_ns", "admit_ns", "first_ns", "finish_ns", "input_tokens", "output_tokens")
BLOCK = ("request", "block", "steps", "ready_ns", "visible_ns", "level")
Row = Iterable[Any]


@dataclass(frozen=True)
class Report:
    """All of one command. ``where``: the machine of the real runs; ``calibrated``: the profile was measured between
    them, or else given."""

    scenarios: list[Validated]
    profile: Profile
    where: str
    calibrated: bool
    goal: float
    command: str

    @property
    def repetitions(self) -> int:
        return len(self.scenarios[0].real)


def command_line() -> str:
    """As it was typed."""
    return shlex.join(["twotower-sim", *sys.argv[1:]])


def summary_lines(found: Report) -> list[str]:
    """What a person at a terminal reads."""
    out = []
    for scenario in found.scenarios:
        rows = [(title, getattr(scenario, of)) for title, of, _ in PREDICTIONS]
        out.append(
            f"{scenario.run.scenario.name}: {NAMES[HEADLINE[0]]}, {', '.join(NAMES[name] for name in HEADLINE[1:])}"
        )
        for title, of in rows:
            figures = "   ".join(str(of[name]) for name in HEADLINE)
            out.append(f"  {title}: {verdict(of, found.goal)}, worst {worst(of):.1%}: {figures}")
        out += [f"  Warning: {warning}" for warning in scenario.warnings]
    return out


def markdown(found: Report) -> str:
    return "\n".join([*_head(found), *_summary(found), *_parts(found), *_passes(found), *_details(found)]) + "\n"


def _head(found: Report) -> list[str]:
    source = found.profile.of("latency")
    between = "measured between the runs" if found.calibrated else f"given ({source}, {source.date}; its commits may be"
    between += "" if found.calibrated else " fitted to the prompts that were served)"
    coverage = 1 - 2.0 ** (1 - found.repetitions)
    return [
        "# Predicted against measured",
        "",
        f"`{found.command}`",
        "",
        f"Real runs of {source.model} on {found.where}, each {found.repetitions} times; the profile was {between}. "
        "No run was fitted to. An error is predicted / measured - 1: the median over repetitions, and in brackets the "
        f"least and the largest, between which the true median lies with probability {coverage:.0%}; with drawn "
        "commits wider by two standard deviations of their luck, since a run draws once.",
        "",
        _speed(found),
        "",
        "Below saturation the throughput is that of the load, whatever is predicted.",
        "",
    ]


def _speed(found: Report) -> str:
    if not (found.profile.latency and found.profile.latency.engine):
        return (
            "The profile does not say how long a probe took when it was measured (no engine figures), so nothing is "
            "known of the machine's speed during the runs: all tables are for the machine as it was calibrated."
        )
    return (
        "A shared machine changes its speed. Probes during a run, passes that do not count, tell by how much; the "
        "first two tables are for the machine as it was during the run, the third for the machine as it was calibrated."
    )


PREDICTIONS = (
    ("Recorded commits", "recorded_errors", "latency alone is left to differ"),
    ("Drawn commits", "expected_errors", "from the profile's law"),
    ("Beforehand", "beforehand_errors", "drawn commits and the machine as it was calibrated: all that a planner has"),
)
"""Title, errors of ``Validated``, and what that is."""


def _summary(found: Report) -> list[str]:
    out = []
    for title, of, what in PREDICTIONS:
        rows = [s for s in found.scenarios if of == "recorded_errors" or s.run.luck]
        all_errors = [getattr(scenario, of) for scenario in rows]
        if not rows:
            continue
        flat = {name: [abs(errors[name].middle) for errors in all_errors] for name in HEADLINE}
        every = [error for column in flat.values() for error in column]
        latency = [error for name, column in flat.items() if "throughput" not in name for error in column]
        out += [
            f"## {title}: {what}",
            "",
            f"Median error {median(every):.1%}, of latencies alone {median(latency):.1%}, worst {max(every):.1%} (goal "
            f"of a run: {found.goal:.0%}){'' if of == 'recorded_errors' else '; two towers only'}.",
            "",
            *_table(
                ["run", *NAMES.values(), "verdict"],
                (
                    [s.run.scenario.name, *(errors[name] for name in HEADLINE), verdict(errors, found.goal)]
                    for s, errors in zip(rows, all_errors, strict=True)
                ),
            ),
            "",
        ]
    return out


def _parts(found: Report) -> list[str]:
    rows = []
    for scenario in found.scenarios:
        for name in HEADLINE[:2]:
            parts = [f"{part:+.1%}" for part in scenario.parts(name).values()]
            luck, speeds = f"{scenario.luck[name]:.1%}", " ".join(f"{real.slowness:.2f}" for real in scenario.real)
            rows.append([scenario.run.scenario.name, NAMES[name], *parts, luck, scenario.strayed, speeds])
    return [
        "## Where the errors come from",
        "",
        "Of the error beforehand. Scheduling: what is left with recorded commits and durations; one scheduler serves "
        "both, so this checks the log and its replay. Latency: what predicting durations adds. Commits: what drawing "
        "them adds, beside the luck of one draw (standard deviation). Machine: what its speed during the run adds; "
        "slowness is that of probes in each run.",
        "",
        *_table(
            ["run", "figure", "scheduling", "latency", "commits", "machine", "luck", "strayed rounds", "slowness"], rows
        ),
        "",
    ]


def _passes(found: Report) -> list[str]:
    kinds = dict.fromkeys(kind for scenario in found.scenarios for kind in scenario.passes)
    rows = []
    for scenario in found.scenarios:
        cells = []
        for kind in kinds:
            of = scenario.passes.get(kind)
            cells.append(f"{of.predicted_s / of.measured_s - 1:+.1%} of {of.share:.0%}" if of else "")
        rows.append([scenario.run.scenario.name, *cells])
    return [
        "## The latency model on the very rounds that were run",
        "",
        "Error of the summed seconds of each kind of pass, and its share of the measured time; host: what is no pass.",
        "",
        *_table(["run", *kinds], rows),
        "",
    ]


def _details(found: Report) -> list[str]:
    out = ["## All figures", ""]
    for scenario in found.scenarios:
        columns = [getattr(scenario, of) for _, of, _ in PREDICTIONS]
        measured = {name: [figures[name] for figures in scenario.measured] for name in scenario.measured[0]}
        out += [
            f"### {scenario.run.scenario.name}",
            "",
            *(f"Warning: {warning}\n" for warning in scenario.warnings),
            *_table(
                ["figure", "measured (least to largest)", *(title.lower() for title, _, _ in PREDICTIONS)],
                (
                    [
                        name,
                        f"{median(of):,.1f} ({min(of):,.1f} to {max(of):,.1f})",
                        *(errors[name] for errors in columns),
                    ]
                    for name, of in measured.items()
                    if all(name in errors for errors in columns)
                ),
            ),
            "",
        ]
    return out


def _table(head: list[str], rows: Iterable[Row]) -> list[str]:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |", *lines]


# ---------------------------------------------------------------------- for programs


def as_json(found: Report) -> dict[str, Any]:
    return {
        "command": found.command,
        "goal": found.goal,
        "where": found.where,
        "profile": found.profile.provenance.model_dump(),
        "calibrated": found.calibrated,
        "scenarios": [_scenario_json(scenario, found.goal) for scenario in found.scenarios],
    }


def _scenario_json(of: Validated, goal: float) -> dict[str, Any]:
    def plain(errors: Errors) -> dict[str, Any]:
        return {name: vars(error) for name, error in errors.items()}

    predicted = {
        "recorded_commits": [outcome.figures for outcome in of.recorded],
        "drawn_commits": of.expected,
        "beforehand": of.beforehand,
    }
    predictions = {
        key: {
            "predicted": figures,
            "errors": plain(errors),
            "worst": worst(errors),
            "verdict": verdict(errors, goal),
        }
        for (key, figures), errors in zip(
            predicted.items(), (of.recorded_errors, of.expected_errors, of.beforehand_errors), strict=True
        )
    }
    return {
        "name": of.run.scenario.name,
        "scenario": _beside(of.run.scenario),
        "measured": of.measured,
        **predictions,
        "luck": of.luck,
        "parts": {name: of.parts(name) for name in HEADLINE},
        "passes": {kind: error._asdict() for kind, error in of.passes.items()},
        "rounds_that_strayed": of.strayed,
        "slowness": [real.slowness for real in of.real],
        "warnings": of.warnings,
    }


def _beside(scenario: Scenario) -> dict[str, Any]:
    """With the profile that stands beside the file."""
    plain = scenario.model_dump(by_alias=True)
    if "path" in plain["latency"]:
        plain["latency"]["path"] = "profile.json.gz"
    return plain


def write_runs(found: Report, path: Path) -> None:
    """What the real engine logged, packed: of every repetition its requests, rounds, blocks and commits."""
    runs = [
        {
            "name": scenario.run.scenario.name,
            "requests": {key: getattr(real.outcome.columns, key).tolist() for key in REQUEST_TIMES},
            "rounds": [dict(zip(RoundLog._fields, log, strict=True)) for log in real.log],
            "blocks": [dict(zip(BLOCK, row, strict=True)) for row in real.units.tolist()],
            "commits": real.sizes,
        }
        for scenario in found.scenarios
        for real in scenario.real
    ]
    path.write_bytes(gzip.compress(json.dumps(runs).encode(), mtime=0))


def panels(found: Report) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    """Of every run, (title, unit, measured, predicted) by request: E2E with recorded commits, median of repetitions."""
    out = []
    for of in found.scenarios:
        measured, predicted = (
            np.median([(c.finish_ns - c.arrival_ns) / 1e6 for c in columns], axis=0)
            for columns in ([real.outcome.columns for real in of.real], [known.columns for known in of.recorded])
        )
        done = of.real[0].outcome.columns.finish_ns >= 0
        out.append((of.run.scenario.name, "ms", measured[done], predicted[done]))
    return out
