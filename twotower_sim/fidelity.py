"""How far predictions are off: a simulated run and a real one of the same scenario, side by side.

Errors are relative, predicted / measured - 1. A real run is repeated; of each figure the median of its errors counts,
and the least and the largest bound it: the median that endless repetitions would have lies between them with
probability 1 - 2^(1 - repetitions).

An error is split by simulating once more with something replaced by what was recorded. With the recorded rounds and
commits only scheduling is left to differ; with recorded commits alone, scheduling and latency; with neither, all three.

A shared machine is not always as fast as when it was measured. Probes during a run tell by how much, and the run is
predicted for the machine as it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    slowness: float  # of the machine while it ran: how much longer passes took than when they were measured


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
    batch = batch[batch > 0]
    out["batch.avg"] = float(batch.mean())
    return out | {f"batch.p{p}": float(np.percentile(batch, p)) for p in (50, 90)}


# ---------------------------------------------------------------------- predictions


def predict(run: Run) -> Outcome:
    """Simulate a prepared run."""
    rounds: list[Round] = []
    simulate(run, lambda index, round: rounds.append(round))
    return outcome(run, rounds)


def slowed(run: Run, real: RealRun) -> Run:
    """The run on the machine as it was."""
    run.latency = run.latency.slowed(real.slowness)
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
    """Of every figure, over pairs of a prediction and a measurement; a figure that was measured as 0 is left out."""
    out = {}
    for name in measured[0]:
        pairs = [(p[name], m[name]) for p, m in zip(predicted, measured, strict=True)]
        if all(m for _, m in pairs):
            of = [p / m - 1 for p, m in pairs]
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
    prediction of a single run can be better than that. ``elsewhere`` are predictions with recorded commits for the
    machine as it was when it was measured.
    """

    run: Run
    real: list[RealRun]
    replayed: list[Outcome]
    recorded: list[Outcome]
    elsewhere: list[Figures]
    expected: list[Figures]
    luck: Figures
    strayed: int  # rounds of replays that were not as recorded
    passes: dict[str, PassError]

    @property
    def measured(self) -> list[Figures]:
        return [real.outcome.figures for real in self.real]

    @property
    def recorded_errors(self) -> Errors:
        return errors([of.figures for of in self.recorded], self.measured)

    @property
    def expected_errors(self) -> Errors:
        return errors(self.expected, self.measured)

    def parts(self, figure: str) -> dict[str, float]:
        """The error of a figure with the expected commits, by where it comes from, and, ``machine``, what it would be
        off more if the machine's speed were not known: medians over repetitions."""
        replayed, recorded = ([of.figures for of in runs] for runs in (self.replayed, self.recorded))
        columns = self.measured, replayed, recorded, self.expected, self.elsewhere
        rows = [[of[figure] for of in row] for row in zip(*columns, strict=True)]
        return {
            "scheduling": median(replay / m - 1 for m, replay, *_ in rows),
            "latency": median((known - replay) / m for m, replay, known, *_ in rows),
            "commits": median((expected - known) / m for m, _, known, expected, _ in rows),
            "machine": median((elsewhere - known) / m for m, _, known, _, elsewhere in rows),
        }


def validated(prepare: Callable[[int], Run], real: list[RealRun], draws: int) -> Validated:
    """Predict a scenario that was run for real. ``prepare(draw)`` gives a fresh run with the luck of a draw; draw 0 is
    the scenario's own."""
    run = prepare(0)
    replays = [with_recorded_rounds(prepare(0), of) for of in real]
    expected, luck = zip(*(_expected(prepare, of, draws if run.luck else 1) for of in real), strict=True)
    in_turn = run.scenario.scheduler.policy == "lockstep"
    return Validated(
        run,
        real,
        replayed=[predict(run) for run, _ in replays],
        recorded=[predict(with_recorded_commits(slowed(prepare(0), of), of)) for of in real],
        elsewhere=[predict(with_recorded_commits(prepare(0), of)).figures for of in real],
        expected=list(expected),
        luck=luck[0],
        strayed=sum(rounds.strayed for _, rounds in replays),
        passes=pass_errors(run.latency, real, run.scenario.decoding.kind, in_turn),
    )


def _expected(prepare: Callable[[int], Run], real: RealRun, draws: int) -> tuple[Figures, Figures]:
    """Means of figures over draws of luck, and their standard deviations relative to them."""
    drawn = [predict(slowed(prepare(draw), real)).figures for draw in range(draws)]
    means = {name: float(np.mean([of[name] for of in drawn])) for name in drawn[0]}
    return means, {name: float(np.std([of[name] for of in drawn])) / mean for name, mean in means.items()}
