"""Scenarios beside each other on the same draws: what differs between them, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, log
from pathlib import Path

from rich.console import Console

from twotower_sim.console import progress_bar
from twotower_sim.errors import InputError
from twotower_sim.experiments import Experiment, run_all
from twotower_sim.figures import Figures, better, check_name, check_names, figure, figures_of, is_felt
from twotower_sim.interval import Estimate, estimate, ratio_interval
from twotower_sim.result_cache import ResultCache
from twotower_sim.saturation import STABLE
from twotower_sim.scenario import Change, Scenario, load_scenario
from twotower_sim.study import replicated
from twotower_sim.sweep import ETA_S, unstable
from twotower_sim.tables import Sheet, heading
from twotower_sim.workers import Workers
from twotower_sim.yaml_file import Source, path_of

METRICS = (
    "time_to_first_token.p50",
    "time_to_first_token.p99",
    "commit_gap.p50",
    "commit_gap.p99",
    "request_latency.p50",
    "request_latency.p99",
    "output_token_throughput_per_user.p50",
    "output_token_throughput_per_gpu",
    "good_request_fraction",
    "cost.usd_per_million_output_tokens",
    "cost.kwh_per_million_output_tokens",
)

BETTER, WORSE, ALIKE = "better", "worse", "not told apart"


@dataclass
class Side:
    """A scenario and, of each replication, the run, its figures and the verdict on its load."""

    name: str
    path: Path
    scenario: Scenario
    warnings: list[str]
    runs: list[Experiment] = field(default_factory=list)
    figures: list[Figures] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def stable(self) -> bool:
        return all(verdict == STABLE for verdict in self.verdicts)


@dataclass(frozen=True)
class Comparison:
    """Of one metric. ``difference``: to the first scenario, over pairs of replications; ``ratio`` of the means, and its
    interval."""

    metric: str
    of: Estimate
    difference: Estimate | None
    ratio: float | None
    ratio_interval: tuple[float, float] | None = None

    @property
    def shows(self) -> bool | None:
        """Whether the interval of the difference leaves 0 out; None without an interval."""
        of = self.difference
        return None if of is None or of.low is None or of.high is None else not of.low <= 0 <= of.high

    @property
    def verdict(self) -> str | None:
        """BETTER or WORSE, or ALIKE where the replications do not tell; None where that is no question."""
        sign = better(self.metric)
        if self.difference is None or not sign:
            return None
        if self.shows is False or not self.difference.mean:
            return ALIKE
        return BETTER if sign * self.difference.mean > 0 else WORSE


@dataclass(frozen=True)
class Compared:
    """``by_side``: of each scenario the metrics in order, None where a replication has no such figure."""

    sides: list[Side]
    replications: int
    metrics: list[str]
    by_side: dict[str, list[Comparison | None]]
    simulated: int  # runs that were not in the cache

    def comparable(self, side: Side, metric: str) -> bool:
        """Whether a figure does not depend on how long the runs are, which those of loads that are not borne do."""
        return not is_felt(metric) or (side.stable and self.sides[0].stable)

    @property
    def sentence(self) -> str:
        """The answer in one."""
        fallen = [f"{side.name} does not bear its load" for side in self.sides if not side.stable]
        return "; ".join(fallen + [self._said(side) for side in self.sides[1:]]) + "."

    def _said(self, side: Side) -> str:
        first = self.sides[0].name
        there = [of for of in self.by_side[side.name] if of and of.verdict and self.comparable(side, of.metric)]
        if not there:
            return f"{side.name} and {first} cannot be compared"
        than = {BETTER: "better than", WORSE: "worse than", ALIKE: "not told apart from"}
        counts = {verdict: sum(of.verdict == verdict for of in there) for verdict in than}
        verdict, *others = (verdict for verdict in than if counts[verdict])
        said = f"{side.name} is {than[verdict]} {first} in {counts[verdict]} of {len(there)} metrics"
        said += "".join(f", {verdict} in {counts[verdict]}" for verdict in others)
        apart = [of for of in there if of.ratio and of.verdict != ALIKE]
        far = sorted(apart, key=_distance, reverse=True)
        told = dict.fromkeys(far[:1] + [of for of in apart if of.metric.startswith("cost.")][:1])
        times = ", ".join(f"{heading(of.metric).partition(' (')[0]} {of.ratio:.2f} times as large" for of in told)
        return f"{said} ({times})" if told else said

    @property
    def differences(self) -> Sheet:
        """A row a metric of a scenario: its mean, and the difference to the first scenario with its 95 % interval."""
        header = ["scenario", "metric", "mean", "difference", "low", "high", "ratio", "interval_contains_0"]
        return Sheet(header, [[name, *_row(of)] for name, found in self.by_side.items() for of in found if of])


def load_sides(sources: Sequence[Source], overrides: Sequence[Change]) -> list[Side]:
    """Scenarios, each at the seed of the first. Raises InputError."""
    if len(sources) < 2:
        raise InputError("compare: found one scenario; expected two or more")
    sides: list[Side] = []
    for source in sources:
        scenario = load_scenario(source, overrides)
        if sides:
            scenario = scenario.model_copy(update={"seed": sides[0].scenario.seed})
        taken = [side.name for side in sides]
        names = (scenario.name, *(f"{scenario.name}-{i}" for i in range(2, len(sources) + 1)))
        name = next(name for name in names if name not in taken)
        sides.append(Side(name, path_of(source), scenario, []))
    for side in sides[1:]:
        if side.scenario.workload != sides[0].scenario.workload:
            side.warnings.append(f"the workload is another than that of {sides[0].name}: requests do not correspond")
    return sides


def compare_sides(
    sides: list[Side], replications: int, metrics: list[str], cache: ResultCache, workers: Workers, errors: Console
) -> Compared:
    """Run them on the same draws. ``metrics``: none for METRICS. Raises InputError."""
    for name in metrics:
        check_name(name)
    simulated = _run(sides, replications, cache, workers, errors)
    names = [name for name in dict.fromkeys(metrics or METRICS) if metrics or _known(sides[0], name)]
    check_names(metrics, {name: None for side in sides for of in side.figures for name in of}, whole=True)
    by_side = {side.name: [_of_metric(sides[0], side, name) for name in names] for side in sides}
    return Compared(sides, replications, names, by_side, simulated)


def _run(sides: list[Side], replications: int, cache: ResultCache, workers: Workers, errors: Console) -> int:
    runs: list[tuple[Side, int, Experiment]] = []
    for side in sides:
        side.figures, side.verdicts = [{} for _ in range(replications)], [""] * replications
        side.runs = replicated(side.scenario, side.path.parent, replications)
        runs += [(side, i, experiment) for i, experiment in enumerate(side.runs)]
    simulated, warnings = 0, {}
    with progress_bar(errors, None, "simulating", ETA_S) as bar:

        def progress(done: int, of: int) -> None:
            nonlocal simulated
            simulated = of
            bar(done, of)

        for index, outcome in run_all([experiment for *_, experiment in runs], cache, workers, progress):
            side, i, _ = runs[index]
            if outcome.summary is None:
                raise InputError(f"{side.path}: {outcome.error}")
            side.figures[i] = figures_of(outcome.summary)
            side.provenance |= outcome.summary["provenance"]
            warnings[index] = outcome.summary["warnings"]
            side.verdicts[i] = outcome.summary["saturation"]["verdict"]
    for index, said in sorted(warnings.items()):
        side = runs[index][0]
        side.warnings += [warning for warning in said if warning not in side.warnings]
    for side in sides:
        side.warnings += [said] if (said := unstable(side.verdicts)) else []
    return simulated


def _distance(of: Comparison) -> float:
    """From being the same, whichever is larger."""
    return abs(log(of.ratio)) if of.ratio and of.ratio > 0 else inf


def _known(first: Side, name: str) -> bool:
    return any(figure(of, name) is not None for of in first.figures)


def _of_metric(first: Side, side: Side, name: str) -> Comparison | None:
    mine = [value for of in side.figures if (value := figure(of, name)) is not None]
    base = [value for of in first.figures if (value := figure(of, name)) is not None]
    if len(mine) < len(side.figures):
        return None
    of = estimate(mine)
    if side is first or len(base) < len(mine):
        return Comparison(name, of, None, None)
    mean = estimate(base).mean
    differences = estimate([b - a for a, b in zip(base, mine, strict=True)])
    return Comparison(name, of, differences, of.mean / mean if mean else None, ratio_interval(base, mine))


def _row(of: Comparison) -> list[object]:
    far = of.difference
    mine = [None] * 3 if far is None else [far.mean, far.low, far.high]
    return [of.metric, of.of.mean, *mine, of.ratio, None if of.shows is None else not of.shows]
