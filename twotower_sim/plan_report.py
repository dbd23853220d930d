"""A plan from its file to its answer."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from twotower_sim.capacity import Answer, Candidate, Shape, Trial, breaking_load, find, front
from twotower_sim.console import progress_bar
from twotower_sim.errors import InputError
from twotower_sim.experiments import Outcome, run_all
from twotower_sim.gpu import Gpu
from twotower_sim.luck import published_quality
from twotower_sim.plan_file import PlanFile
from twotower_sim.result import all_or_nothing, circumstances, write_json
from twotower_sim.result_cache import ResultCache
from twotower_sim.scenario import BlockDiffusion, MockAr, Scenario, Setting, TwoTower, load_scenario
from twotower_sim.scenario_workload import FingerprintWorkload, MixWorkload, SyntheticWorkload, TraceWorkload
from twotower_sim.simulation import gpu_of, gpus_of, without_effect
from twotower_sim.study import plain, replicated, settings_of
from twotower_sim.tables import csv_text, first_alike, in_words, number, plain_estimate, shown
from twotower_sim.workers import Workers
from twotower_sim.yaml_file import read_document


def plan(path: Path, overrides: list[str], out: Path | None, cache: ResultCache, workers: Workers, quiet: bool) -> None:
    """Find the least costly deployment for the plan at ``path``; results go to ``out`` (default out/<name>). Raises
    InputError."""
    started, clock = datetime.now(UTC), time.perf_counter()
    planner = Planner(path, overrides, cache, workers, Console(stderr=True, quiet=quiet))
    asked, out = planner.asked, out or Path("out") / planner.asked.name
    with all_or_nothing() as stage:
        files = [stage(out / name) for name in ("plan.json", "candidates.csv", "trials.csv", "run.json")]
        answer = find(planner.candidates, asked.bounds, asked.most_gpus, planner.run)
        answer.given_up |= planner.refused
        margin = None
        if answer.best and asked.margin and planner.can_scale:
            margin = breaking_load(answer.best, asked.bounds, planner.run)
        write_json(files[0], _report(asked, answer, margin))
        files[1].write_text(_candidates_csv(answer), encoding="utf-8")
        files[2].write_text(_trials_csv(asked, answer), encoding="utf-8")
        write_json(files[3], circumstances(started) | {"wall_s": time.perf_counter() - clock})
    if not quiet:
        _print(asked, answer, margin, planner.can_scale, Console())
        print(f"Results     {out}/plan.json, candidates.csv, trials.csv, run.json")


class Planner:
    """The candidates of a plan, and how to run them."""

    def __init__(self, path: Path, overrides: list[str], cache: ResultCache, workers: Workers, errors: Console) -> None:
        document = read_document(path)
        document.data.setdefault("name", path.stem if path.stem[:1].isalnum() else "plan")
        self.asked = document.validate(PlanFile)
        self._scenario = path.parent / self.asked.scenario
        if not self._scenario.is_file():
            raise InputError(f"{document.where(('scenario',))}: scenario: {self._scenario} is no file")
        self._fixed: list[str | Setting] = [*settings_of(self.asked.set_, path, document, ("set",)), *overrides]
        self._settings = lambda values: settings_of(values, path, document, ("choices",))
        self._cache, self._workers, self._errors = cache, workers, errors
        self.refused: dict[str, str] = {}
        self.candidates = list(self._candidates())
        if not self.candidates:
            said = "\n".join(f"  {name}: {why}" for name, why in self.refused.items())
            raise InputError(f"{path}: no candidate can be run:\n{said}")
        self.can_scale = all(_scaled(of, 1.0) is not None for of in map(self._loaded, self.candidates))

    def _load(self, values: dict[str, Any], *more: Setting) -> Scenario:
        return load_scenario(self._scenario, [*self._fixed, *self._settings(values), *more])

    def _loaded(self, candidate: Candidate) -> Scenario:
        return self._load(dict(candidate.overrides))

    def _candidates(self) -> Iterable[Candidate]:
        first = {key: values[0] for key, values in self.asked.choices.items()}
        for choice in self.asked.combinations:
            try:
                scenario = self._load(choice)
                gpu, gpus = gpu_of(scenario, self._scenario.parent), gpus_of(scenario)
            except InputError as error:
                self.refused[_named(choice)] = str(error)
                continue
            unread = without_effect(scenario)
            idle = [key for key in choice if any(of == key or key.startswith(f"{of}.") for of in unread)]
            if any(choice[key] != first[key] for key in idle):
                continue  # the same deployment as that with the first value
            values = {key: value for key, value in choice.items() if key not in idle}
            if why := self._unfit(scenario, gpu):
                self.refused[_named(values)] = why
                continue
            replica = gpus // scenario.deployment.replicas
            usd, group = replica * (gpu.price_usd_per_hour or 0.0), (gpu.name, scenario.decoding.kind)
            yield Candidate(_named(values), values, replica, usd, _quality(scenario), group)

    def _unfit(self, scenario: Scenario, gpu: Gpu) -> str | None:
        if gpu.price_usd_per_hour is None:
            return f"{gpu.name} has no price_usd_per_hour; give it one in a GPU file"
        quality, floor = _quality(scenario), self.asked.quality_floor
        if floor is None or (quality is not None and quality >= floor):
            return None
        found = "is not published" if quality is None else f"is {quality:.1%}"
        return f"its quality {found}; the floor is {floor:.1%}"

    def run(self, shapes: list[Shape]) -> list[list[dict[str, Any]] | str]:
        """All replications of all shapes, side by side."""
        runs = [replicated(self._of(shape), self._scenario.parent, self.asked.replications) for shape in shapes]
        flat = [(i, j) for i, of in enumerate(runs) for j in range(len(of))]
        found: dict[tuple[int, int], Outcome] = {}
        what = f"{len(shapes)} of {len(self.candidates)} candidates" if len(shapes) > 1 else shapes[0].candidate.name
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


def _quality(scenario: Scenario) -> float | None:
    decoding = scenario.decoding
    if isinstance(decoding, MockAr):
        return None
    if not isinstance(decoding, TwoTower | BlockDiffusion):
        return 1.0  # the model itself; drafts are verified
    known = [published_quality(scenario.model, decoding, gamma) for gamma in decoding.gammas]
    return None if None in known else min(of for of in known if of is not None)


def _scaled(scenario: Scenario, load: float) -> tuple[str, float] | None:
    """The key that makes the load so many times as heavy, and its value; None where there is no one key."""
    of = scenario.workload
    if isinstance(of, TraceWorkload | FingerprintWorkload):
        return "workload.rate_scale", of.rate_scale * load
    if isinstance(of, SyntheticWorkload) and (rate := getattr(of.arrivals, "rate_rps", None)):
        return "workload.arrivals.rate_rps", rate * load
    if isinstance(of, MixWorkload) and of.rate_rps:
        return "workload.rate_rps", of.rate_rps * load
    return None


def _named(values: dict[str, Any]) -> str:
    return ", ".join(_in_words(key, value) for key, value in values.items()) or "the scenario"


def _in_words(key: str, value: Any) -> str:
    """A choice as people say it."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else f"{key.rpartition('.')[2]} {plain(value)}"
    rest = [f"{name} {plain(of)}" for name, of in value.items() if name != "kind"]
    return " ".join([str(value.get("kind", "")), *rest]).strip()


# ---------------------------------------------------------------------- files


def _report(asked: PlanFile, answer: Answer, margin: tuple[float, float] | None) -> dict[str, Any]:
    of = answer.best or answer.closest
    return {
        "plan": asked.model_dump(by_alias=True),
        "answer": _sentence(asked, answer),
        "met": answer.best is not None,
        "best": _plain(answer.best),
        "closest": _plain(answer.closest),
        "one_replica_fewer": _plain(_fewer(answer)),
        "load": None if margin is None else {"bears": margin[0], "breaks": None if margin[1] == inf else margin[1]},
        "front": [_plain(of) for of in front(answer.fewest)],
        "candidates": [_plain(of) for of in sorted(answer.fewest, key=lambda of: of.cost)],
        "given_up": answer.given_up,
        "provenance": of.summaries[0]["provenance"] if of and of.summaries else {},
        "warnings": _warnings(answer),
    }


def _warnings(answer: Answer) -> list[str]:
    """Of the deployment that is shown."""
    of = answer.best or answer.closest
    return first_alike(warning for run in of.summaries for warning in run["warnings"]) if of else []


def _plain(of: Trial | None) -> dict[str, Any] | None:
    if of is None:
        return None
    candidate, replicas = of.shape.candidate, of.shape.replicas
    return {
        "candidate": candidate.name,
        "choices": dict(candidate.overrides),
        "replicas": replicas,
        "gpus": replicas * candidate.gpus,
        "usd_per_hour": of.cost,
        "quality": candidate.quality,
        "saturation": of.verdicts,
        "meets": of.meets,
        "objectives": {name: plain_estimate(estimate) for name, estimate in of.figures.items()},
    }


def _fewer(answer: Answer) -> Trial | None:
    """The trial that shows that the answer is the least of its kind."""
    best = answer.best
    return next(
        (of for of in answer.trials if best and of.shape == best.shape._replace(replicas=best.shape.replicas - 1)), None
    )


def _candidates_csv(answer: Answer) -> str:
    rows = [
        [name, of.shape.replicas, of.shape.replicas * of.shape.candidate.gpus, of.cost, of.ratio, ""]
        for of in sorted(answer.fewest, key=lambda of: of.cost)
        for name in [of.shape.candidate.name]
    ]
    rows += [[name, None, None, None, None, why] for name, why in answer.given_up.items()]
    return csv_text(["candidate", "replicas", "gpus", "usd_per_hour", "worst_share_of_bound", "given_up"], rows)


def _trials_csv(asked: PlanFile, answer: Answer) -> str:
    rows = [
        [of.shape.candidate.name, of.shape.replicas, of.cost, "/".join(dict.fromkeys(of.verdicts)), of.meets]
        + [None if (figure := of.figures.get(name)) is None else figure.mean for name in asked.objectives]
        for of in sorted(answer.trials, key=lambda of: (of.shape.candidate.name, of.shape.replicas))
    ]
    return csv_text(["candidate", "replicas", "usd_per_hour", "saturation", "meets", *asked.objectives], rows)


# ---------------------------------------------------------------------- terminal


def _sentence(asked: PlanFile, answer: Answer) -> str:
    if answer.best:
        of = answer.best
        gpus = of.shape.replicas * of.shape.candidate.gpus
        return f"{_deployment(of)} meets all objectives at the least cost: {gpus} GPUs, ${of.cost:.2f} an hour."
    if answer.closest is None:
        return f"No deployment meets this: none has at most {asked.most_gpus} GPUs."
    of = answer.closest
    state = "" if of.stable else f", which is {_verdict(of)}"
    return f"No deployment of at most {asked.most_gpus} GPUs meets this; closest is {_deployment(of)}{state}."


def _verdict(of: Trial) -> str:
    return "/".join(dict.fromkeys(of.verdicts)) or f"not possible: {of.error}"


def _deployment(of: Trial) -> str:
    return f"{of.shape.replicas} x ({of.shape.candidate.name})"


def _print(
    asked: PlanFile, answer: Answer, margin: tuple[float, float] | None, can_scale: bool, console: Console
) -> None:
    if answer.fewest:
        console.print(_table(asked, answer), markup=False)

    def say(what: str, text: str) -> None:
        console.print(f"{what:12}{text}", highlight=False, markup=False, soft_wrap=True)

    say("Answer", _sentence(asked, answer))
    bounds = [f"{of.figure} {'>=' if of.least else '<='} {number(of.bound)}" for of in asked.bounds]
    bounds += [f"quality >= {asked.quality_floor:.1%}"] if asked.quality_floor else []
    say("Asked", ", ".join(bounds))
    if fewer := _fewer(answer):
        say("One fewer", _why_not(asked, fewer))
    if margin:
        breaks = "the largest tried" if margin[1] == inf else f"breaks at {margin[1]:.2f}"
        say("Margin", f"it bears {margin[0]:.2f} times the load, {breaks}")
    elif answer.best and asked.margin and not can_scale:
        say("Margin", "not found: no one key of this workload sets its rate")
    if answer.closest:
        say("Closest", _why_not(asked, answer.closest))
    for name, why in answer.given_up.items():
        say("Given up", f"{name}: {why}")
    for warning in _warnings(answer):
        say("Warning", warning)


def _table(asked: PlanFile, answer: Answer) -> Table:
    title = f"twotower-sim plan | {asked.name}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Fewest replicas of", overflow="fold")
    for name in ("Replicas", "GPUs", "$/h", *map(in_words, asked.objectives)):
        table.add_column(name, justify="right", overflow="fold")
    for of in sorted(answer.fewest, key=lambda of: of.cost):
        gpus = of.shape.replicas * of.shape.candidate.gpus
        figures = [_shown(of, name) for name in asked.objectives]
        table.add_row(of.shape.candidate.name, str(of.shape.replicas), str(gpus), f"{of.cost:.2f}", *figures)
    return table


def _shown(of: Trial, name: str) -> str:
    return shown(of.figures.get(name))


def _why_not(asked: PlanFile, of: Trial) -> str:
    if not of.stable:
        return f"{_deployment(of)} is {_verdict(of)}; its percentiles say nothing"
    missed = [bound.figure for bound in asked.bounds if bound.ratio(of.figures[bound.figure]) > 1]
    return f"{_deployment(of)}: " + ", ".join(f"{name} {_shown(of, name)}" for name in missed)
