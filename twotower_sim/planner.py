"""A plan that is solved: its candidates, how to run them, and the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console

from twotower_sim.capacity import Answer, Candidate, Search, Shape, Trial, breaking_load
from twotower_sim.console import progress_bar
from twotower_sim.errors import InputError
from twotower_sim.experiments import Experiment, Outcome, run_all
from twotower_sim.gpu import Gpu
from twotower_sim.luck import quality_of
from twotower_sim.plan_file import PlanFile
from twotower_sim.proposals import Merits, Proposals, combinations, size
from twotower_sim.result_cache import ResultCache
from twotower_sim.scenario import Change, Scenario, Setting, asked_of, load_scenario
from twotower_sim.scenario_workload import (
    ClosedLoopWorkload,
    FingerprintWorkload,
    MixWorkload,
    SyntheticWorkload,
    TraceWorkload,
)
from twotower_sim.simulation import gpu_of, gpus_of, without_effect
from twotower_sim.study import plain, replicated, settings_of
from twotower_sim.tables import Sheet, first_alike
from twotower_sim.workers import Workers
from twotower_sim.yaml_file import Source, path_of, read_document

GENERATION = 8
"""Candidates that are proposed at once."""


@dataclass(frozen=True)
class Plan:
    """A plan that was solved. ``load``: (what the answer bears, where it breaks), as multiples of the load asked for;
    None where there is no answer, or it was not asked for. ``can_scale``: whether one key sets the load.
    ``experiment``: the first run of the deployment that is shown."""

    asked: PlanFile
    answer: Answer
    load: tuple[float, float] | None
    can_scale: bool
    experiment: Experiment | None

    @property
    def shown(self) -> Trial | None:
        """The answer, or what comes closest to one."""
        return self.answer.best or self.answer.closest

    @property
    def sentence(self) -> str:
        """The answer in one."""
        most, best, closest = self.asked.most_gpus, self.answer.best, self.answer.closest
        if best:
            return f"{best.deployment} meets all objectives at the least cost: {best.price}."
        if closest is None:
            return f"No deployment meets this: none has at most {most} GPUs."
        if closest.meets:
            met = f"{closest.deployment} meets all objectives in it ({closest.price})"
            return f"This load is too short to tell: {met}, but it had not settled. Take more requests."
        state = "" if closest.stable else f", which is {closest.verdict}"
        return f"No deployment of at most {most} GPUs meets this; closest is {closest.deployment}{state}."

    @property
    def one_fewer(self) -> Trial | None:
        """The trial that shows that the answer is the least of its kind."""
        best = self.answer.best
        less = best and best.shape._replace(replicas=best.shape.replicas - 1)
        return next((of for of in self.answer.trials if of.shape == less), None)

    @property
    def warnings(self) -> list[str]:
        """Of the deployment that is shown."""
        runs = self.shown.summaries if self.shown else []
        return first_alike(warning for run in runs for warning in run["warnings"])

    @property
    def fewest(self) -> list[Trial]:
        """Of every candidate that was not given up, the least costly first."""
        return sorted(self.answer.fewest, key=lambda of: of.cost)

    @property
    def cheapest(self) -> list[Trial]:
        """The least costly on each GPU type with each way of decoding."""
        of_each: dict[tuple[str, ...], Trial] = {}
        for of in self.fewest:
            of_each.setdefault(of.shape.candidate.group, of)
        return list(of_each.values())

    @property
    def tried(self) -> list[Trial]:
        """All trials, in an order that does not depend on what was in the cache."""
        return sorted(self.answer.trials, key=lambda of: (of.shape.candidate.name, of.shape.replicas))

    @property
    def candidates(self) -> Sheet:
        """A row a candidate: its fewest replicas, or why it was given up."""
        rows: list[list[Any]] = [
            [of.shape.candidate.name, of.shape.replicas, of.gpus, of.cost, of.ratio, ""] for of in self.fewest
        ]
        given_up = self.answer.dearer | self.answer.given_up
        rows += [[name, None, None, None, None, why] for name, why in given_up.items()]
        return Sheet(["candidate", "replicas", "gpus", "usd_per_hour", "worst_share_of_bound", "given_up"], rows)

    @property
    def trials(self) -> Sheet:
        """A row a trial: a number of replicas of a candidate, its verdict, and the figures of the objectives."""
        header = ["candidate", "replicas", "usd_per_hour", "saturation", "meets", *self.asked.objectives]
        rows = [
            [of.shape.candidate.name, of.shape.replicas, of.cost, of.verdict, of.meets]
            + [None if (figure := of.figures.get(name)) is None else figure.mean for name in self.asked.objectives]
            for of in self.tried
        ]
        return Sheet(header, rows)


class Planner:
    """The candidates of a plan, and how to run them."""

    def __init__(
        self, source: Source, overrides: Sequence[Change], cache: ResultCache, workers: Workers, errors: Console
    ) -> None:
        document, path = read_document(source), path_of(source)
        document.data.setdefault("name", path.stem if path.stem[:1].isalnum() else "plan")
        self.asked = document.validate(PlanFile)
        self._scenario = asked_of(document, self.asked.scenario)
        self._base = path_of(self._scenario).parent
        self._fixed: list[Change] = [*settings_of(self.asked.set_, document, ("set",)), *overrides]
        self._settings = lambda values: settings_of(values, document, ("choices",))
        self._cache, self._workers, self._errors = cache, workers, errors
        self._path = path
        self._known: dict[str, Candidate] = {}
        self._refused: dict[str, str] = {}
        self._search = Search(self.asked.bounds, self.asked.most_gpus, self.run)

    def solve(self) -> Plan:
        """Raises InputError where no candidate can be run, and where the workers or the cache fail."""
        effort, spaces = self.asked.search, self.asked.spaces
        small = [space for space in spaces if (size(space) or inf) <= effort.candidates]
        proposals = [Proposals(space, effort.seed) for space in spaces if space not in small]
        self._try([values for space in small for values in combinations(space)])
        for done in range(0, effort.candidates if proposals else 0, GENERATION):
            asked = [(of, each) for of in proposals for each in of.ask(min(GENERATION, effort.candidates - done))]
            for (of, each), candidate in zip(asked, self._try([each.values for _, each in asked]), strict=True):
                of.tell(each, self._merits(candidate))
        return self._plan()

    def _plan(self) -> Plan:
        if not self._known:
            said = "\n".join(f"  {name}: {why}" for name, why in self._refused.items())
            raise InputError(f"{self._path}: no candidate can be run:\n{said}")
        answer, asked = self._search.answer, self.asked
        answer.given_up.update(self._refused)
        shown, load = answer.best or answer.closest, None
        can_scale = shown is not None and _scaled(self._loaded(shown.shape.candidate), 1.0) is not None
        if answer.best and asked.margin and can_scale:
            load = breaking_load(answer.best, asked.bounds, self.run)
        runs = shown and not shown.error and replicated(self._of(shown.shape), self._base, 1)
        return Plan(asked, answer, load, can_scale, runs[0] if runs else None)

    def _try(self, choices: list[dict[str, Any]]) -> list[Candidate | None]:
        """The fewest replicas of each are found; None where one cannot be."""
        candidates = [self._candidate(choice) for choice in choices]
        self._search.add([of for of in candidates if of])
        return candidates

    def _merits(self, of: Candidate | None) -> Merits | None:
        """Of a candidate that was given up because others are cheaper: the least that it could cost, at its bounds."""
        if of is None:
            return None
        lost = 1 - (of.quality or 0.0)
        if fewest := self._search.fewest(of):
            return Merits(fewest.cost, fewest.ratio, lost, fewest.ratio - 1)
        most, least = self._search.most_tried(of), self._search.least(of)
        if most is None or most.error:
            return None
        if least * of.gpus <= self.asked.most_gpus:
            return Merits(of.cost(least), 1.0, lost, 0.0)
        return Merits(most.cost, most.ratio, lost, most.ratio - 1 if most.stable else most.ratio)

    def _load(self, values: dict[str, Any], *more: Setting) -> Scenario:
        return load_scenario(self._scenario, [*self._fixed, *self._settings(values), *more])

    def _loaded(self, candidate: Candidate) -> Scenario:
        return self._load(dict(candidate.overrides))

    def _candidate(self, choice: dict[str, Any]) -> Candidate | None:
        """Without what nothing reads; None where it is refused."""
        try:
            scenario = self._load(choice)
            gpu, gpus = gpu_of(scenario, self._base), gpus_of(scenario)
        except InputError as error:
            self._refused[_named(choice)] = str(error)
            return None
        unread = without_effect(scenario)
        idle = [key for key in choice if any(of == key or key.startswith(f"{of}.") for of in unread)]
        values = {key: value for key, value in choice.items() if key not in idle}
        name = _named(values)
        if why := self._unfit(scenario, gpu):
            self._refused[name] = why
            return None
        replica = gpus // scenario.deployment.replicas
        usd, group = replica * (gpu.price_usd_per_hour or 0.0), (gpu.name, scenario.decoding.kind)
        return self._known.setdefault(name, Candidate(name, values, replica, usd, quality_of(scenario), group))

    def _unfit(self, scenario: Scenario, gpu: Gpu) -> str | None:
        if gpu.price_usd_per_hour is None:
            return f"{gpu.name} has no price_usd_per_hour; give it one in a GPU file, or as cost.price_usd_per_hour"
        gpus = self.asked.choices.get("deployment.gpu")
        if scenario.cost.price_usd_per_hour is not None and isinstance(gpus, list) and len(gpus) > 1:
            return "cost.price_usd_per_hour would be that of every deployment.gpu; give prices in GPU files"
        quality, floor = quality_of(scenario), self.asked.quality_floor
        if floor is None or (quality is not None and quality >= floor):
            return None
        found = "is not published" if quality is None else f"is {quality:.1%}"
        return f"its quality {found}; the floor is {floor:.1%}"

    def run(self, shapes: list[Shape]) -> list[list[dict[str, Any]] | str]:
        """All replications of all shapes, side by side."""
        runs = [replicated(self._of(shape), self._base, self.asked.replications) for shape in shapes]
        flat = [(i, j) for i, of in enumerate(runs) for j in range(len(of))]
        found: dict[tuple[int, int], Outcome] = {}
        what = f"{len(shapes)} candidates" if len(shapes) > 1 else shapes[0].candidate.name
        with progress_bar(self._errors, None, f"simulating {what}") as bar:
            experiments = [runs[i][j] for i, j in flat]
            for index, outcome in run_all(experiments, self._cache, self._workers, bar):
                found[flat[index]] = outcome
        return [self._gathered([found[i, j] for j in range(len(of))]) for i, of in enumerate(runs)]

    def _of(self, shape: Shape) -> Scenario:
        place = "the plan's search"
        settings = [Setting("deployment.replicas", shape.replicas, place, Path())]
        if shape.load != 1 and (scaled := _scaled(self._loaded(shape.candidate), shape.load)):
            settings.append(Setting(*scaled, place, Path()))
        return self._load(dict(shape.candidate.overrides), *settings)

    @staticmethod
    def _gathered(outcomes: list[Outcome]) -> list[dict[str, Any]] | str:
        summaries = [outcome.summary for outcome in outcomes if outcome.summary is not None]
        return summaries if len(summaries) == len(outcomes) else next(of.error for of in outcomes if of.error)


def _scaled(scenario: Scenario, load: float) -> tuple[str, Any] | None:
    """The key that makes the load so many times as heavy, and its value; None where there is no one key."""
    of = scenario.workload
    if isinstance(of, TraceWorkload | FingerprintWorkload):
        return "workload.rate_scale", of.rate_scale * load
    if isinstance(of, SyntheticWorkload):
        return "workload.arrivals", _faster(of.arrivals.model_dump(exclude_none=True), load)
    if isinstance(of, ClosedLoopWorkload):
        return "workload.concurrency", max(round(of.concurrency * load), 1)
    if isinstance(of, MixWorkload) and of.rate_rps:
        return "workload.rate_rps", of.rate_rps * load
    return None


def _faster(arrivals: Any, load: float) -> Any:
    """All rates, wherever they stand, so many times as high."""
    if isinstance(arrivals, list):
        return [_faster(part, load) for part in arrivals]
    if isinstance(arrivals, dict):
        return {key: of * load if key.endswith("_rps") else _faster(of, load) for key, of in arrivals.items()}
    return arrivals


def _named(values: dict[str, Any]) -> str:
    return ", ".join(_in_words(key, value) for key, value in values.items()) or "the scenario"


def _in_words(key: str, value: Any) -> str:
    """A choice as people say it."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else f"{key.rpartition('.')[2]} {plain(value)}"
    rest = [f"{name} {plain(of)}" for name, of in value.items() if name != "kind"]
    return " ".join([str(value.get("kind", "")), *rest]).strip()
