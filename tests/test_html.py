"""The page of a run, in a real browser: what it says is what summary.json says, and everybody can read it."""

import json
import re
import sys

import numpy as np
import pytest
import yaml
from browser import chromium, prefer, show, wait_for
from conftest import AFFINE, ROOT, synthetic
from typer.testing import CliRunner

from twotower_sim.charts import over_time
from twotower_sim.cli import app, main
from twotower_sim.console import TITLES
from twotower_sim.html_page import page
from twotower_sim.replica import Round
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import prepare, simulate
from twotower_sim.usage import BINS, Usage

SLO = {"time_to_first_token_ms": 500, "request_latency_ms": 4000}
LOADED = {"workload": synthetic(requests=300, rate_rps=4), "slo": SLO}
MIX = {
    "kind": "mix",
    "parts": {
        "chat": {"share": 0.7, "workload": synthetic(requests=200)},
        "batch-work": {"share": 0.3, "slo": {"request_latency_ms": 9000}, "workload": synthetic(requests=100)},
    },
    "rate_rps": 5,
}
CLOSED = {"kind": "closed_loop", "requests": 40, "concurrency": 8} | {
    of: {"kind": "constant", "value": 64} for of in ("input_tokens", "output_tokens")
}
RUNS = {
    "two towers": LOADED,
    "overloaded": LOADED | {"workload": synthetic(requests=300, rate_rps=40), "scheduler": {"max_num_seqs": 8}},
    "classes": {"workload": MIX, "measurement": {"warm_up_s": 10}, "slo": SLO, "decoding": {"gamma_by_class": {"chat": 0.6}}},
    "autoregressive": {"workload": CLOSED, "decoding": {"kind": "autoregressive"}, "memory": {"prefix_cache": {"kind": "hybrid"}}},
    "pools": LOADED | {"deployment": {"placement": {"kind": "pools", "context": 1, "denoiser": 2}}},
    "one request": {"workload": synthetic(requests=1)},
}  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def write(sections: dict, folder):
    """The page of a run and its summary."""
    scenario = folder / "asked.yaml"
    scenario.write_text(yaml.safe_dump(sections))
    done = CliRunner().invoke(
        app, ["run", str(scenario), "--out", str(folder), "--html", str(folder / "page.html"), "-q"]
    )
    assert done.exit_code == 0, done.output
    return folder / "page.html", json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module", params=RUNS)
def shown(request, tmp_path_factory, browser):
    folder = tmp_path_factory.mktemp("run")
    path, summary = write(RUNS[request.param], folder)
    browser.get_log("browser")
    show(browser, path)
    return browser, path, summary


def test_it_draws_without_errors_and_loads_nothing(shown):
    browser, _, _ = shown
    assert browser.get_log("browser") == []
    script = "return performance.getEntriesByType('resource').map(of => of.name).filter(of => !of.startsWith('data:'))"
    assert browser.execute_script(script) == []
    drawn = "return [...document.querySelectorAll('.chart')].map(of => of.querySelectorAll('svg.marks').length)"
    charts = browser.execute_script(drawn)
    assert len(charts) >= 6
    assert set(charts) == {1}


def test_figures_are_those_of_the_summary(shown):
    """Each says where it stands there; its text is the value, rounded; and no other figure is on the page."""
    browser, _, summary = shown
    script = "return [...document.querySelectorAll('data')].map(of => [of.dataset.at, of.value, of.dataset.per, of.textContent])"
    figures = browser.execute_script(script)
    assert len(figures) > 60
    for at, value, per, text in figures:
        there = summary
        for key in json.loads(at):
            there = there[key]
        assert json.loads(value) == there
        if isinstance(there, str):
            assert text == there
            continue
        assert not re.fullmatch("-0[.0]*%?", text)
        said = float(re.sub("[,%]", "", text)) / (100 if "%" in text else 1)
        decimals = len(text.rstrip("%").partition(".")[2]) + 2 * ("%" in text)
        assert said == pytest.approx(there / float(per), abs=0.5001 * 10**-decimals), at
    rest = browser.execute_script("""
        const rest = document.body.cloneNode(true);
        rest.querySelectorAll("data, pre, script, noscript, .chart, figcaption small").forEach(of => of.remove());
        return rest.textContent""")
    rest = re.sub(r"p\d\d(?!\d)|gamma [\d.]+|Version [\d.]+|№ \d+", "", rest)
    assert not re.search(r"\d", rest), re.findall(r".*\d.*", rest)


def test_it_says_what_it_must(shown):
    browser, _, summary = shown
    text = browser.execute_script("return document.body.innerText")
    assert text.count(summary["saturation"]["verdict"]) == 1
    for told in (*summary["provenance"].values(), *summary["warnings"], *summary["classes"]):
        assert told in text
    if summary["saturation"]["verdict"] == "OVERLOADED":
        assert "More work arrived than these GPUs can do" in text
    whole = browser.execute_script("return document.querySelector('#asked pre').textContent")
    assert yaml.safe_load(whole) == summary["scenario"]
    assert "twotower-sim" in browser.execute_script("return document.querySelector('#again pre').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_is_readable(shown, width, scheme):
    browser, path, _ = shown
    show(browser, path, width, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    wide = """return [...document.querySelectorAll("svg.marks")].filter(
        of => of.getBoundingClientRect().right > of.closest("figure").getBoundingClientRect().right + 1).length"""
    assert browser.execute_script(wide) == 0
    colours = """
        const paper = getComputedStyle(document.body).backgroundColor, found = [];
        for (const of of document.querySelectorAll("p, dt, dd, th, td, a, h1, h2, h3, figcaption small, strong, svg.marks text")) {
            const style = getComputedStyle(of);
            found.push(of.closest("svg") ? style.fill : style.color);
        }
        return [paper, [...new Set(found)]]"""
    paper, inks = browser.execute_script(colours)
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for ink in inks:
        light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)  # WCAG 2.2, AA


def luminance(colour: str) -> float:
    """Of "rgb(r, g, b)", as WCAG defines it."""
    c = np.array([int(of) for of in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_it_follows_the_system_while_it_is_open(shown):
    browser, path, _ = shown
    show(browser, path, scheme="light")
    prefer(browser, "dark")
    wait_for(browser, "dark")
    assert browser.execute_script("return document.querySelectorAll('svg.marks').length") >= 6
    assert browser.get_log("browser") == []


def test_a_keyboard_reaches_all_of_it(shown):
    from selenium.webdriver.common.keys import Keys

    browser, path, _ = shown
    show(browser, path)

    def press(key) -> str:
        browser.switch_to.active_element.send_keys(key)
        return browser.execute_script(
            "const of = document.activeElement; return of.className + '|' + of.id + '|' + of.tagName"
        )

    assert press(Keys.TAB) == "skip||A"
    assert browser.execute_script("return document.activeElement.getBoundingClientRect().left") >= 0
    assert press(Keys.ENTER).split("|")[1] == "answer"
    reached, opened = set(), False
    for _ in range(60):
        tag = press(Keys.TAB)
        if tag.endswith("BODY"):
            break
        style = "return getComputedStyle(document.activeElement).outlineStyle"
        assert browser.execute_script(style) != "none"
        reached.add(browser.execute_script("""
            const of = document.activeElement, all = document.querySelectorAll("details > summary, .scroll, pre");
            return [...all].indexOf(of)"""))  # fmt: skip
        if not opened and tag.endswith("SUMMARY"):
            press(Keys.ENTER)
            opened = browser.execute_script("return document.querySelector('#asked details').open")
    assert opened
    everything = browser.execute_script("return document.querySelectorAll('details > summary, .scroll, pre').length")
    assert reached - {-1} == set(range(everything))


def test_names_are_text_and_never_markup(browser, tmp_path):
    hostile = "</script><script>console.error('ran')</script><!-- <b>&amp;"
    _, summary = write(RUNS["one request"], tmp_path)
    text = page("run.html", summary | {"warnings": [hostile], "provenance": {hostile: hostile}}, {
        "latency": [over_time(hostile, hostile, np.arange(3.0), {hostile: np.ones(2), "b": np.ones(2)})], "time": [], "work": [],
    }, titles=TITLES, parts={}, scenario=hostile, command=hostile, version=hostile)  # fmt: skip
    path = tmp_path / "hostile.html"
    path.write_text(text, encoding="utf-8")
    browser.get_log("browser")
    show(browser, path)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.body.innerText").count(hostile) >= 5
    assert browser.execute_script("return document.querySelectorAll('b, script').length") == 2


# ---------------------------------------------------------------------- without a browser


def test_without_the_extra_it_is_refused_at_once(monkeypatch, capsys, tmp_path):
    arguments = ["twotower-sim", "run", str(ROOT / "scenarios" / "quickstart.yaml"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--html", str(tmp_path / "page.html")])
    monkeypatch.setattr("twotower_sim.report.simulate", lambda *_: pytest.fail("it simulates"))
    for missing in ("jinja2", "altair", "vl_convert"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, missing, None)
            with pytest.raises(SystemExit) as exit_:
                main()
        assert exit_.value.code == 2
        assert capsys.readouterr().err == f"Error: --html needs {missing}: pip install 'twotower-sim[plot]'\n"
    assert list(tmp_path.iterdir()) == []


def test_it_is_written_with_all_results_or_not_at_all(monkeypatch, tmp_path):
    path, _ = write(RUNS["one request"], tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    again = ["run", str(tmp_path / "asked.yaml"), "--out", str(tmp_path), "--set", "seed=1", "--html"]
    for where in (tmp_path / "summary.json", tmp_path, "/proc/nowhere/page.html"):
        assert CliRunner().invoke(app, [*again, str(where)]).exit_code != 0
    monkeypatch.setattr("twotower_sim.html_report.page", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    assert CliRunner().invoke(app, [*again, str(path)]).exit_code != 0
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["two towers", "autoregressive", "pools"])
def test_it_changes_no_result(name, tmp_path):
    (tmp_path / "plain").mkdir()
    _, summary = write(RUNS[name], tmp_path)
    CliRunner().invoke(app, ["run", str(tmp_path / "asked.yaml"), "--out", str(tmp_path / "plain"), "-q"])
    plain = json.loads((tmp_path / "plain" / "summary.json").read_text())
    assert summary == plain


def round_(start_ns: int, end_ns: int, kv_blocks: int) -> Round:
    return Round(start_ns, end_ns, 0, 0, 0, 0, (0, 0, 0, 0), 0, kv_blocks)


@pytest.mark.parametrize("span_s", [0.01, 3, 5000])
def test_usage_is_exact_whatever_the_length_of_a_run(span_s, monkeypatch):
    monkeypatch.setattr("twotower_sim.usage.ROUNDS", 64)
    random = np.random.default_rng(1)
    ends = np.sort(random.integers(0, int(span_s * 1e9), 1001))
    usage, rounds = (
        Usage(),
        list(zip(ends[:-1:2].tolist(), ends[1::2].tolist(), random.integers(1, 99, 500).tolist(), strict=True)),
    )
    for row in rounds:
        usage.observe(0, round_(*row))
    edges_ns, busy, blocks = usage.bins(int(ends[-1]))
    assert len(busy) <= BINS
    assert edges_ns[-1] == ends[-1]
    for low, high, ran, used in zip(edges_ns[:-1], edges_ns[1:], busy, blocks, strict=True):
        inside = [(max(min(end, high) - max(start, low), 0), kv) for start, end, kv in rounds]
        busy_ns = sum(ns for ns, _ in inside)
        assert ran * (high - low) == pytest.approx(busy_ns, abs=2)
        if busy_ns > 1000:
            assert used == pytest.approx(sum(ns * kv for ns, kv in inside) / busy_ns, rel=1e-3)


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_time_line_agrees_with_the_utilisation(replicas):
    from twotower_sim.metrics import evaluate

    run = prepare(Scenario.model_validate(LOADED | {"latency": AFFINE, "deployment": {"replicas": replicas}}))
    usage = Usage()
    results = evaluate(simulate(run, usage.observe))
    edges_ns, busy, blocks = usage.bins(int(results.columns.finish_ns.max()))
    assert busy @ np.diff(edges_ns) == pytest.approx(sum(engine.busy_ns for engine in run.engines))
    assert np.nanmax(blocks) <= results.memory["kv_blocks_peak"]
