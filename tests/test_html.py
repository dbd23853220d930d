"""Pages in a real browser: what they say is what the JSON says that they are views of, and everybody can read them."""

import json
import re
from operator import itemgetter

import numpy as np
import pytest
import yaml
from browser import chromium, prefer, show, wait_for
from pages import PAGES, write
from test_html_files import MODULES, SMALL

from twotower_sim.charts import over_time
from twotower_sim.figures import better, is_felt
from twotower_sim.html_page import page
from twotower_sim.tables import first_alike, number

DIGITS_OF_NAMES = r"p\d\d(?!\d)|gamma [\d.]+|Version [\d.]+|№ \d+|95 %"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module", params=PAGES, ids=": ".join)
def shown(request, tmp_path_factory, browser):
    path, data = write(*request.param, tmp_path_factory.mktemp("page"))
    browser.get_log("browser")
    show(browser, path)
    return browser, path, data


def pages(*names):
    return pytest.mark.parametrize("shown", names, indirect=True, ids=": ".join)


one_of_each = pages(("run", "classes"), ("sweep", "grid"), ("compare", "one that falls behind"), ("plan", "met"))


def test_it_draws_without_errors_and_loads_nothing(shown):
    browser, _, data = shown
    assert browser.get_log("browser") == []
    script = "return performance.getEntriesByType('resource').map(of => of.name).filter(of => !of.startsWith('data:'))"
    assert browser.execute_script(script) == []
    drawn = "return [...document.querySelectorAll('.chart')].map(of => of.querySelectorAll('svg.marks').length)"
    charts = browser.execute_script(drawn)
    assert charts == [1] * len(charts)
    assert len(charts) >= 6 or data.get("trials") == []


def test_figures_are_those_of_the_json(shown):
    """Each says where it stands there; its text is the value, rounded; and no other figure is on the page."""
    browser, _, data = shown
    script = "return [...document.querySelectorAll('data')].map(of => [of.dataset.at, of.value, of.dataset.per, of.textContent])"
    figures = browser.execute_script(script)
    assert len(figures) > 10
    for at, value, per, text in figures:
        there = data
        for key in json.loads(at):
            there = there[key]
        assert json.loads(value) == there
        check(text, there, float(per))
    rest = browser.execute_script("""
        const rest = document.body.cloneNode(true);
        rest.querySelectorAll("data, pre, script, noscript, .chart, figcaption small").forEach(of => of.remove());
        return rest.textContent""")
    for name in {**data.get("given_up", {}), **data.get("dearer", {})}:
        rest = rest.replace(name, "")
    rest = re.sub(DIGITS_OF_NAMES, "", rest)
    assert not re.search(r"\d", rest), re.findall(r".*\d.*", rest)


def check(text, there, per):
    """That ``text`` says what is ``there``, in units of ``per``."""
    if isinstance(there, str):
        assert text == there
    elif isinstance(there, list | dict):  # all of it, or how many there are
        told = {float(of) for of in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?:e-?\d+)?(?!\w)", text)}
        assert told in ({len(there)}, set(numbers(there)))
    else:
        assert not re.fullmatch("-0[.0]*%?", text)
        said = float(re.sub("[,%]", "", text)) / (100 if "%" in text else 1)
        decimals = len(text.rstrip("%").partition(".")[2]) + 2 * ("%" in text)
        assert said == pytest.approx(there / per, abs=0.5001 * 10**-decimals)


def numbers(of):
    if isinstance(of, list | dict):
        return [number for part in (of.values() if isinstance(of, dict) else of) for number in numbers(part)]
    return [of] * (isinstance(of, int | float) and not isinstance(of, bool))


def test_it_says_what_was_asked_and_how(shown):
    browser, _, data = shown
    wholes = browser.execute_script("return [...document.querySelectorAll('#asked pre')].map(of => of.textContent)")
    sides = data.get("scenarios", [data])
    asked = [data[of] for of in ("study", "plan") if of in data] or [side["scenario"] for side in sides]
    assert [yaml.safe_load(whole) for whole in wholes] == asked
    assert "twotower-sim" in browser.execute_script("return document.querySelector('#again pre').textContent")
    text = browser.execute_script("return document.body.innerText")
    for side in sides:
        told = [of if isinstance(of, str) else of["warning"] for of in side["warnings"]]
        sources = side["provenance"]
        told = [
            *first_alike(told),
            *(sources.values() if isinstance(sources, dict) else map(itemgetter("source"), sources)),
        ]
        assert all(of in text for of in told)


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
        const texts = "p, li, dt, dd, th, td, a, h1, h2, h3, small, strong, label, input, button, svg.marks text";
        for (const of of document.querySelectorAll(texts)) {
            const style = getComputedStyle(of);
            found.push(of.closest("svg") ? style.fill : style.color);
        }
        return [paper, [...new Set(found)]]"""
    paper, inks = browser.execute_script(colours)
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for ink in inks:
        assert contrast(ink, paper) >= 4.5, ink  # WCAG 2.2, AA
    marks = """return [...new Set([...document.querySelectorAll("svg.marks .role-mark path, svg.marks .role-mark line")]
        .flatMap(of => [of.getAttribute("stroke"), of.getAttribute("fill")]).filter(of => of?.startsWith("#")))]"""
    for colour in browser.execute_script(marks):
        assert contrast(f"rgb{tuple(bytes.fromhex(colour[1:]))}", paper) >= 3, colour


def contrast(*colours: str) -> float:
    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    """Of "rgb(r, g, b)", as WCAG defines it."""
    c = np.array([int(of) for of in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@one_of_each
def test_it_follows_the_system_while_it_is_open(shown):
    browser, path, _ = shown
    show(browser, path, scheme="light")
    charts = browser.execute_script("return document.querySelectorAll('svg.marks').length")
    prefer(browser, "dark")
    wait_for(browser, "dark")
    assert browser.execute_script("return document.querySelectorAll('svg.marks').length") == charts
    assert browser.get_log("browser") == []


REACHED = "details > summary, .scroll, pre, input, th button"


@one_of_each
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
    reached = set()
    for _ in range(100):
        tag = press(Keys.TAB)
        if tag.endswith("BODY"):
            break
        index, outline = browser.execute_script(f"""
            const of = document.activeElement;
            return [[...document.querySelectorAll("{REACHED}")].indexOf(of), getComputedStyle(of).outlineStyle]""")
        assert outline != "none"
        reached.add(index)
        if tag.endswith("SUMMARY") and not browser.execute_script("return document.activeElement.closest('.chart')"):
            press(Keys.ENTER)
    everything = browser.execute_script(f"return document.querySelectorAll('{REACHED}').length")
    assert reached - {-1} == set(range(everything))
    assert browser.execute_script("return document.querySelector('#asked details').open")


@pytest.mark.parametrize("kind", MODULES)
def test_names_are_text_and_never_markup(kind, browser, tmp_path, monkeypatch):
    """Every text of the JSON, and of a chart."""
    hostile = "</script><script>console.error('ran')</script><!-- <b>&amp;"
    curve = np.arange(3.0), np.ones(2)

    def spoiled(name, data, charts, command, **more):
        spoiled_charts = {key: [over_time(hostile, hostile, {hostile: curve, "b": curve})] for key in charts}
        return page(name, spoil(data), spoiled_charts, [hostile], **more)

    def spoil(of):
        if isinstance(of, dict):
            return {key: spoil(part) for key, part in of.items()}
        if isinstance(of, list):
            return [spoil(part) for part in of]
        return hostile if isinstance(of, str) and not better(of) else of  # but for names of metrics, which are keys

    monkeypatch.setattr(f"twotower_sim.{MODULES[kind]}.page", spoiled)
    path, _ = write(kind, SMALL[kind], tmp_path)
    browser.get_log("browser")
    show(browser, path)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.body.innerText").count(hostile) >= 5
    assert browser.execute_script("return document.querySelectorAll('b, script').length") == 2


# ---------------------------------------------------------------------- what each kind of page says


def of_kind(kind):
    return pages(*(of for of in PAGES if of[0] == kind))


@of_kind("run")
def test_a_run_says_whether_its_load_was_borne(shown):
    browser, _, summary = shown
    text = browser.execute_script("return document.body.innerText")
    assert text.count(summary["saturation"]["verdict"]) == 1
    assert ("More work arrived than these GPUs can do" in text) == (summary["saturation"]["verdict"] == "OVERLOADED")
    assert all(told in text for told in summary["classes"])


@of_kind("sweep")
def test_a_sweep_says_no_latency_of_points_that_do_not_bear_their_load(shown):
    browser, _, sweep = shown
    text = browser.execute_script("return document.querySelector('.answer').innerText")
    assert text == sweep["answer"]
    rows = browser.execute_script("return [...document.querySelectorAll('#points tbody tr')].map(of => of.innerText)")
    assert len(rows) == len(sweep["points"])
    for row, point in zip(rows, sweep["points"], strict=True):
        assert ("STABLE" in row) == point["stable"]
        felt = [name for name in sweep["study"]["metrics"] if is_felt(name) and point["metrics"][name]]
        assert point["stable"] or not any(number(point["metrics"][name]["mean"]) in row.split() for name in felt)
    for of in sweep["failed"]:
        assert of["error"] in browser.execute_script("return document.querySelector('#points').innerText")


@of_kind("compare")
def test_a_comparison_says_what_differs_and_no_latency_that_depends_on_the_length(shown):
    browser, _, compared = shown
    assert browser.execute_script("return document.querySelector('.answer').innerText") == compared["answer"]
    rows = dict(
        browser.execute_script("""
        return [...document.querySelectorAll("#asked tbody tr")].map(of => [of.cells[0].innerText, of.innerText])""")
    )
    first, *others = compared["scenarios"]
    for key in rows:
        assert any(at(side["scenario"], key) != at(first["scenario"], key) for side in others)
    figures = browser.execute_script("return [...document.querySelectorAll('#figures data')].map(of => of.dataset.at)")
    told = {tuple(json.loads(of)[:4]) for of in figures} - {("scenarios", i, "quality") for i in range(3)}
    assert told == {
        ("scenarios", i, "metrics", metric)
        for i, side in enumerate(compared["scenarios"])
        for metric, of in side["metrics"].items()
        if of and (not is_felt(metric) or {*first["saturation"], *side["saturation"]} == {"STABLE"})
    }


@of_kind("plan")
def test_a_plan_says_what_is_met_and_no_percentile_of_a_load_that_is_not_borne(shown):
    browser, _, plan = shown
    text = browser.execute_script("return document.querySelector('#answer').innerText")
    assert plan["answer"] in text
    assert ("times the load asked for" in text) == (plan["load"] is not None)
    looked = plan["best"] or plan["closest"]
    assert browser.execute_script("return document.querySelectorAll('#latency .chart').length > 0") == bool(looked)
    verdicts = browser.execute_script(
        "return [...document.querySelectorAll('#answer tbody td:last-child')].map(of => of.innerText)"
    )
    stable = looked and {*looked["saturation"]} == {"STABLE"}
    assert len(verdicts) == (len(plan["plan"]["objectives"]) if looked else 0)
    assert (set(verdicts) == {"met"}) == plan["met"]
    assert (set(verdicts) == {"not known"}) == (bool(looked) and not stable)
    for at in ("one_replica_fewer", "closest", "best"):
        of = plan[at]
        told = browser.execute_script(
            f'return document.querySelectorAll(`#answer data[data-at*=\'"{at}", "objectives"\']`).length'
        )
        assert bool(told) == (of is not None and {*of["saturation"]} == {"STABLE"}), at
    assert (plan["one_replica_fewer"] is not None) == ("One replica fewer" in text)
    names = browser.execute_script(
        "return [...document.querySelectorAll('#candidates tbody th')].map(of => of.innerText)"
    )
    assert names == [of["candidate"] for of in plan["candidates"]]


def at(of, key):
    for part in key.split("."):
        of = of.get(part) if isinstance(of, dict) else None
    return of


def test_rows_of_a_table_are_sorted_and_filtered(browser, tmp_path):
    path, sweep = write("sweep", "grid", tmp_path)
    show(browser, path)

    def press(column):
        browser.execute_script(f"document.querySelectorAll('#points th button')[{column}].click()")
        cells = (
            "return [...document.querySelectorAll('#points tbody tr:not([hidden])')].map(of => of.cells[0].innerText)"
        )
        return [int(text) for text in browser.execute_script(cells)]

    column = 5 + sweep["study"]["metrics"].index("cost.usd_per_million_output_tokens")
    dear = {of["point"]: of["metrics"]["cost.usd_per_million_output_tokens"]["mean"] for of in sweep["points"]}
    assert press(column) == sorted(dear, key=dear.__getitem__)
    assert press(column) == sorted(dear, key=dear.__getitem__, reverse=True)
    browser.find_element("css selector", "input").send_keys("Autoregressive stable")
    assert press(0) == [
        of["point"] for of in sweep["points"] if of["stable"] and of["values"]["decoding"]["kind"] == "autoregressive"
    ]
