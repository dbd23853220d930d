"""Files of pages: written with all other results or not at all, and refused at once where they cannot be made."""

import json
import sys

import pytest
from conftest import ROOT
from pages import write
from typer.testing import CliRunner

from twotower_sim.cli import app, main

SHIPPED = {
    "run": ["scenarios/quickstart.yaml"],
    "sweep": ["scenarios/studies/batch_and_gamma.yaml"],
    "compare": ["scenarios/quickstart.yaml", "scenarios/speculative.yaml"],
    "plan": ["scenarios/plans/azure_conversation.yaml"],
}
SMALL = {"run": "one request", "sweep": "one that fails", "compare": "two towers and one", "plan": "missed"}
ALONE = ["--no-cache", "--jobs", "1"]
AGAIN = {
    "run": ["run", "asked.yaml"],
    "sweep": ["sweep", "study.yaml", *ALONE],
    "compare": ["compare", "side-a.yaml", "side-b.yaml", "--replications", "3", *ALONE],
    "plan": ["plan", "plan.yaml", *ALONE],
}
MODULES = {"run": "html_report", "sweep": "sweep_page", "compare": "compare_page", "plan": "plan_page"}
TRUTHS = {"run": "summary.json", "sweep": "sweep.json", "compare": "compare.json", "plan": "plan.json"}


@pytest.mark.parametrize("kind", SHIPPED)
@pytest.mark.parametrize("missing", ["jinja2", "altair", "vl_convert"])
def test_without_the_extra_it_is_refused_at_once(kind, missing, monkeypatch, capsys, tmp_path):
    asked = [kind, *(str(ROOT / path) for path in SHIPPED[kind]), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["twotower-sim", *asked, "--html", str(tmp_path / "page.html")])
    monkeypatch.setattr("twotower_sim.simulation.simulate", lambda *_: pytest.fail("it simulates"))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"Error: --html needs {missing}: pip install 'twotower-sim[plot]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", SMALL)
def test_it_is_written_with_all_results_or_not_at_all(kind, monkeypatch, tmp_path):
    path, _ = write(kind, SMALL[kind], tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    monkeypatch.chdir(tmp_path)
    again = [*AGAIN[kind], "--out", str(tmp_path), "--set", "seed=1", "--html"]
    for where in (tmp_path / "run.json", tmp_path, "/proc/nowhere/page.html"):
        assert CliRunner().invoke(app, [*again, str(where)]).exit_code != 0
    monkeypatch.setattr(
        f"twotower_sim.{MODULES[kind]}.page", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full"))
    )
    assert CliRunner().invoke(app, [*again, str(path)]).exit_code != 0
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


UNCHANGED = [("run", "two towers"), ("run", "autoregressive"), ("run", "pools"), *list(SMALL.items())[1:]]


@pytest.mark.parametrize(("kind", "name"), UNCHANGED)
def test_it_changes_no_result(kind, name, monkeypatch, tmp_path):
    (tmp_path / "plain").mkdir()
    _, data = write(kind, name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, [*AGAIN[kind], "--out", "plain", "-q"]).exit_code == 0
    assert json.loads((tmp_path / "plain" / TRUTHS[kind]).read_text()) == data
