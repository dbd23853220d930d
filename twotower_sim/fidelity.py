"""How far predictions are off: a simulated run and a real one of the same scenario, side by side.

Errors are relative, predicted / measured - 1. A real run is repeated; of each figure the median of its errors counts,
and the least and the largest bound it: the median that endless repetitions would have lies between them with
probability 1 - 2^(1 - repetitions).

An error is split by simulating once more with something replaced by what was recorded. With the recorded rounds and
commits only scheduling is left to differ; with recorded commits alone, scheduling and latency; with neither, all three.

A shared machine is not always as fast as when it was measured. Probes during a run tell by how much, and the run is
predicted for the machine as it was, and, as one has to beforehand, for the machine as it had been.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import numpy as np

from twotower_sim.latency import PASS_NAMES, Latency
from twotower_sim.luck import BlockLuck
from twotower_sim.metrics import Columns, Results, evaluate
from twotower_sim.plan import BlockPlans
from twotower_sim.recorded import RecordedCommits, RecordedRounds, RoundLog
from twotower_sim.replica import Round
from twotower_sim.simulation import Run, simulate

METRICS = ("time_to_first_token", "commit_gap", "request_latency")
STATISTICS = ("avg", "p50", "p90", "p99")
HEADLINE = ("request_latency.p50", "request_latency.p90", "time_to_first_token.avg", "output_token_throughput.avg")
"""The figures that a verdict goes by."""

Figures = dict[str, float]


class Outcome(NamedTuple):
    """What is compared of one run, real or simulated."""

    figures: Figures
    columns: Columns


class RealRun(NamedTuple):
    """A run of the real engine."""

    outcome: Outcome
    log: list[RoundLog]
    sizes: list[list[list[int]]]  # of every commit, by request and block; no blocks: empty
    units: np.ndarray  # of every block: see ``Records.units``
    text: list[list[int]]  # tokens of every answer
    probe_s: float  # of a probe while it ran, on average
    slowness: float = 1.0  # how much longer probes took than when the engine was measured

    def compared(self, probe_s: float | None) -> "RealRun":
        """With its slowness against the ``probe_s`` of a profile; a profile without one says nothing of it."""
        return self._replace(slowness=self.probe_s / probe_s if probe_s else 1.0)


def outcome(run: Run, rounds: Sequence[Round]) -> Outcome:
    """Of a finished run, whichever engine it had."""
    results = evaluate(run)
    return Outcome(_figures(results, rounds), results.columns)


def _figures(results: Results, rounds: Sequence[Round]) -> Figures:
    """By name: latencies in ms, output tokens a second, rounds, and the sequences that decode in a round, of rounds in
    which any do."""
    out = {f"{name}.{of}": results.metrics[name][of] for name in METRICS for of in STATISTICS}
    out["output_token_throughput.avg"] = results.metrics["output_token_throughput"]["avg"]
    out["rounds"] = len(rounds)
    batch = np.array([r.decoding + r.extending * (not r.in_turn) for r in rounds])
    if len(batch := batch[batch > 0]):
        out["batch.avg"] = float(batch.mean())
        out |= {f"batch.p{p}": float(np.percentile(batch, p)) for p in (50, 90)}
    return out


# ---------------------------------------------------------------------- predictions


def predict(run: Run) -> Outcome:
    """Simulate a prepared run."""
    rounds: list[Round] = []
    simulate(run, lambda index, round: rounds.append(round))
    return outcome(run, rounds)


def slowed(run: Run, slowness: float) -> Run:
    """The run on a machine on which everything takes ``slowness`` as long."""
    run.latency = run.latency.slowed(slowness)
    return run


def with_recorded_commits(run: Run, real: RealRun) -> Run:
    """The run with the commits that the real engine made."""
    if run.luck:
        plans = BlockPlans(RecordedCommits(real.sizes, run.luck.plans.law.block_size), 0, run.requests.output_tokens)
        run.luck = BlockLuck(run.luck.gammas, run.luck.base, run.luck.queue, plans, [plans] * len(run.luck.gammas))
    return run


def with_recorded_rounds(run: Run, real: RealRun) -> tuple[Run, RecordedRounds]:
    """The run with recorded commits and durations; the second counts rounds that are not as recorded."""
    rounds = RecordedRounds(real.log)
    run = with_recorded_commits(run, real)
    run.latency, run.may_be_fast = rounds, False  # type: ignore[assignment]  # it answers as a Latency does
    return run, rounds


# ---------------------------------------------------------------------- errors


@dataclass(frozen=True)
class Error:
    """Of one figure: its median over repetitions, the least and the largest."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


Errors = dict[str, Error]


def errors(predicted: Sequence[Figures], measured: Sequence[Figures]) -> Errors:
    """Of every figure, over pairs of a prediction and a measurement; one that is missing or 0 in any is left out."""
    out = {}
    for name in measured[0]:
        pairs = [(p.get(name), m[name]) for p, m in zip(predicted, measured, strict=True)]
        of = [p / m - 1 for p, m in pairs if p and m]
        if len(of) == len(pairs):
            out[name] = Error(median(of), min(of), max(of))
    return out


def worst(of: Errors) -> float:
    """The largest median error of a headline figure."""
    return max(abs(of[name].middle) for name in HEADLINE)


def verdict(of: Errors, goal: float) -> str:
    """Whether all headline figures are within ``goal``, as far as the repetitions tell."""
    headline = [of[name] for name in HEADLINE]
    if all(max(abs(e.low), abs(e.high)) <= goal for e in headline):
        return "confirmed"
    if any(e.low > goal or e.high < -goal for e in headline):
        return "refuted"
    return "likely" if worst(of) <= goal else "doubtful"


class PassError(NamedTuple):
    """Of one kind of pass over the rounds of real runs."""

    share: float  # of the measured time of all rounds
    predicted_s: float
    measured_s: float


def pass_errors(latency: Latency, real: Sequence[RealRun], kind: str, in_turn: bool) -> dict[str, PassError]:
    """What a latency model makes of the very rounds that were run, by kind of pass; ``host``: what is no pass."""
    sums: dict[str, list[float]] = {}
    for slow, log in ((latency.slowed(run.slowness), log) for run in real for log in run.log):
        denoiser_s, context_s, round_s = _cost(slow, log, in_turn)
        shared = log.n_extend if kind == "two_tower" else log.n
        name = PASS_NAMES[kind][(shared > 0) + 2 * (log.prefill[0] > 0)]
        measured_host_s = (log.end_ns - log.start_ns) / 1e9 - log.denoiser_s - log.context_s
        for of, predicted_s, measured_s in (
            ("denoise", denoiser_s, log.denoiser_s),
            (name, context_s, log.context_s),
            ("host", round_s - denoiser_s - context_s, measured_host_s),
        ):
            pair = sums.setdefault(of, [0.0, 0.0])
            pair[0] += predicted_s
            pair[1] += measured_s
    total = sum(measured for _, measured in sums.values())
    return {of: PassError(pair[1] / total, *pair) for of, pair in sums.items() if pair[1]}


def _cost(latency: Latency, log: RoundLog, in_turn: bool) -> tuple[float, float, float]:
    if in_turn or log.forwards > 1:
        return latency.forwards(log.forwards, in_turn, *log.shape, sent=0)
    return latency.round(*log.shape)


# ---------------------------------------------------------------------- a scenario


@dataclass(frozen=True)
class Validated:
    """A scenario's repetitions, and what was predicted of each.

    ``expected`` are means over draws of luck; ``luck`` the standard deviation of one draw, relative to them: no
    prediction of a single run can be better than that. ``beforehand`` is the same for the machine as it was when it was
    measured: all that can be known before a run.
    """

    run: Run
    real: list[RealRun]
    replayed: list[Outcome]
    recorded: list[Outcome]
    expected: list[Figures]
    beforehand: Figures
    luck: Figures
    strayed: int  # rounds of replays that were not as recorded
    passes: dict[str, PassError]
    warnings: list[str]

    @property
    def measured(self) -> list[Figures]:
        return [real.outcome.figures for real in self.real]

    @property
    def recorded_errors(self) -> Errors:
        return errors([of.figures for of in self.recorded], self.measured)

    @property
    def expected_errors(self) -> Errors:
        """Wider by two standard deviations of luck: the commits of all repetitions are the same draw."""
        return self._lucky(self.expected)

    @property
    def beforehand_errors(self) -> Errors:
        return self._lucky([self.beforehand] * len(self.real))

    def _lucky(self, predicted: list[Figures]) -> Errors:
        found = errors(predicted, self.measured)
        wider = {name: 2 * self.luck[name] for name in found}
        return {name: Error(e.middle, e.low - wider[name], e.high + wider[name]) for name, e in found.items()}

    def parts(self, figure: str) -> dict[str, float]:
        """The error of a figure beforehand, by where it comes from: medians over repetitions. ``scheduling`` checks the
        log and its replay; the scheduler is one and the same."""
        replayed, recorded = ([of.figures for of in runs] for runs in (self.replayed, self.recorded))
        columns = self.measured, replayed, recorded, self.expected
        rows = [[of[figure] for of in row] for row in zip(*columns, strict=True)]
        return {
            "scheduling": median(replay / m - 1 for m, replay, *_ in rows),
            "latency": median((known - replay) / m for m, replay, known, _ in rows),
            "commits": median((expected - known) / m for m, _, known, expected in rows),
            "machine": median((self.beforehand[figure] - expected) / m for m, _, _, expected in rows),
        }


def validated(prepare: Callable[[int], Run], real: list[RealRun], draws: int) -> Validated:
    """Predict a scenario that was run for real. ``prepare(draw)`` gives a fresh run with the luck of a draw; draw 0 is
    the scenario's own."""
    run = prepare(0)
    replays = [with_recorded_rounds(prepare(0), of) for of in real]
    known = [with_recorded_commits(slowed(prepare(0), of.slowness), of) for of in real]
    drawn = [prepare(draw) for draw in range(draws if run.luck else 1)]
    beforehand, luck = _expected(drawn, 1.0)
    return Validated(
        run,
        real,
        replayed=[predict(run) for run, _ in replays],
        recorded=[predict(run) for run in known],
        expected=[_expected(drawn, of.slowness)[0] for of in real],
        beforehand=beforehand,
        luck=luck,
        strayed=sum(rounds.strayed for _, rounds in replays),
        passes=pass_errors(run.latency, real, run.scenario.decoding.kind, run.scenario.scheduler.policy == "lockstep"),
        warnings=list(dict.fromkeys(warning for run in known for warning in run.warnings)),
    )


def _expected(drawn: list[Run], slowness: float) -> tuple[Figures, Figures]:
    """Means of figures over draws of luck, and their standard deviations relative to them."""
    of_draws = [predict(slowed(replace(run, warnings=[]), slowness)).figures for run in drawn]
    there = [name for name in of_draws[0] if all(of[name] for of in of_draws)]
    means = {name: float(np.mean([of[name] for of in of_draws])) for name in there}
    return means, {name: float(np.std([of[name] for of in of_draws])) / means[name] for name in there}
