"""The page of a run: what was asked, the answer, figures, charts, sources, and the command that makes it again."""

from pathlib import Path
from typing import Any

from twotower_sim.html_page import page
from twotower_sim.metrics import Results
from twotower_sim.result import plain_json
from twotower_sim.run_charts import Watched, charts_of
from twotower_sim.simulation import Run
from twotower_sim.usage import Usage


def write_html(
    path: Path, run: Run, results: Results, figures: dict[str, Any], usage: Usage, command: list[str]
) -> None:
    """``figures``: the run's summary; ``command``: the words that made it."""
    data = plain_json(figures)
    charts = charts_of(Watched(run, results, usage))
    path.write_text(page("run.html", data, charts, command), encoding="utf-8")
