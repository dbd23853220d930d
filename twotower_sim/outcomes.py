"""What functions of the API return: figures as plain data and as DataFrames, and the files that the command writes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower_sim.pairs_plot import check_plot
from twotower_sim.result import all_or_nothing, requests_frame, write_json

if TYPE_CHECKING:
    import pandas

    from twotower_sim.compare import Compared
    from twotower_sim.fingerprint import Fingerprint
    from twotower_sim.log_fit import LogValidation
    from twotower_sim.metrics import Results
    from twotower_sim.planner import Plan
    from twotower_sim.profile import Profile
    from twotower_sim.readers import Trace
    from twotower_sim.requests import Requests
    from twotower_sim.simulation import Observer, Run
    from twotower_sim.sweep import Sweep
    from twotower_sim.trace.stats import TraceStats
    from twotower_sim.validation_report import Report

Name = str | PathLike[str]


@contextmanager
def _staged(name: Name) -> Iterator[Path]:
    """Where to write a file, so that it appears once it is whole."""
    with all_or_nothing() as stage:
        yield stage(Path(name))


@contextmanager
def _page(name: Name) -> Iterator[Path]:
    from twotower_sim.html_page import check_html

    check_html("html")
    with _staged(name) as file:
        yield file


@contextmanager
def _picture(name: Name) -> Iterator[tuple[Path, str]]:
    """Where to draw, and the suffix that says how."""
    check_plot(Path(name))
    with _staged(name) as file:
        yield file, Path(name).suffix


def _save(folder: Name, names: tuple[str, ...], write: Callable[[list[Path]], Any], run: dict[str, Any] | None) -> None:
    """Files of these names, and ``run`` as run.json, all at once."""
    with all_or_nothing() as stage:
        write([stage(Path(folder) / name) for name in names])
        if run is not None:
            write_json(stage(Path(folder) / "run.json"), run)


# ---------------------------------------------------------------------- simulations


@dataclass(frozen=True, eq=False)
class RunResult:
    """``summary``: what summary.json says. ``command``: the command that gives the same."""

    name: str
    command: list[str]
    summary: dict[str, Any] = field(repr=False)
    circumstances: dict[str, Any] = field(repr=False)
    run: "Run" = field(repr=False)
    results: "Results" = field(repr=False)

    @property
    def metrics(self) -> "pandas.DataFrame":
        """A row a metric, by its name; float64 columns avg, min, max, p99, p90, p75, p50 and std, NaN where there is no
        such figure. Latencies are in milliseconds."""
        import pandas

        from twotower_sim.console import COLUMNS

        frame = pandas.DataFrame.from_dict(self.summary["metrics"], orient="index").reindex(columns=COLUMNS)
        return frame.astype(float).rename_axis("metric")

    @property
    def requests(self) -> "pandas.DataFrame":
        """A row a request, as in requests.csv.gz: request_id; arrival_s, admit_s, first_token_s and finish_s (float64,
        NaN where there is none); input_tokens, output_tokens, replica, nfe, blocks and preemptions (int64); measured
        (bool)."""
        return requests_frame(self.results.columns)

    def save(self, folder: Name) -> None:
        """Write summary.json, requests.csv.gz and run.json. Raises InputError."""
        from twotower_sim.report import FILES, write_run

        _save(folder, FILES, lambda files: write_run(files, self.summary, self.results.columns), self.circumstances)

    def html(self, file: Name) -> None:
        """Write the page for browsers, for which the run is simulated again. Raises InputError."""
        from twotower_sim.html_report import write_html
        from twotower_sim.usage import Usage

        usage = Usage()
        with _page(file) as page:
            write_html(page, self._again(usage.observe), self.results, self.summary, usage, self.command)

    def timeline(self, file: Name) -> None:
        """Write a Chrome/Perfetto trace, for which the run is simulated again. Raises InputError."""
        from twotower_sim.timeline import Timeline

        recorder = Timeline(self.run)
        with _staged(file) as trace:
            recorder.write(trace, self._again(recorder.observe), self.results)

    def _again(self, observe: "Observer") -> "Run":
        from twotower_sim.simulation import simulate

        return simulate(replace(self.run, warnings=[]), observe)


@dataclass(frozen=True, eq=False)
class SweepResult:
    """``report``: what sweep.json says."""

    name: str
    command: list[str]
    report: dict[str, Any] = field(repr=False)
    circumstances: dict[str, Any] = field(repr=False)
    sweep: "Sweep" = field(repr=False)

    @property
    def points(self) -> "pandas.DataFrame":
        """A row a replication of a point, as in points.csv: point, the keys that vary, replication, seed, the metrics
        (float64), saturation and error."""
        return self.sweep.runs.frame()

    @property
    def estimates(self) -> "pandas.DataFrame":
        """A row a metric of a point, as in summary.csv: point, the keys that vary, metric, n, and mean, std, low and
        high (float64), the last two of the 95 % interval."""
        return self.sweep.summary.frame()

    def save(self, folder: Name) -> None:
        """Write points.csv, summary.csv, sweep.json and run.json. Raises InputError."""
        from twotower_sim.sweep_report import FILES, write_sweep

        _save(folder, FILES, lambda files: write_sweep(files, self.sweep), self.circumstances)

    def html(self, file: Name) -> None:
        """Write the page for browsers, for which one run is simulated again. Raises InputError."""
        from twotower_sim.sweep_page import write_sweep_page

        with _page(file) as page:
            write_sweep_page(page, self.report, self.sweep.points, self.command)


@dataclass(frozen=True, eq=False)
class CompareResult:
    """``report``: what compare.json says."""

    scenarios: list[str]
    command: list[str]
    report: dict[str, Any] = field(repr=False)
    circumstances: dict[str, Any] = field(repr=False)
    compared: "Compared" = field(repr=False)

    @property
    def differences(self) -> "pandas.DataFrame":
        """A row a metric of a scenario: scenario, metric, its mean, and the difference to the first scenario, low and
        high of its 95 % interval, ratio of the means (all float64), and whether the interval contains 0."""
        return self.compared.differences.frame()

    def save(self, folder: Name) -> None:
        """Write compare.json and run.json. Raises InputError."""
        _save(folder, ("compare.json",), lambda files: write_json(files[0], self.report), self.circumstances)

    def html(self, file: Name) -> None:
        """Write the page for browsers, for which a run of each scenario is simulated again. Raises InputError."""
        from twotower_sim.compare_page import write_compare_page

        with _page(file) as page:
            write_compare_page(page, self.report, {of.name: of.runs[0] for of in self.compared.sides}, self.command)


@dataclass(frozen=True, eq=False)
class PlanResult:
    """``answer``: in a sentence; ``met``: whether a deployment is known to meet all objectives, in a load that is long
    enough to tell; ``report``: what plan.json says."""

    name: str
    answer: str
    met: bool
    command: list[str]
    report: dict[str, Any] = field(repr=False)
    circumstances: dict[str, Any] = field(repr=False)
    plan: "Plan" = field(repr=False)

    @property
    def candidates(self) -> "pandas.DataFrame":
        """A row a candidate, the least costly first, as in candidates.csv: candidate, its fewest replicas, gpus,
        usd_per_hour and worst_share_of_bound (float64, NaN of those that were given up), and given_up, why."""
        return self.plan.candidates.frame()

    @property
    def trials(self) -> "pandas.DataFrame":
        """A row a trial, as in trials.csv: candidate, replicas, usd_per_hour, saturation, whether it meets, and the
        objectives' figures (float64)."""
        return self.plan.trials.frame()

    def save(self, folder: Name) -> None:
        """Write plan.json, candidates.csv, trials.csv and run.json. Raises InputError."""
        from twotower_sim.plan_report import FILES, write_plan

        _save(folder, FILES, lambda files: write_plan(files, self.plan), self.circumstances)

    def html(self, file: Name) -> None:
        """Write the page for browsers, for which a run of the answer is simulated again. Raises InputError."""
        from twotower_sim.plan_page import write_plan_page

        with _page(file) as page:
            write_plan_page(page, self.report, self.plan.experiment, self.command)


# ---------------------------------------------------------------------- traces


@dataclass(frozen=True)
class TraceList:
    """``public``: name, requests, span_s, licence and repository of traces that can be fetched, into ``folder``;
    ``there``: names of those that were; ``fingerprints``: names of those that ship; ``formats``: name and what."""

    public: "pandas.DataFrame"
    folder: Path
    there: list[str]
    fingerprints: list[str]
    formats: "pandas.DataFrame"


def trace_frame(of: "Requests") -> "pandas.DataFrame":
    """A row a request: arrival_s (float64), input_tokens, output_tokens and, where a trace has it, session (int64)."""
    import pandas

    columns = {"arrival_s": of.arrival_ns / 1e9, "input_tokens": of.input_tokens, "output_tokens": of.output_tokens}
    return pandas.DataFrame(columns | ({} if of.sessions is None else {"session": of.sessions}))


@dataclass(frozen=True, eq=False)
class TraceDescription:
    """``stats``: rates, bursts, lengths, prefixes and sessions, and ``stats.oddities``; ``skipped``: rows that were."""

    file: Path
    format: str
    skipped: list[str]
    stats: "TraceStats"
    trace: "Trace" = field(repr=False)

    @property
    def requests(self) -> "pandas.DataFrame":
        """A row a request: arrival_s (float64), input_tokens, output_tokens and, if there are any, session (int64)."""
        return trace_frame(self.trace.requests)

    @property
    def lengths(self) -> "pandas.DataFrame":
        """Rows input and output; float64 columns mean, p1, p10, p50, p90, p99 and max, in tokens."""
        import pandas

        from twotower_sim.trace.stats import QUANTILES

        rows = {"input": self.stats.input_tokens, "output": self.stats.output_tokens}
        columns = ["mean", *(f"p{q}" for q in QUANTILES[:-1]), "max"]
        return pandas.DataFrame([[of.mean, *of.quantiles] for of in rows.values()], list(rows), columns)

    def plot(self, file: Name) -> None:
        """Draw it to a .html, .png or .svg file. Raises InputError."""
        from twotower_sim.trace.plot import plot_trace

        with _picture(file) as picture:
            plot_trace(self.trace, self.file.name, *picture)


@dataclass(frozen=True)
class FingerprintResult:
    """Of how many ``requests``; ``check``, if it was asked for: figures of the trace and of one that was drawn (figure,
    trace, drawn, and off, the relative difference)."""

    fingerprint: "Fingerprint" = field(repr=False)
    requests: int
    check: "pandas.DataFrame | None"


@dataclass(frozen=True)
class TraceSample:
    """``requests``: a row each (arrival_s, input_tokens, output_tokens, and session if there are any); ``lost``: what
    the file cannot hold of them."""

    requests: "pandas.DataFrame"
    lost: list[str]


# ---------------------------------------------------------------------- profiles


@dataclass(frozen=True, eq=False)
class ProfileResult:
    """``passes``: pass, axes, measured of how many points, fastest_ms, slowest_ms and p20_to_p80; ``commits``: class,
    gamma, steps_per_block, tokens_per_step, source, score, bits_per_byte and autoregressive_bits_per_byte."""

    name: str
    passes: "pandas.DataFrame" = field(repr=False)
    commits: "pandas.DataFrame" = field(repr=False)
    profile: "Profile" = field(repr=False)

    def plot(self, file: Name) -> None:
        """Draw it to a .html, .png or .svg file. Raises InputError."""
        from twotower_sim.profile_plot import plot_profile

        plot_profile(self.name, Path(file))


@dataclass(frozen=True)
class ProfileCheck:
    """``facts``: where it is from; ``warnings``: what limits its use; ``passes``: as of ProfileResult."""

    facts: list[str]
    warnings: list[str]
    passes: "pandas.DataFrame" = field(repr=False)


@dataclass(frozen=True)
class ProfileComparison:
    """``times``: pass, points, and median, least and most of the second's times relative to the first's; ``tokens``:
    class, gamma, steps_per_block, and tokens per step of first and second."""

    times: "pandas.DataFrame"
    tokens: "pandas.DataFrame"


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """``estimate``: what it takes, in lines; ``profile``: None of a dry run."""

    estimate: list[str]
    profile: "Profile | None" = field(repr=False)


# ---------------------------------------------------------------------- validation


@dataclass(frozen=True, eq=False)
class ValidationResult:
    """Of real runs. ``report``: what fidelity.json says; ``markdown``: report.md."""

    command: str
    report: dict[str, Any] = field(repr=False)
    markdown: str = field(repr=False)
    found: "Report" = field(repr=False)

    @property
    def errors(self) -> "pandas.DataFrame":
        """A row a figure of a prediction of a scenario: scenario, prediction (recorded_commits, drawn_commits or
        beforehand), figure, and the median, least and largest error (float64), predicted / measured - 1."""
        import pandas

        rows = [
            [scenario["name"], prediction, figure, error["middle"], error["low"], error["high"]]
            for scenario in self.report["scenarios"]
            for prediction in ("recorded_commits", "drawn_commits", "beforehand")
            for figure, error in scenario[prediction]["errors"].items()
        ]
        return pandas.DataFrame(rows, columns=["scenario", "prediction", "figure", "error", "low", "high"])

    def save(self, folder: Name) -> None:
        """Write report.md, fidelity.json, profile.json.gz and runs.json.gz. Raises InputError."""
        from calibrate.validation import FILES, write_found

        _save(folder, FILES, lambda files: write_found(files, self.found), None)

    def plot(self, file: Name) -> None:
        """Draw predicted against measured to a .html, .png or .svg file. Raises InputError."""
        from twotower_sim.pairs_plot import plot_pairs
        from twotower_sim.validation_report import panels

        with _picture(file) as picture:
            plot_pairs(panels(self.found), *picture)


@dataclass(frozen=True, eq=False)
class LogResult:
    """Of a log. ``report``: what log_validation.json says."""

    verdict: str
    warnings: list[str]
    report: dict[str, Any] = field(repr=False)
    found: "LogValidation" = field(repr=False)

    @property
    def figures(self) -> "pandas.DataFrame":
        """A row a figure of the requests that were not fitted, by its name; float64 columns measured, predicted, error
        (predicted / measured - 1), low and high of its 95 % interval, and error_in_the_fit."""
        import pandas

        rows = {
            name: {"measured": of.measured, "predicted": of.predicted, "error": of.error}
            | dict(zip(("low", "high"), of.interval or (None, None), strict=True))
            | {"error_in_the_fit": self.found.fitted[name].error if name in self.found.fitted else None}
            for name, of in self.found.held_out.items()
        }
        return pandas.DataFrame.from_dict(rows, orient="index").astype(float).rename_axis("figure")

    @property
    def coefficients(self) -> "pandas.DataFrame":
        """A row a fitted cost, by its name: value, relative_standard_error (float64, NaN where it is unbounded) and
        not_identified, why, or None."""
        import pandas

        return pandas.DataFrame.from_dict(self.report["coefficients"], orient="index").rename_axis("coefficient")

    def save(self, folder: Name) -> None:
        """Write log_validation.json. Raises InputError."""
        from twotower_sim.log_report import FILE

        _save(folder, (FILE,), lambda files: write_json(files[0], self.report), None)

    def plot(self, file: Name) -> None:
        """Draw predicted against measured to a .html, .png or .svg file. Raises InputError."""
        from twotower_sim.log_report import panels
        from twotower_sim.pairs_plot import plot_pairs

        with _picture(file) as picture:
            plot_pairs(panels(self.found), *picture)
