"""Figures of a summary by dotted names: ``metrics.`` and a last ``.avg`` may be left out."""

from collections.abc import Iterable
from typing import Any

from twotower_sim.console import COLUMNS, TITLES
from twotower_sim.errors import InputError
from twotower_sim.yaml_file import did_you_mean

SECTIONS = ("metrics", "counts", "blocks", "utilisation", "memory", "cost", "quality", "classes", "saturation")
ALIKE = ("counts", "cost", "saturation")
"""Sections that hold the same names whatever the scenario."""
LATENCIES = tuple(name for name, title in TITLES.items() if title.endswith("(ms)"))
FELT = (*LATENCIES, "output_token_throughput_per_user", "goodput", "good_request_fraction")
"""Metrics that users feel. Of a run that is not STABLE, they depend on how long it is."""
YIELD = ("output_token_throughput", "output_token_throughput_per_gpu", "request_throughput")

Figures = dict[str, float | None]


def figures_of(summary: dict[str, Any]) -> Figures:
    """All of them by their whole names; None where a run has no such figure."""
    found: Figures = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                collect(f"{name}.{key}", part)
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            found[name] = value

    for section in SECTIONS:
        collect(section, summary[section])
    return found


def figure(figures: Figures, name: str) -> float | None:
    return next((figures[whole] for whole in _spellings(name) if whole in figures), None)


def is_felt(name: str) -> bool:
    return _metric(name) in FELT


def is_paid(name: str) -> bool:
    """Whether it says what a deployment costs, or yields."""
    return name.startswith("cost.") or _metric(name) in YIELD


def better(name: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither."""
    metric = _metric(name)
    if metric in LATENCIES or metric == "nfe_per_block" or name.startswith("cost."):
        return -1
    return int(metric in (*FELT, *YIELD, "tokens_per_nfe", "acceptance_length") or name.endswith(".retained"))


def _metric(name: str) -> str | None:
    """Of all requests or of a class of them."""
    return next((part for part in name.split(".") if part in TITLES), None)


def check_name(name: str) -> None:
    """Raises InputError for what no summary holds."""
    head, _, rest = name.removeprefix("metrics.").partition(".")
    if head in TITLES:
        if rest and rest not in COLUMNS:
            raise InputError(f"{name}: unknown; {head} has {', '.join(COLUMNS)}{did_you_mean(rest, COLUMNS)}")
    elif head not in SECTIONS or name.startswith("metrics."):
        known = [*TITLES, *SECTIONS[1:]]
        raise InputError(f"{name}: unknown metric{did_you_mean(head, known)}; allowed: {', '.join(known)}")


def check_names(names: Iterable[str], found: Figures, whole: bool) -> None:
    """Raises InputError for what is not among the figures of a run; where they are not the ``whole`` of what runs of a
    study have, for what is certain to be in none."""
    for name in names:
        if not any(spelling in found for spelling in _spellings(name)):
            head = name.partition(".")[0]
            if head in ALIKE or (whole and head in SECTIONS):
                inside = [key for key in found if key.startswith(f"{head}.")]
                raise InputError(
                    f"{name}: no run has it{did_you_mean(name, inside)}; {head} has {', '.join(inside) or 'nothing'}"
                )


def _spellings(name: str) -> list[str]:
    return [name, f"metrics.{name}", f"{name}.avg", f"metrics.{name}.avg"]
