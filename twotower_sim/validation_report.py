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
    """All of one command. ``calibrated``: the profile was measured between the runs, else it was given."""

    scenarios: list[Validated]
    profile: Profile
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
        recorded, expected = scenario.recorded_errors, scenario.expected_errors
        said = [f"{verdict(of, found.goal)}, worst {worst(of):.1%}" for of in (recorded, expected)]
        out.append(f"{scenario.run.scenario.name}: with recorded commits {said[0]}; with drawn ones {said[1]}")
        out += [f"  {NAMES[name]:12}{recorded[name]}   {expected[name]}" for name in HEADLINE]
    return out


def markdown(found: Report) -> str:
    return "\n".join([*_head(found), *_summary(found), *_parts(found), *_passes(found), *_details(found)]) + "\n"


def _head(found: Report) -> list[str]:
    source = found.profile.of("latency")
    between = "measured between the runs, never on them" if found.calibrated else "given"
    coverage = 1 - 2.0 ** (1 - found.repetitions)
    return [
        "# Predicted against measured",
        "",
        f"`{found.command}`",
        "",
        f"Real runs of {source.model} in {source.dtype} on {source.device}, {source.date}, each {found.repetitions} "
        f"times; the profile was {between}. An error is predicted / measured - 1: the median over repetitions, and in "
        f"brackets the least and the largest, between which the true median lies with probability {coverage:.0%}.",
        "",
    ]


def _summary(found: Report) -> list[str]:
    out = []
    for title, of in (
        ("With the commits that were recorded: latency and scheduling", "recorded_errors"),
        ("With commits drawn from the profile's law: what a planner has", "expected_errors"),
    ):
        all_errors = [getattr(scenario, of) for scenario in found.scenarios]
        flat = [abs(errors[name].middle) for errors in all_errors for name in HEADLINE]
        out += [
            f"## {title}",
            "",
            f"Over all runs and the four figures: median error {median(flat):.1%}, worst {max(flat):.1%} "
            f"(goal of a run: {found.goal:.0%}).",
            "",
            *_table(
                ["run", *NAMES.values(), "verdict"],
                (
                    [s.run.scenario.name, *(errors[name] for name in HEADLINE), verdict(errors, found.goal)]
                    for s, errors in zip(found.scenarios, all_errors, strict=True)
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
            luck, speeds = f"{scenario.luck[name]:.1%}", [f"{real.slowness:.2f}" for real in scenario.real]
            rows.append(
                [
                    scenario.run.scenario.name,
                    NAMES[name],
                    *parts[:3],
                    luck,
                    scenario.strayed,
                    parts[3],
                    " ".join(speeds),
                ]
            )
    return [
        "## Where the errors come from",
        "",
        "Scheduling: with recorded commits and durations, all that is left. Latency: what predicting durations adds. "
        "Commits: what drawing commits adds; luck: the standard deviation of one draw around the mean of many. "
        "Machine: what leaving out the machine's speed during the run would add; slowness: of probes during each "
        "run over what they took in the calibration.",
        "",
        *_table(
            ["run", "figure", "scheduling", "latency", "commits", "luck", "rounds that strayed", "machine", "slowness"],
            rows,
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
        recorded, expected = scenario.recorded_errors, scenario.expected_errors
        measured = {name: [figures[name] for figures in scenario.measured] for name in scenario.measured[0]}
        out += [
            f"### {scenario.run.scenario.name}",
            "",
            *_table(
                ["figure", "measured (least to largest)", "recorded commits", "drawn commits"],
                (
                    [name, f"{median(of):,.1f} ({min(of):,.1f} to {max(of):,.1f})", recorded[name], expected[name]]
                    for name, of in measured.items()
                    if name in recorded
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
        "profile": found.profile.provenance.model_dump(),
        "calibrated": found.calibrated,
        "scenarios": [_scenario_json(scenario, found.goal) for scenario in found.scenarios],
    }


def _scenario_json(of: Validated, goal: float) -> dict[str, Any]:
    def plain(errors: Errors) -> dict[str, Any]:
        return {name: vars(error) for name, error in errors.items()}

    recorded, expected = of.recorded_errors, of.expected_errors
    return {
        "name": of.run.scenario.name,
        "scenario": of.run.scenario.model_dump(by_alias=True),
        "measured": of.measured,
        "recorded_commits": {
            "predicted": [outcome.figures for outcome in of.recorded],
            "errors": plain(recorded),
            "worst": worst(recorded),
            "verdict": verdict(recorded, goal),
        },
        "drawn_commits": {
            "predicted": of.expected,
            "luck": of.luck,
            "errors": plain(expected),
            "worst": worst(expected),
            "verdict": verdict(expected, goal),
        },
        "parts": {name: of.parts(name) for name in HEADLINE},
        "passes": {kind: error._asdict() for kind, error in of.passes.items()},
        "rounds_that_strayed": of.strayed,
        "slowness": [real.slowness for real in of.real],
        "warnings": of.run.warnings,
    }


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
