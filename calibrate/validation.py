"""Predict real runs, run them, and say how far the predictions were off: the composition root of ``validate``.

Every repetition samples the passes of the model once more and then runs every scenario on the real engine, so that the
profile and the runs see the same machine.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from heapq import heapify, heappush
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console

from calibrate import machine
from calibrate.calibration import BUNDLED, Calibration, Settings
from calibrate.graphs import Passes
from calibrate.in_situ import Loop
from calibrate.model import TwoTower
from calibrate.prompts import Prompt, of_lengths, read_prompts
from calibrate.serving import Arrivals, Served, ServedBlocks, ServedTokens, Slots, Written, serve
from calibrate.survey import progress
from calibrate.tiny import FOLDER as TINY
from calibrate.tiny import corpus
from twotower_sim import scenario as ask
from twotower_sim.errors import InputError
from twotower_sim.fidelity import RealRun, Validated, outcome, validated
from twotower_sim.luck import PUBLISHED, luck_of
from twotower_sim.pairs_plot import check_plot, plot_pairs
from twotower_sim.policy import POLICIES
from twotower_sim.profile import Profile, load_profile, save_profile
from twotower_sim.recorded import RecordedRounds
from twotower_sim.records import Records
from twotower_sim.replica import Round
from twotower_sim.requests import Requests
from twotower_sim.result import all_or_nothing, write_json
from twotower_sim.rounds import Task
from twotower_sim.scenario import load_scenario
from twotower_sim.scenario_workload import ClosedLoopWorkload
from twotower_sim.simulation import Run, prepare, round_engine
from twotower_sim.validation_report import (
    Report,
    as_json,
    command_line,
    markdown,
    panels,
    summary_lines,
    write_runs,
)
from twotower_sim.yaml_file import Source, path_of

FILES = ("report.md", "fidelity.json", "profile.json.gz", "runs.json.gz")
SAMPLES = 2
"""Of every pass in a repetition."""
DRAWS = 20
"""Of the luck of all requests, whose mean is what a planner expects."""
TEXTS_TO_RUN, TEXTS, TEXTS_TO_FIT, PROMPTS_TO_FIT = 1, 500, 2, 64
"""Seeds of the tiny model's texts and how many are used, to serve and to fit commits to."""


@dataclass(frozen=True)
class Question:
    """A scenario to validate."""

    path: Path
    scenario: ask.Scenario

    @property
    def class_(self) -> str | None:
        """Of its texts; None: any."""
        commits = self.scenario.commits
        return commits.class_ if isinstance(commits, ask.ProfileCommits) else None

    def on(self, profile: Path, draw: int = 0) -> Run:
        """The scenario prepared on a profile, with the luck of another draw of commits."""
        latency = ask.ProfileLatency(kind="profile", path=str(profile.resolve()), extrapolate=True)
        update: dict = {"latency": latency}
        if isinstance(self.scenario.decoding, ask.TwoTower):
            assert isinstance(self.scenario.commits, ask.ProfileCommits)
            update["commits"] = self.scenario.commits.model_copy(update={"path": None})
        scenario = self.scenario.model_copy(update=update)
        run = prepare(scenario, self.path.parent)
        if run.luck and draw:
            assert isinstance(scenario.decoding, ask.TwoTower)
            other = scenario.model_copy(update={"seed": (scenario.seed + draw) % (1 << 64)})
            of = scenario.decoding, run.tower, self.path.parent, run.requests.output_tokens, run.classes
            run.luck = luck_of(other, *of, [])[0]
        return run


def ask_for(source: Source, overrides: Sequence[ask.Change]) -> Question:
    """Raises InputError for what the real engine does not do."""
    scenario, path = load_scenario(source, overrides), path_of(source)
    hardware, decoding = scenario.deployment, scenario.decoding
    for key, found, known in (
        ("decoding.kind", decoding.kind, ("two_tower", "autoregressive")),
        ("deployment.replicas", hardware.replicas, (1,)),
        ("deployment.tensor_parallel", max(hardware.degrees), (1,)),
        ("deployment.placement.kind", "split" if scenario.split else "colocated", ("colocated",)),
        ("memory.prefix_cache.kind", scenario.memory.prefix_cache.kind, ("none",)),
        ("scheduler.host_overhead_ms", scenario.scheduler.host_overhead_ms, (0,)),
        ("scheduler.overlap", scenario.scheduler.overlap, ("none",)),
    ):
        if found not in known:
            raise InputError(f"{path}: {key}: found {found}; the real engine does {' or '.join(map(str, known))}")
    if isinstance(decoding, ask.TwoTower) and not isinstance(scenario.commits, ask.ProfileCommits):
        raise InputError(
            f"{path}: commits.kind: found {scenario.commits.kind}; expected profile: its class says which texts to run"
        )
    return Question(path, scenario)


def validate(
    paths: list[Path], overrides: list[str], out: Path, repetitions: int, profile: Path | None, model: str | None,
    devices: str | None, prompts: Path | None, threads: int, goal: float, plot: Path | None,
) -> None:  # fmt: skip
    """Validate scenarios and write what was found to the folder ``out``, all at once. Raises InputError."""
    if plot:
        check_plot(plot)
    with all_or_nothing() as stage:
        files, picture = [stage(out / name) for name in FILES], stage(plot) if plot else None
        questions = [ask_for(path, overrides) for path in paths]
        console, command = Console(stderr=True), command_line()
        found = found_for(questions, repetitions, profile, model, devices, prompts, threads, goal, command, console)
        write_found(files, found)
        if plot and picture:
            plot_pairs(panels(found), picture, plot.suffix)
    print("\n".join(summary_lines(found)))
    print(f"Results     {out}/{', '.join(FILES)}" + (f"; {plot}" if plot else ""))


def found_for(
    questions: list[Question], repetitions: int, profile: Path | None, model: str | None, devices: str | None,
    prompts: Path | None, threads: int, goal: float, command: str, console: Console,
) -> Report:  # fmt: skip
    """Serve scenarios for real on ``threads`` threads, and find how far predictions are off. ``command``: what made the
    report. Raises InputError."""
    with machine.threads(threads):
        validation = Validation(questions, repetitions, profile, model, devices, prompts)
        scenarios = validation.run(console)
        return Report(scenarios, validation.read(), validation.where, profile is None, goal, command)


def write_found(files: list[Path], found: Report) -> None:
    """To FILES, under whatever names."""
    files[0].write_text(markdown(found), encoding="utf-8")
    write_json(files[1], as_json(found))
    save_profile(found.profile, files[2], packed=True)
    write_runs(found, files[3])


class Validation:
    """Calibrates between the runs, unless ``profile`` is given."""

    def __init__(
        self, questions: list[Question], repetitions: int, profile: Path | None, model: str | None,
        devices: str | None, prompts: Path | None,
    ) -> None:  # fmt: skip
        self._questions, self._repetitions, self._prompts = questions, repetitions, prompts
        self._folder, self._calibrates = TemporaryDirectory(), profile is None
        own = Path(self._folder.name) / "profile.json.gz"
        self._path = profile or own
        model, devices = model or _checkpoint_of(questions), devices or str(machine.devices(None)[0])
        self._calibration = calibration = Calibration(self._settings(model, devices, own))
        if calibration.split:
            raise InputError(f"--devices {devices}: found two; the real engine has both towers on one")
        for question in questions:
            decoding, size = question.scenario.decoding, calibration.config.block_size
            if isinstance(decoding, ask.TwoTower) and decoding.block_size != size:
                raise InputError(
                    f"{question.path}: decoding.block_size: found {decoding.block_size}; {calibration.name} has {size}"
                )
        self._texts = self._all_texts()
        for question in questions:
            self._class(question)

    def read(self) -> Profile:
        """The profile that runs are predicted from."""
        return load_profile(str(self._path))

    @property
    def where(self) -> str:
        """The machine of the real runs."""
        facts, threads = machine.facts(self._calibration.context, 1), torch.get_num_threads()
        today = datetime.now(UTC).date().isoformat()
        return f"{facts['name']}, {threads} thread{'s' * (threads > 1)} of torch, {self._calibration.dtype}, {today}"

    def _settings(self, model: str, devices: str, out: Path) -> Settings:
        """A calibration that covers what the scenarios can ask for."""
        scenarios = [question.scenario for question in self._questions]
        seats = max(scenario.scheduler.max_num_seqs for scenario in scenarios)
        budget = max(scenario.scheduler.max_num_batched_tokens for scenario in scenarios)
        blocks = [s.decoding for s in scenarios if isinstance(s.decoding, ask.TwoTower)]
        longest = max(int((load.input_tokens + load.output_tokens).max()) for load in self._load())
        return Settings(
            model=model, out=out, devices=devices, dtype=None, weights="checkpoint", skew=0.0, backend="own",
            batch=_dense(seats), context=[0, *_rising(128, longest)], tokens=_rising(16, min(budget, longest)),
            block_sizes=[], repetitions=SAMPLES * self._repetitions, refine=0, tolerance=0.0,
            gammas=sorted({gamma for of in blocks for gamma in of.gammas}),
            steps_per_block=sorted({of.steps_per_block for of in blocks}), new_tokens=None, decode_batch=16,
            prompts=self._prompts_to_fit(model), tasks=None, only=None if blocks else "latency", fresh=True, seed=0,
            graphs=True,
        )  # fmt: skip

    def _prompts_to_fit(self, model: str) -> Path:
        """Other texts than those that are served: for the tiny model cut as the scenarios' prompts are, else every
        other one of the prompts."""
        rows = [{"class": prompt.class_, "prompt": prompt.prompt} for prompt in self._shared(0)]
        if self._prompts is None and model == "tiny":
            lengths = np.quantile(np.concatenate([load.input_tokens for load in self._load()]), _spread(PROMPTS_TO_FIT))
            rows = [
                {"class": class_, "prompt": text[: int(length)]}
                for class_, texts in corpus.texts(corpus.split()[1], TEXTS_TO_FIT).items()
                for text, length in zip(texts, lengths, strict=False)
            ]
        file = Path(self._folder.name) / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    def _shared(self, first: int) -> list[Prompt]:
        """Every other prompt of each class, the first or the second of each two."""
        rows = read_prompts(self._prompts or BUNDLED)
        classes = sorted({row.class_ for row in rows})
        return [row for name in classes for row in [of for of in rows if of.class_ == name][first::2]]

    def _load(self) -> list[Requests]:
        """The requests of every scenario."""
        free = ask.AffineLatency.model_validate({"kind": "affine", "prefill": {}, "decode": {}})
        update = {"latency": free, "decoding": ask.Autoregressive(kind="autoregressive")}
        loads = [prepare(of.scenario.model_copy(update=update), of.path.parent).requests for of in self._questions]
        for of, load in zip(self._questions, loads, strict=True):
            if load.after:
                raise InputError(
                    f"{of.path}: workload.sessions: found closed, and turns that wait; the real engine takes open"
                )
        return loads

    def run(self, console: Console) -> list[Validated]:
        """Sample and serve, repetition by repetition, then predict."""
        model = self._calibration.loaded()
        real: list[list[RealRun]] = [[] for _ in self._questions]
        loops: list[Loop] = []
        if self._calibrates:
            journal = self._calibration.journal()
            commits = self._calibration.commits(model, journal, console)
        for repetition in range(self._repetitions):
            if self._calibrates:
                latency = self._calibration.survey(model, SAMPLES * (repetition + 1), journal, console).run(0, 0.0)
                loops += self._calibration.engine_loops(model)
                latency = self._calibration.with_engine(latency, loops)
                save_profile(self._calibration.profile(latency, commits), self._path)
            for question, runs in zip(self._questions, real, strict=True):
                runs.append(self._serve(question, model, console))
        measured = self.read().latency
        probe_s = measured.engine.probe_s if measured and measured.engine else None
        return [
            validated(partial(question.on, self._path), [of.compared(probe_s) for of in runs], DRAWS)
            for question, runs in zip(self._questions, real, strict=True)
        ]

    def _serve(self, question: Question, model: TwoTower, console: Console) -> RealRun:
        run = question.on(self._path)
        prompts = of_lengths(self._texts_of(question), run.requests.input_tokens.tolist())
        with progress(console, len(run.requests), f"serving {question.scenario.name}") as done:
            return serve_run(run, model, prompts, lambda request: done(1))

    def _all_texts(self) -> dict[str, Iterable[str]]:
        """Texts to serve, by class."""
        if self._prompts is None and self._calibration.folder == TINY:
            return {
                name: list(islice(texts, TEXTS))
                for name, texts in corpus.texts(corpus.split()[1], TEXTS_TO_RUN).items()
            }
        rows = self._shared(1)
        return {name: [row.prompt for row in rows if row.class_ == name] for name in {row.class_ for row in rows}}

    def _class(self, question: Question) -> str:
        """Of the texts of a scenario: that of its commits, else the first."""
        name = question.class_ or min(self._texts, default="")
        if name not in self._texts:
            known = ", ".join(sorted(self._texts)) or "none"
            raise InputError(f"{question.path}: commits.class: found {name}; there are texts to serve of {known}")
        return name

    def _texts_of(self, question: Question) -> Iterator[list[int]]:
        """Token ids of texts, without end."""
        tokenizer = self._calibration.tokenizer
        return (tokenizer.encode(text) for text in cycle(self._texts[self._class(question)]))


def _spread(count: int) -> np.ndarray:
    """``count`` shares, even between 0 and 1, in an order that mixes them."""
    return np.random.default_rng(0).permutation((np.arange(count) + 0.5) / count)


def _dense(last: int) -> list[int]:
    """1 to ``last``, a quarter apart: time over the batch has steps of its own."""
    out = [1]
    while out[-1] < last:
        out.append(min(last, out[-1] + max(1, out[-1] // 4)))
    return out


def _rising(first: int, last: int) -> list[int]:
    """``first``, its doubles and ``last``."""
    out = [first]
    while 2 * out[-1] < last:
        out.append(2 * out[-1])
    return sorted({*out, max(first, last)})


def _checkpoint_of(questions: list[Question]) -> str:
    """The weights behind the scenarios' model: beside its config, or published."""
    found = set()
    for question in questions:
        model = question.scenario.model
        if (config := question.path.parent / model).is_file():
            folder = config.parent.resolve()
            model = "tiny" if folder == TINY.resolve() else str(folder)
        found.add(PUBLISHED.get(model, model))
    if len(found) > 1:
        raise InputError(
            f"the scenarios have different models, {' and '.join(sorted(found))}; validate them one by one"
        )
    return found.pop()


# ---------------------------------------------------------------------- the real run


def serve_run(run: Run, model: TwoTower, prompts: list[torch.Tensor], finished: Callable[[int], None]) -> RealRun:
    """Serve the requests of a prepared scenario on this machine. ``prompts`` by request; ``finished`` hears of each."""
    scenario, requests = run.scenario, run.requests
    run.records, run.may_be_fast = Records(len(requests)), False
    run.latency = RecordedRounds([])  # type: ignore[assignment]  # nobody asks it
    seats = min(scenario.scheduler.max_num_seqs, run.memory.state_slots)
    slots = Slots(run.memory.kv_blocks, scenario.memory.kv_block_tokens, seats)
    longest = int((requests.input_tokens + requests.output_tokens).max())
    served = Served(Passes(model, model.cache(seats + 1, longest)), slots, seats, prompts)
    for request in run.rejected.tolist():
        run.records.arrival_ns[request] = int(requests.arrival_ns[request])
    decoder, written = _decoder(run, served)
    decoder.warm_up()
    arrivals, more = _arrivals(run)
    rounds: list[Round] = []

    def on_finish(request: int, now_ns: int) -> None:
        more(now_ns)
        finished(request)

    def arrive(request: int, at_ns: int) -> Task:
        run.records.arrival_ns[request] = at_ns
        return Task(request, int(requests.input_tokens[request]), int(requests.output_tokens[request]))

    engine = round_engine(run, 0, decoder, slots, on_finish, lambda index, round: rounds.append(round))
    run.engines = [engine]
    serve(engine, served, arrivals, arrive)
    lengths = zip(requests.input_tokens.tolist(), requests.output_tokens.tolist(), strict=True)
    text = [of[n : n + tokens] for of, (n, tokens) in zip(served.text, lengths, strict=True)]
    return RealRun(outcome(run, rounds), served.rounds, written.sizes, run.records.units(), text, served.probe.mean_s)


def _decoder(run: Run, served: Served) -> tuple[ServedBlocks | ServedTokens, Written]:
    scenario, decoding, luck = run.scenario, run.scenario.decoding, run.luck
    if not luck:
        return ServedTokens(scenario.memory.kv_block_tokens, served), Written([], 1)
    assert isinstance(decoding, ask.TwoTower)
    scheduler, written = scenario.scheduler, Written(run.requests.output_tokens.tolist(), decoding.block_size)
    rules = POLICIES[scheduler.policy], scheduler.steps_per_round, scheduler.max_extends_per_round, luck.level
    return (
        ServedBlocks(served, written, luck.gammas, decoding.steps_per_block, *rules, records=run.records),
        written,
    )


def _arrivals(run: Run) -> tuple[Arrivals, Callable[[int], None]]:
    """Arrivals that are known from the start, and what to do when a request completes."""
    load, requests = run.scenario.workload, run.requests
    ids = np.delete(np.arange(len(requests)), run.rejected).tolist()
    if not isinstance(load, ClosedLoopWorkload):
        arrivals = [(int(requests.arrival_ns[request]), request) for request in ids]
        heapify(arrivals)
        return arrivals, lambda now_ns: None
    arrivals, waiting = [(0, request) for request in ids[: load.concurrency]], iter(ids[load.concurrency :])
    think_ns = round(load.think_time_s * 1e9)

    def more(now_ns: int) -> None:
        if (request := next(waiting, None)) is not None:
            heappush(arrivals, (now_ns + think_ns, request))

    return arrivals, more
