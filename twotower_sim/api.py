"""Everything that the command line does, from Python: functions by the names of its commands. They print nothing.

A scenario, study or plan is the path of a file, or a mapping of what a file would hold. Files that a mapping names are
relative to ``base``; a study or plan may hold its scenario in the place of a path. ``set`` overrides values of the
scenario by dotted keys, those of sections first, as ``--set`` does. Results have their figures as plain data and as
DataFrames, and write what the command writes when they are told to. ``progress``: a bar on stderr, if it is a terminal.

What is wrong with anything given raises InputError, which says where it stands (file and line; <scenario>, <study>,
<plan> or <set> for mappings; an option by its name on the command line), what was found, and what is allowed.

    >>> from twotower_sim import api
    >>> chat = {"workload": {"kind": "fingerprint", "fingerprint": "azure-conversation-2023", "requests": 200}}
    >>> fast = api.run(chat, {"decoding.gamma": 0.6}).metrics
    >>> bool(fast.loc["tokens_per_nfe", "avg"] > 2)
    True
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from twotower_sim.errors import InputError, needing
from twotower_sim.result_cache import CACHE, ResultCache

if TYPE_CHECKING:
    from rich.console import Console

    from twotower_sim.outcomes import (
        CalibrationResult,
        CompareResult,
        FingerprintResult,
        LogResult,
        PlanResult,
        ProfileCheck,
        ProfileComparison,
        ProfileResult,
        RunResult,
        SweepResult,
        TraceDescription,
        TraceList,
        TraceSample,
        ValidationResult,
    )
    from twotower_sim.profile import Profile
    from twotower_sim.readers import Format
    from twotower_sim.report import Resolved
    from twotower_sim.scenario import Setting
    from twotower_sim.trace.convert import Converted
    from twotower_sim.workers import Workers
    from twotower_sim.yaml_file import Source

__all__ = [
    "InputError",
    "calibrate",
    "check",
    "compare",
    "plan",
    "profile_check",
    "profile_compare",
    "profile_merge",
    "profile_show",
    "run",
    "schema",
    "sweep",
    "trace_convert",
    "trace_describe",
    "trace_fetch",
    "trace_fingerprint",
    "trace_list",
    "trace_sample",
    "validate",
    "validate_log",
]

Name = str | PathLike[str]
Given = Name | Mapping[str, Any]
"""A file, or what it would hold."""
Overrides = Mapping[str, Any] | None


# ---------------------------------------------------------------------- simulations


def run(scenario: Given, set: Overrides = None, *, base: Name = ".", progress: bool = False) -> "RunResult":
    """Replay a workload through a deployment.

    >>> result = api.run(chat, {"deployment.replicas": 2})
    >>> result.summary["counts"]["completed"]
    200
    >>> result.save("out/chat")
    """
    from twotower_sim.console import progress_bar
    from twotower_sim.metrics import evaluate
    from twotower_sim.outcomes import RunResult
    from twotower_sim.result import Stopwatch, plain_json, summary
    from twotower_sim.scenario import load_scenario
    from twotower_sim.simulation import prepare, simulate
    from twotower_sim.yaml_file import path_of

    watch, source = Stopwatch(), _source(scenario, base, "scenario")
    ready = prepare(load_scenario(source, _changes(set)), path_of(source).parent)
    with progress_bar(_errors(progress), len(ready.requests), "simulating") as bar:
        simulate(ready, progress=bar)
    results = evaluate(ready)
    figures, command = plain_json(summary(ready, results)), _command("run", [source], set)
    return RunResult(ready.scenario.name, command, figures, watch.circumstances(), ready, results)


def sweep(
    study: Given,
    set: Overrides = None,
    *,
    base: Name = ".",
    jobs: int | None = None,
    backend: str = "loky",
    scheduler: str | None = None,
    cache: Name | None = CACHE,
    progress: bool = False,
) -> "SweepResult":
    """Vary a scenario by a design. ``jobs``: processes, None for one a core; ``backend``: loky, or dask or ray, on the
    cluster at ``scheduler``; ``cache``: folder of results that need not be computed again, None to keep nothing.

    >>> grid = {"kind": "grid", "axes": {"decoding.gamma": [0.6, 0.8]}}
    >>> study = {"scenario": chat, "design": grid, "metrics": ["request_latency.p90"]}
    >>> api.sweep(study, jobs=1).points["decoding.gamma"].tolist()
    [0.6, 0.8]
    """
    from twotower_sim.outcomes import SweepResult
    from twotower_sim.result import Stopwatch, plain_json
    from twotower_sim.study import load_study
    from twotower_sim.sweep import run_study
    from twotower_sim.sweep_report import report
    from twotower_sim.yaml_file import path_of

    watch, source = Stopwatch(), _source(study, base, "study")
    asked, points = load_study(source, _changes(set))
    workers = _workers(jobs, backend, scheduler)
    done = run_study(path_of(source), asked, points, _cache(cache), workers, _errors(progress))
    circumstances = watch.circumstances(simulated=done.simulated)
    return SweepResult(asked.name, _command("sweep", [source], set), plain_json(report(done)), circumstances, done)


def compare(
    scenarios: Sequence[Given],
    set: Overrides = None,
    *,
    base: Name = ".",
    replications: int = 5,
    metrics: Sequence[str] = (),
    jobs: int | None = None,
    backend: str = "loky",
    scheduler: str | None = None,
    cache: Name | None = CACHE,
    progress: bool = False,
) -> "CompareResult":
    """Compare scenarios on the same requests with the same luck. ``metrics``: figures of a summary, as
    request_latency.p90; none for those that matter most. The rest is as of ``sweep``.

    >>> one_tower = chat | {"name": "one-tower", "decoding": {"kind": "autoregressive"}}
    >>> compared = api.compare([chat, one_tower], replications=2, metrics=["request_latency.p90"], jobs=1)
    >>> compared.differences["scenario"].tolist()
    ['scenario-1', 'one-tower']
    """
    from twotower_sim.compare import compare_sides, load_sides
    from twotower_sim.compare_report import report
    from twotower_sim.outcomes import CompareResult
    from twotower_sim.result import Stopwatch, plain_json

    _within("replications", replications, 1, 10_000)
    watch, sources = Stopwatch(), _sources(scenarios, base)
    sides = load_sides(sources, _changes(set))
    workers = _workers(jobs, backend, scheduler)
    done = compare_sides(sides, replications, list(metrics), _cache(cache), workers, _errors(progress))
    names, circumstances = [side.name for side in sides], watch.circumstances(simulated=done.simulated)
    command = _command("compare", sources, set, replications=[replications], metric=metrics)
    return CompareResult(names, command, plain_json(report(done)), circumstances, done)


def plan(
    plan: Given,
    set: Overrides = None,
    *,
    base: Name = ".",
    jobs: int | None = None,
    backend: str = "loky",
    scheduler: str | None = None,
    cache: Name | None = CACHE,
    progress: bool = False,
) -> "PlanResult":
    """Find the least costly deployment that meets objectives. The rest is as of ``sweep``.

    >>> asked = {"scenario": chat, "objectives": {"request_latency.p90": 60000}, "replications": 1, "margin": False}
    >>> api.plan(asked | {"choices": {"deployment.gpu": ["h100-sxm", "h200"]}}, jobs=1).met
    True
    """
    from twotower_sim.outcomes import PlanResult
    from twotower_sim.plan_report import report
    from twotower_sim.planner import Planner
    from twotower_sim.result import Stopwatch, plain_json

    watch, source = Stopwatch(), _source(plan, base, "plan")
    workers = _workers(jobs, backend, scheduler)
    done = Planner(source, _changes(set), _cache(cache), workers, _errors(progress)).solve()
    command, told = _command("plan", [source], set), plain_json(report(done))
    return PlanResult(done.asked.name, done.sentence, told["met"], command, told, watch.circumstances(), done)


def check(scenario: Given, set: Overrides = None, *, base: Name = ".") -> "Resolved":
    """Read a scenario and everything it names, without running it: what it resolves to.

    >>> api.check("scenarios/quickstart.yaml", {"deployment.replicas": 3}).gpus
    6
    """
    from twotower_sim.report import resolved

    return resolved(_source(scenario, base, "scenario"), _changes(set))


def schema(of: Literal["scenario", "study", "plan"] = "scenario") -> dict[str, Any]:
    """The JSON Schema of files that say scenarios, studies or plans.

    >>> api.schema()["title"]
    'Scenario'
    """
    from twotower_sim.schema import FILES, schema_of

    if of not in FILES:
        raise InputError(f"--of: found {of!r:.99}; allowed: {', '.join(FILES)}")
    return schema_of(of)


# ---------------------------------------------------------------------- traces

OnError = Literal["fail", "skip"]
TimeUnit = Literal["s", "ms", "us", "ns", "iso"]
Columns = Mapping[str, str] | None
"""Of a file in no known format, the name of the column of a field: arrival, input_tokens, output_tokens, first_token,
finish, session."""


def trace_list() -> "TraceList":
    """Public traces, shipped fingerprints, and the formats that are read.

    >>> api.trace_list().fingerprints
    ['azure-conversation-2023', 'mooncake-conversation']
    """
    from twotower_sim.outcomes import TraceList
    from twotower_sim.trace.catalogue import catalogue

    of = catalogue()
    return TraceList(of.public.frame(), of.folder, of.there, of.fingerprints, of.formats.frame())


def trace_fetch(
    names: str | Sequence[str],
    *,
    to: Name | None = None,
    mirror: str | None = None,
    force: bool = False,
    progress: bool = False,
) -> dict[str, Path]:
    """Download public traces into the folder ``to`` (default: traces/downloads), checked by their hashes; gives their
    files by name. What is there already is not fetched again, unless ``force``. ``mirror``: where files of these names
    lie, instead of GitHub.

    >>> api.trace_fetch("azure-conversation-2023")  # doctest: +SKIP
    {'azure-conversation-2023': PosixPath('traces/downloads/azure-conversation-2023.csv')}
    """
    from twotower_sim.trace.fetch import fetched

    folder, asked = None if to is None else Path(to), [names] if isinstance(names, str) else _several("names", names)
    return {of.trace.name: of.file for of in fetched(asked, folder, mirror, force, _errors(progress))}


def trace_describe(
    file: Name,
    *,
    format: str = "auto",
    columns: Columns = None,
    time_unit: TimeUnit | None = None,
    on_error: OnError = "fail",
) -> "TraceDescription":
    """What a trace is like: rates, bursts, lengths, shared prefixes, sessions, and what looks odd.

    >>> api.trace_describe("out/drawn.csv").format
    'azure'
    """
    from twotower_sim.outcomes import TraceDescription
    from twotower_sim.readers import read_trace
    from twotower_sim.trace.stats import describe
    from twotower_sim.workload import skipped

    path, of = Path(file), _format(format, columns, time_unit, on_error)
    trace = read_trace(path, of, on_error)
    return TraceDescription(path, trace.format, skipped(trace), describe(trace), trace)


def trace_convert(
    file: Name,
    out: Name,
    *,
    format: str = "auto",
    columns: Columns = None,
    time_unit: TimeUnit | None = None,
    on_error: OnError = "fail",
    limit: int | None = None,
    window: tuple[float, float] | None = None,
) -> "Converted":
    """Write a trace, or a part of it, to ``out`` as its ending says: .jsonl (Mooncake), .csv (Azure), both also .gz or
    .zst, or .parquet. ``limit``: the first so many requests; ``window``: seconds from the trace's start, [from, to).

    >>> api.trace_convert("out/drawn.csv", "out/part.jsonl", limit=10).requests
    10
    """
    from twotower_sim.trace.convert import converted

    _within("limit", limit, 1)
    of = _format(format, columns, time_unit, on_error)
    return converted(Path(file), Path(out), of, on_error, limit, window)


def trace_fingerprint(
    file: Name,
    out: Name,
    *,
    format: str = "auto",
    columns: Columns = None,
    time_unit: TimeUnit | None = None,
    on_error: OnError = "fail",
    check: bool = False,
    plot: Name | None = None,
) -> "FingerprintResult":
    """Measure figures of a trace, from which ones like it can be drawn, and write them to ``out`` (YAML). ``check``:
    draw one, compare, and draw both to ``plot`` (.html, .png or .svg).

    >>> api.trace_fingerprint("out/drawn.csv", "out/mine.yaml").requests
    2000
    """
    from twotower_sim.outcomes import FingerprintResult
    from twotower_sim.tables import Sheet
    from twotower_sim.trace.fingerprint import fingerprinted

    picture = None if plot is None else Path(plot)
    done = fingerprinted(Path(file), Path(out), _format(format, columns, time_unit, on_error), on_error, check, picture)
    figures = [[of.name, of.source, of.drawn, of.off] for of in done.comparison.figures] if done.comparison else None
    frame = None if figures is None else Sheet(["figure", "trace", "drawn", "off"], figures).frame()
    return FingerprintResult(done.fingerprint, done.requests, frame)


def trace_sample(
    fingerprint: Name, out: Name, requests: int, *, rate_scale: float = 1.0, seed: int = 0
) -> "TraceSample":
    """Draw a trace from a fingerprint (a file, or the name of a shipped one) and write it as ``trace_convert`` does.
    ``rate_scale``: times the rate at every moment.

    >>> len(api.trace_sample("azure-conversation-2023", "out/drawn.csv", 2000).requests)
    2000
    """
    from twotower_sim.outcomes import TraceSample, trace_frame
    from twotower_sim.trace.fingerprint import sampled

    _within("requests", requests, 1)
    _within("seed", seed, 0, 2**64 - 1)
    drawn = sampled(str(fingerprint), Path(out), requests, rate_scale, seed)
    return TraceSample(trace_frame(drawn.requests), drawn.lost)


# ---------------------------------------------------------------------- profiles


def profile_show(profile: Name) -> "ProfileResult":
    """What a profile holds (a file, or the name of a shipped one).

    >>> api.profile_show("reports/tiny-cpu.profile.json.gz").passes["pass"].tolist()[:2]
    ['denoise', 'extend']
    """
    from twotower_sim.outcomes import ProfileResult
    from twotower_sim.profile import load_profile
    from twotower_sim.profile_report import commits, passes

    found = load_profile(str(profile))
    return ProfileResult(str(profile), passes(found).frame(), commits(found).frame(), found)


def profile_check(profile: Name) -> "ProfileCheck":
    """What limits the use of a profile: its reach, its noise, its age.

    >>> api.profile_check("reports/tiny-cpu.profile.json.gz").warnings  # doctest: +SKIP
    """
    from twotower_sim.outcomes import ProfileCheck
    from twotower_sim.profile import load_profile
    from twotower_sim.profile_report import doubts, facts, passes

    found = load_profile(str(profile))
    return ProfileCheck(list(facts(found)), list(doubts(found)), passes(found).frame())


def profile_compare(first: Name, second: Name) -> "ProfileComparison":
    """Ratios of times at common points, and tokens per step.

    >>> same = api.profile_compare("reports/tiny-cpu.profile.json.gz", "reports/tiny-cpu.profile.json.gz")
    >>> set(same.times["median"])
    {1.0}
    """
    from twotower_sim.outcomes import ProfileComparison
    from twotower_sim.profile import load_profile
    from twotower_sim.profile_report import ratios, tokens_beside

    both = load_profile(str(first)), load_profile(str(second))
    return ProfileComparison(ratios(*both).frame(), tokens_beside(*both).frame())


def profile_merge(out: Name, profiles: Sequence[Name]) -> "Profile":
    """Write several profiles as one to ``out``, packed if it ends in .gz. They must not contradict each other.

    >>> merged = api.profile_merge("out/merged.json.gz", ["reports/tiny-cpu.profile.json.gz"])
    """
    from twotower_sim.profile_merge import merge_profiles

    return merge_profiles(Path(out), [str(of) for of in _several("profiles", profiles)])


# ---------------------------------------------------------------------- the real thing


def validate(
    scenarios: Sequence[Given],
    set: Overrides = None,
    *,
    base: Name = ".",
    repetitions: int = 5,
    goal: float = 0.12,
    profile: Name | None = None,
    model: Name | None = None,
    devices: str | None = None,
    prompts: Name | None = None,
    threads: int = 1,
    progress: bool = False,
) -> "ValidationResult":
    """Predict scenarios, run them for real on this machine, and find how far the predictions are off. ``goal``: error
    that is fine; ``profile``: predict from it, else calibrate between runs; ``model``: checkpoint to run, else the
    scenario's; ``devices``: cpu or cuda:0; ``prompts``: JSONL of {class, prompt}; ``threads``: of torch on a CPU.

    >>> found = api.validate(["scenarios/validate_tiny.yaml"])  # doctest: +SKIP
    >>> found.errors.query("figure == 'request_latency.p50'")  # doctest: +SKIP
    """
    from twotower_sim.outcomes import ValidationResult
    from twotower_sim.result import plain_json
    from twotower_sim.validation_report import as_json, markdown

    with needing("validate", "calibrate"):
        from calibrate.validation import ask_for, found_for

    _within("repetitions", repetitions, 3)
    _within("goal", goal, 0)
    _within("threads", threads, 1)
    sources = _sources(scenarios, base)
    command = shlex.join(_command("validate", sources, set))
    questions = [ask_for(source, _changes(set)) for source in sources]
    given, texts = (None if of is None else Path(of) for of in (profile, prompts))
    checkpoint = None if model is None else str(model)
    found = found_for(
        questions, repetitions, given, checkpoint, devices, texts, threads, goal, command, _errors(progress)
    )
    return ValidationResult(command, plain_json(as_json(found)), markdown(found), found)


def validate_log(
    log: Name,
    scenario: Given | None = None,
    set: Overrides = None,
    *,
    base: Name = ".",
    share: float = 0.5,
    goal: float = 0.05,
    progress: bool = False,
) -> "LogResult":
    """Fit the first ``share`` of the requests in a log of any engine, under the rules of its ``scenario``, and predict
    the rest. ``goal``: error that is fine.

    >>> api.run("scenarios/quickstart.yaml", {"workload.requests": 300}).save("out/quick")
    >>> api.validate_log("out/quick/requests.csv.gz", "scenarios/quickstart.yaml").figures  # doctest: +SKIP
    """
    from twotower_sim.log_report import PLAIN, as_json, fitted, warnings
    from twotower_sim.outcomes import LogResult
    from twotower_sim.readers.log import read_log
    from twotower_sim.result import plain_json
    from twotower_sim.scenario import load_scenario
    from twotower_sim.yaml_file import path_of

    _within("share", share, 0.05, 0.95)
    _within("goal", goal, 0)
    source = PLAIN if scenario is None else _source(scenario, base, "scenario")
    asked, read = load_scenario(source, _changes(set)), read_log(Path(log))
    found = fitted(read, asked, path_of(source).parent, share, goal, _errors(progress))
    return LogResult(found.verdict, warnings(found, read), plain_json(as_json(found, read, asked, share)), found)


def calibrate(
    out: Name,
    *,
    dry_run: bool = False,
    assume: str | None = None,
    threads: int = 1,
    progress: bool = False,
    **settings: Any,
) -> "CalibrationResult":
    """Measure a profile on this machine's device and write it to ``out``. ``dry_run``: only say what it would take;
    ``assume``: on this GPU preset or file instead; ``threads``: of torch on a CPU. ``settings``: fields of
    calibrate.calibration.Settings, which are the options of ``calibrate --help`` with lists where these take several.

    >>> done = api.calibrate("tiny.profile.json.gz", batch=[1, 4], only="latency")  # doctest: +SKIP
    """
    from twotower_sim.outcomes import CalibrationResult

    with needing("calibrate", "calibrate"):
        from calibrate import machine
        from calibrate.calibration import Calibration, Settings

    _within("threads", threads, 1)
    files = {key: Path(settings[key]) for key in ("prompts", "tasks") if settings.get(key) is not None}
    asked = Settings(Path(out), **(settings | files))
    with machine.threads(threads):
        calibration = Calibration(asked, assume)
        estimate = calibration.estimate()
        profile = None if dry_run or assume else calibration.run(_errors(progress))
    return CalibrationResult(estimate, profile)


# ---------------------------------------------------------------------- what is given


def _source(given: Given, base: Name, what: str) -> "Source":
    from twotower_sim.yaml_file import Document

    if isinstance(given, str | PathLike):
        return Path(given)
    if not isinstance(given, Mapping):
        raise InputError(f"<{what}>: found {given!r:.99}; expected the path of a file, or a mapping")
    return Document.of_data(Path(base) / f"<{what}>", given)


def _sources(given: Sequence[Given], base: Name) -> "list[Source]":
    return [_source(of, base, f"scenario-{i}") for i, of in enumerate(_several("scenarios", given), 1)]


def _several(name: str, given: Sequence[Any]) -> Sequence[Any]:
    if isinstance(given, str | PathLike | Mapping) or not given:
        raise InputError(f"{name}: found {given!r:.99}; expected a list of one or more")
    return given


def _changes(set: Overrides) -> "list[Setting]":
    from twotower_sim.study import settings_of
    from twotower_sim.yaml_file import Document

    document = Document.of_data(Path("<set>"), set or {})
    return settings_of(document.data, document)


def _command(name: str, sources: "Sequence[Source]", set: Overrides, **options: Sequence[Any]) -> list[str]:
    """The words of the command that does the same; of a mapping they name the file that would hold it."""
    from twotower_sim.yaml_file import path_of

    words = ["twotower-sim", name, *(str(path_of(source)) for source in sources)]
    for change in _changes(set):
        words += ["--set", f"{change.key}={json.dumps(change.value)}"]
    for option, values in options.items():
        words += [word for value in values for word in (f"--{option}", str(value))]
    return words


def _format(name: str, columns: Columns, time_unit: str | None, on_error: str) -> "Format":
    from twotower_sim.trace.format import format_of

    for option, found, allowed in (("--on-error", on_error, OnError), ("--time-unit", time_unit, TimeUnit)):
        if found is not None and found not in get_args(allowed):
            raise InputError(f"{option}: found {found!r:.99}; allowed: {', '.join(get_args(allowed))}")
    return format_of(name, columns or {}, time_unit)  # type: ignore[arg-type]  # just checked


def _within(name: str, value: float | None, least: float, most: float | None = None) -> None:
    if value is not None and not (least <= value and (most is None or value <= most)):
        bound = "" if most is None else f" to {most:g}"
        raise InputError(f"{name}: found {value:g}; expected {least:g}{bound or ' or more'}")


def _workers(jobs: int | None, backend: str, scheduler: str | None) -> "Workers":
    from twotower_sim.workers import Workers

    _within("jobs", jobs, 1)
    return Workers(jobs, backend, scheduler)


def _cache(folder: Name | None) -> ResultCache:
    return ResultCache(None if folder is None else Path(folder))


def _errors(progress: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=True, quiet=not progress)
