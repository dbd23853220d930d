"""Scenarios beside each other on the same draws: what differs between them, and how sure that is."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from twotower_sim.console import progress_bar
from twotower_sim.errors import InputError
from twotower_sim.experiments import Experiment, run_all
from twotower_sim.figures import Figures, check_name, check_names, figure, figures_of
from twotower_sim.interval import Estimate, estimate
from twotower_sim.result_cache import ResultCache
from twotower_sim.scenario import Change, Scenario, load_scenario
from twotower_sim.study import replicated
from twotower_sim.sweep import ETA_S, unstable
from twotower_sim.tables import Sheet
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


@dataclass
class Side:
    """A scenario and, of each replication, its figures."""

    name: str
    path: Path
    scenario: Scenario
    figures: list[Figures]
    warnings: list[str]
    provenance: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """Of one metric. ``difference``: to the first scenario, over pairs of replications; ``ratio`` of the means."""

    metric: str
    of: Estimate
    difference: Estimate | None
    ratio: float | None

    @property
    def shows(self) -> bool | None:
        """Whether the interval of the difference leaves 0 out; None without an interval."""
        of = self.difference
        return None if of is None or of.low is None or of.high is None else not of.low <= 0 <= of.high


@dataclass(frozen=True)
class Compared:
    """``by_side``: of each scenario the metrics in order, None where a replication has no such figure."""

    sides: list[Side]
    replications: int
    metrics: list[str]
    by_side: dict[str, list[Comparison | None]]
    simulated: int  # runs that were not in the cache

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
        sides.append(Side(name, path_of(source), scenario, [], [], {}))
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
        side.figures = [{} for _ in range(replications)]
        of = replicated(side.scenario, side.path.parent, replications)
        runs += [(side, i, experiment) for i, experiment in enumerate(of)]
    simulated, warnings, verdicts = 0, {}, defaultdict(list)
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
            verdicts[side.name].append(outcome.summary["saturation"]["verdict"])
    for index, said in sorted(warnings.items()):
        side = runs[index][0]
        side.warnings += [warning for warning in said if warning not in side.warnings]
    for side in sides:
        side.warnings += [said] if (said := unstable(verdicts[side.name])) else []
    return simulated


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
    return Comparison(
        name, of, estimate([b - a for a, b in zip(base, mine, strict=True)]), of.mean / mean if mean else None
    )


def _row(of: Comparison) -> list[object]:
    far = of.difference
    mine = [None] * 3 if far is None else [far.mean, far.low, far.high]
    return [of.metric, of.of.mean, *mine, of.ratio, None if of.shows is None else not of.shows]
