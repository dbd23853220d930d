"""The command line. Exit codes: 0 done, 2 bad input, 130 interrupted. Heavy imports wait until they are needed."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from twotower_sim.errors import InputError, needing
from twotower_sim.result_cache import CACHE
from twotower_sim.trace.cli import trace_app

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=(
    "Simulate deployments of Nemotron-TwoTower (block diffusion with two towers) and of its autoregressive baseline."
))  # fmt: skip
scenario_app = typer.Typer(no_args_is_help=True, help="Check scenario files.")
app.add_typer(scenario_app, name="scenario")
profile_app = typer.Typer(no_args_is_help=True, help="Look at profiles: measured latency, commits and routing.")
app.add_typer(profile_app, name="profile")
app.add_typer(trace_app, name="trace")

ProfileFile = Annotated[str, typer.Argument(metavar="PROFILE", help="A profile file, or the name of a shipped one.")]
ScenarioFile = Annotated[Path, typer.Argument(metavar="SCENARIO", help="A scenario file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of the scenario; may be repeated."),
]

StudyRuns = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Processes; one a core if not given.")]
Backend = Annotated[str, typer.Option(help="loky (this machine), or a cluster that is there: dask, ray.")]
Scheduler = Annotated[str | None, typer.Option(help="Address of the cluster's scheduler, as tcp://host:8786.")]
CacheFolder = Annotated[Path, typer.Option(help="Folder of results that need not be computed again.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Compute everything, and keep nothing.")]
Html = Annotated[Path | None, typer.Option(help="Also write a report for browsers to this file (HTML).")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@app.command()
def run(
    scenario: ScenarioFile,
    set: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; out/<name> if not given.")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Also write a Chrome/Perfetto trace to this file.")] = None,
    html: Html = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Replay a workload through a deployment; print and write what a capacity planner needs."""
    try:
        from twotower_sim.report import run_and_report

        run_and_report(scenario, set or [], out, timeline, html, quiet)
    except KeyboardInterrupt:
        print("Interrupted; earlier results are as they were.", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def sweep(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="A study file (YAML).")],
    set: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; out/<name> if not given.")] = None,
    html: Html = None,
    jobs: StudyRuns = None,
    backend: Backend = "loky",
    scheduler: Scheduler = None,
    cache: CacheFolder = CACHE,
    no_cache: NoCache = False,
    quiet: Quiet = False,
) -> None:
    """Vary a scenario by a design; runs that an earlier sweep made, or one that was interrupted, are not repeated."""
    from twotower_sim.result_cache import ResultCache
    from twotower_sim.sweep_report import sweep_and_report
    from twotower_sim.workers import Workers

    results = ResultCache(None if no_cache else cache)
    with _resumable(results.folder):
        sweep_and_report(study, set or [], out, results, Workers(jobs, backend, scheduler), quiet, html)


@app.command("compare")
def compare_scenarios(
    scenarios: Annotated[list[Path], typer.Argument(metavar="SCENARIO...", help="Two scenario files or more.")],
    set: Overrides = None,
    replications: Annotated[int, typer.Option(min=1, max=10_000, help="Runs of each, with a seed each.")] = 5,
    metric: Annotated[
        list[str] | None, typer.Option(help="Any figure of summary.json, as request_latency.p90; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; out/compare-<names> if not given.")] = None,
    html: Html = None,
    jobs: StudyRuns = None,
    backend: Backend = "loky",
    scheduler: Scheduler = None,
    cache: CacheFolder = CACHE,
    no_cache: NoCache = False,
    quiet: Quiet = False,
) -> None:
    """Compare scenarios on the same requests with the same luck: differences to the first, with intervals."""
    from twotower_sim.compare_report import compare_and_report
    from twotower_sim.result_cache import ResultCache
    from twotower_sim.workers import Workers

    results = ResultCache(None if no_cache else cache)
    with _resumable(results.folder):
        workers = Workers(jobs, backend, scheduler)
        compare_and_report(scenarios, set or [], replications, metric or [], out, results, workers, quiet, html)


@app.command()
def plan(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file (YAML).")],
    set: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; out/<name> if not given.")] = None,
    html: Html = None,
    jobs: StudyRuns = None,
    backend: Backend = "loky",
    scheduler: Scheduler = None,
    cache: CacheFolder = CACHE,
    no_cache: NoCache = False,
    quiet: Quiet = False,
) -> None:
    """Find the least costly deployment that meets objectives: fewest replicas of every candidate, and the margin."""
    from twotower_sim.plan_report import plan_and_report
    from twotower_sim.result_cache import ResultCache
    from twotower_sim.workers import Workers

    results = ResultCache(None if no_cache else cache)
    with _resumable(results.folder):
        plan_and_report(plan, set or [], out, results, Workers(jobs, backend, scheduler), quiet, html)


@contextmanager
def _resumable(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        kept = f"what was computed is in {folder}; the same command goes on from there" if folder else "nothing is kept"
        print(f"Interrupted; {kept}.", file=sys.stderr)
        raise typer.Exit(130) from None


@scenario_app.command()
def check(scenario: ScenarioFile, set: Overrides = None) -> None:
    """Read a scenario and everything it names, and say what it resolves to, without running it."""
    from twotower_sim.report import check_scenario

    check_scenario(scenario, set or [])


@scenario_app.command()
def schema(
    of: Annotated[Literal["scenario", "study", "plan"], typer.Option(help="What the files say.")] = "scenario",
) -> None:
    """Print the JSON Schema of scenario, study or plan files, for editors."""
    import json

    from twotower_sim.schema import schema_of

    typer.echo(json.dumps(schema_of(of), indent=2))


@profile_app.command()
def show(
    profile: ProfileFile,
    plot: Annotated[Path | None, typer.Option(help="Also draw it to this file (.html, .png or .svg).")] = None,
) -> None:
    """Print what a profile holds."""
    from twotower_sim.profile_report import show_profile

    show_profile(profile)
    if plot:
        from twotower_sim.profile_plot import plot_profile

        plot_profile(profile, plot)


@profile_app.command("check")
def check_profile_file(profile: ProfileFile) -> None:
    """Check a profile's form, and print what limits its use: its reach, its noise, its age."""
    from twotower_sim.profile_report import check_profile

    check_profile(profile)


@profile_app.command()
def compare(first: ProfileFile, second: ProfileFile) -> None:
    """Print ratios of times at common points, and tokens per step."""
    from twotower_sim.profile_report import compare_profiles

    compare_profiles(first, second)


@profile_app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; packed if it ends in .gz.")],
    profiles: Annotated[list[str], typer.Argument(metavar="PROFILE...", help="Files, or names of shipped profiles.")],
) -> None:
    """Write several profiles as one; what they contradict each other in is an error."""
    from twotower_sim.profile_merge import merge_profiles

    merge_profiles(out, profiles)
    print(f"{out}: written")


@app.command()
def validate(
    scenarios: Annotated[
        list[Path] | None, typer.Argument(metavar="[SCENARIO]...", help="Scenarios to run for real on this machine.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="Measurements of any engine: fit one part, predict the rest.")
    ] = None,
    set: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; out/validate-<name> if not given.")] = None,
    repetitions: Annotated[int | None, typer.Option(min=3, help="Real runs of each scenario; default: 5.")] = None,
    goal: Annotated[
        float | None, typer.Option(min=0, help="Error that is fine; default: 0.12, with --log 0.05.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Predict from this profile; else calibrate between runs.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint to run; default: the scenario's model.")] = None,
    devices: Annotated[str | None, typer.Option(help="cpu or cuda:0; default: the GPU, if there is one.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of {class, prompt}: half to fit, half to run.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on a CPU; default: 1.")] = None,
    share: Annotated[float | None, typer.Option(min=0.05, max=0.95, help="With --log: to fit; default: 0.5.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw predicted against measured (.html, .png, .svg).")] = None,
) -> None:
    """Predict real runs, and say how far the predictions are off."""
    real = {"repetitions": repetitions, "profile": profile, "model": model, "devices": devices, "prompts": prompts}
    real |= {"threads": threads}
    useless = [name for name, value in (real if log else {"share": share}).items() if value is not None]
    if useless:
        raise InputError(f"validate --{useless[0]}: has no effect {'with' if log else 'without'} --log")
    try:
        if log:
            from twotower_sim.log_report import validate_log

            out = out or Path("out") / f"validate-{log.name.split('.')[0]}"
            validate_log(log, _one_of(scenarios), set or [], out, share or 0.5, 0.05 if goal is None else goal, plot)
        elif not scenarios:
            raise InputError("validate: nothing to validate; name a scenario, or measurements with --log")
        else:
            validate_here = _real_engine()
            out, goal = out or Path("out") / f"validate-{scenarios[0].stem}", 0.12 if goal is None else goal
            of = profile, model, devices, prompts, threads or 1
            validate_here(scenarios, set or [], out, repetitions or 5, *of, goal, plot)
    except KeyboardInterrupt:
        print("Interrupted; earlier results are as they were.", file=sys.stderr)
        raise typer.Exit(130) from None


def _real_engine() -> Callable[..., None]:
    with needing("validate", "calibrate"):
        from calibrate.validation import validate
    return validate


def _one_of(scenarios: list[Path] | None) -> Path | None:
    """That of the engine behind a log."""
    if scenarios and len(scenarios) > 1:
        raise InputError(f"validate --log: found {len(scenarios)} scenarios; expected one at most, that of the engine")
    return scenarios[0] if scenarios else None


PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON)
def calibrate(context: typer.Context) -> None:
    """Measure a profile on this machine's device: python -m calibrate, with all arguments."""
    os.execv(sys.executable, [sys.executable, "-m", "calibrate", *context.args])


def main() -> None:
    try:
        app()
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print("Error: memory does not hold a run of this size; take fewer requests or a smaller model", file=sys.stderr)
        sys.exit(2)
