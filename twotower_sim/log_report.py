"""``validate --log``: from a log file to what a fit to one part of it predicts of the rest."""

from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from twotower_sim.console import TITLES
from twotower_sim.log_fit import CONFIDENCE, Compared, LogValidation, validate
from twotower_sim.measurements import Measurements, metrics
from twotower_sim.pairs_plot import Panel, check_plot, plot_pairs
from twotower_sim.preset import ROOT
from twotower_sim.readers.log import Log, read_log
from twotower_sim.records import NOT_YET
from twotower_sim.result import all_or_nothing, write_json
from twotower_sim.scenario import Scenario, load_scenario

PLAIN = ROOT / "scenarios" / "log.yaml"
FILE = "log_validation.json"
WIDTH = 110  # columns that the table needs, also where the output is a file
SHOWN = (
    "time_to_first_token.avg",
    "time_to_first_token.p90",
    "inter_token_latency.avg",
    "request_latency.p50",
    "request_latency.p90",
    "request_latency.p99",
    "output_token_throughput.avg",
)


def validate_log(
    log: Path, scenario: Path | None, overrides: list[str], out: Path, share: float, goal: float, plot: Path | None
) -> None:
    """Fit the first ``share`` of a log's requests, predict the rest; print it, and write ``out``/log_validation.json
    and the picture, all at once. Raises InputError."""
    if plot:
        check_plot(plot)
    path = scenario or PLAIN
    asked, read = load_scenario(path, overrides), read_log(log)
    with all_or_nothing() as stage:
        data, picture = stage(out / FILE), stage(plot) if plot else None
        found = fitted(read, asked, path.parent, share, goal, Console(stderr=True))
        write_json(data, as_json(found, read, asked, share))
        if plot and picture:
            plot_pairs(panels(found), picture, plot.suffix)
    show(found, read, log, Console(width=max(WIDTH, Console().width)))
    print(f"Results     {out}/{FILE}" + (f"; {plot}" if plot else ""))


def fitted(read: Log, asked: Scenario, base: Path, share: float, goal: float, errors: Console) -> LogValidation:
    """Fit the first ``share`` of a log's requests under the rules of a scenario whose files are relative to ``base``,
    and predict the rest. Raises InputError."""
    with errors.status("fitting") as status:
        return validate(
            read.measurements, asked, base, share, goal, lambda n: status.update(f"fitting: {n} simulations")
        )


def show(found: LogValidation, read: Log, log: Path, console: Console) -> None:
    fitted, predicted = found.cut, len(found.measured) - found.cut
    lines = [f"Log         {log}: {read.format}, {fitted:,} requests fitted, {predicted:,} predicted{_skipped(read)}"]
    for name, cost, error in _costs(found):
        size = f"{error:.0%}" if isfinite(error) else "unbounded"
        lines.append(f"Fitted      {name} {cost:.4g}, standard error {size}")
    lines += [f"Warning     {warning}" for warning in warnings(found, read)]
    console.print(_table(found))
    for line in [*lines, f"Verdict     {found.verdict}"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(found: LogValidation) -> Table:
    table = Table(title="Held-out requests", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Metric", no_wrap=True)
    for name in ("measured", "predicted", "error", f"{CONFIDENCE:.0%} interval", "in the fit"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in SHOWN:
        if (of := found.held_out.get(name)) is None:
            continue
        metric, _, statistic = name.partition(".")
        interval = " to ".join(f"{end:+.1%}" for end in of.interval) if of.interval else ""
        where_fitted = f"{found.fitted[name].error:+.1%}" if name in found.fitted else ""
        figures = f"{of.measured:,.1f}", f"{of.predicted:,.1f}", f"{of.error:+.1%}"
        table.add_row(f"{TITLES[metric]} {statistic}", *figures, interval, where_fitted)
    return table


def warnings(found: LogValidation, read: Log) -> list[str]:
    out = list(found.warnings)
    if read.skipped:
        out.append(f"requests that are not replayed, though they were load too{_skipped(read)}")
    return out


def _skipped(read: Log) -> str:
    return "".join(f", {count:,} {why}" for why, count in read.skipped.items())


def _costs(found: LogValidation) -> list[tuple[str, float, float]]:
    """Name, value, relative standard error."""
    fit = found.fit
    return list(zip(fit.coefficients.names, np.exp(fit.x).tolist(), fit.standard_errors.tolist(), strict=True))


def panels(found: LogValidation) -> list[Panel]:
    """Of the held-out requests."""
    measured, predicted = (of.take(slice(found.cut, None)) for of in (found.measured, found.predicted))
    return [
        ("Time to First Token", "ms", 1e3 * measured.ttft_s, 1e3 * predicted.ttft_s),
        ("Request Latency", "ms", 1e3 * measured.latency_s, 1e3 * predicted.latency_s),
    ]


def as_json(found: LogValidation, read: Log, scenario: Scenario, share: float) -> dict[str, Any]:
    fit = found.fit
    return {
        "verdict": found.verdict,
        "goal": found.goal,
        "format": read.format,
        "skipped": read.skipped,
        "share": share,
        "requests": {"fitted": found.cut, "predicted": len(found.measured) - found.cut},
        "coefficients": {
            name: {
                "value": cost,
                "relative_standard_error": error if isfinite(error) else None,
                "not_identified": fit.unidentified.get(name),
            }
            for name, cost, error in _costs(found)
        },
        "fit": {
            "failures": fit.failures,
            "squared_error_in_reach": fit.in_reach,
            "rms_log_error": fit.rms,
            "variance_explained": fit.explained,
            "simulations": found.replays,
        },
        "figures": {"fitted": _figures(found.fitted), "predicted": _figures(found.held_out)},
        "measured": metrics(found.measured),
        "warnings": warnings(found, read),
        "scenario": scenario.model_dump(by_alias=True, exclude={"workload", "latency"}),
        "pairs": {
            "columns": ["measured_ttft_s", "predicted_ttft_s", "measured_latency_s", "predicted_latency_s"],
            "rows": _pairs(found.measured, found.predicted),
        },
    }


def _figures(of: dict[str, Compared]) -> dict[str, Any]:
    return {
        name: {"measured": one.measured, "predicted": one.predicted, "error": one.error, "interval": one.interval}
        for name, one in of.items()
    }


def _pairs(measured: Measurements, predicted: Measurements) -> list[list[float | None]]:
    """A row a request, in order of arrival."""
    known = (measured.first_ns != NOT_YET).tolist()
    columns = measured.ttft_s, predicted.ttft_s, measured.latency_s, predicted.latency_s
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [list(row) if first else [None, None, *row[2:]] for first, row in zip(known, rows, strict=True)]
