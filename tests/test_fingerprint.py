"""Fingerprints: what is drawn from one is like the trace it was measured from; files of them, scenarios with them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import AFFINE, ROOT
from test_cli import call

from twotower_sim.errors import InputError
from twotower_sim.fingerprint import compare, draw, load_fingerprint, measure, plot_comparison, text_of
from twotower_sim.fingerprint.bursts import bins_of, dispersion
from twotower_sim.fingerprint.quantiles import at, quantiles
from twotower_sim.fingerprint.sessions import turns_of
from twotower_sim.kv_cache import infinite_hits
from twotower_sim.metrics import evaluate
from twotower_sim.preset import names
from twotower_sim.requests import Dependencies, Prefixes, Requests
from twotower_sim.scenario import Scenario, load_scenario
from twotower_sim.sessions import grown_prefixes
from twotower_sim.simulation import prepare, simulate
from twotower_sim.workload import trace

FILES = {
    "azure-conversation-2023": "AzureLLMInferenceTrace_conv.csv.gz",
    "mooncake-conversation": "mooncake_conversation_trace.jsonl.gz",
}
SEEDS = range(4)
P10_TO_P99 = np.arange(0.1, 0.995, 0.01)
WINDOWS_S = (1, 2, 5, 10, 20, 30, 60)


@pytest.fixture(scope="module", params=sorted(FILES))
def real(request, data):
    """(name, trace, its fingerprint, four traces of as many requests drawn from it)"""
    source = trace(data / "traces" / FILES[request.param]).requests
    found = measure(source, request.param)
    return request.param, source, found, [draw(found, len(source), 1.0, seed) for seed in SEEDS]


def arrivals_s(requests: Requests) -> np.ndarray:
    return requests.arrival_ns / 1e9


def hit_ratio(requests: Requests) -> float:
    hits, blocks = infinite_hits(requests)
    return hits / blocks


def requests_at(times_s: np.ndarray, seed: int = 0, **more) -> Requests:
    rng = np.random.default_rng(seed)
    lengths = [np.maximum(rng.lognormal(np.log(mean), 1, len(times_s)).astype(np.int64), 1) for mean in (800, 200)]
    return Requests(np.rint(times_s * 1e9).astype(np.int64), *lengths, **more)


# ---------------------------------------------------------------------- real traces


def test_every_quantile_of_the_lengths_is_the_traces(real):
    _, source, _, drawn = real
    for of in drawn:
        for name in ("input_tokens", "output_tokens"):
            wanted, got = (np.quantile(getattr(requests, name), P10_TO_P99) for requests in (source, of))
            assert np.abs(got / wanted - 1).max() < 0.02, name


def test_lengths_hang_together_as_in_the_trace(real):
    """Mean output by tenth of the input, within what the means of as many requests scatter."""
    _, source, _, drawn = real
    tenth = [np.searchsorted(np.quantile(source.input_tokens, np.arange(0.1, 1, 0.1)), of.input_tokens, "right")
             for of in (source, *drawn)]  # fmt: skip
    for t in range(10):
        wanted = source.output_tokens[tenth[0] == t]
        for of, tenths in zip(drawn, tenth[1:], strict=True):
            got = of.output_tokens[tenths == t]
            error = np.hypot(wanted.std() / len(wanted) ** 0.5, got.std() / len(got) ** 0.5)
            assert abs(got.mean() - wanted.mean()) < 4 * error + 0.1 * wanted.mean()


def test_rate_and_work_follow_the_minutes_of_the_trace(real):
    """The difference of two counts whose windows are as dispersed as the source's own beside its curve: chi squared by
    minute is near 1 where both are Poisson; Azure's bursts of a second or two raise it by a third."""
    _, source, _, drawn = real
    minutes = int(arrivals_s(source)[-1] // 60) - 2  # a drawn hour ends a minute sooner or later
    for weights in ("requests", "output_tokens"):

        def by_minute(of: Requests, weights: str = weights) -> np.ndarray:
            weight = None if weights == "requests" else of.output_tokens
            return np.bincount((arrivals_s(of) // 60).astype(int), weight)[:minutes]

        squares = (
            1
            if weights == "requests"
            else (source.output_tokens.astype(float) ** 2).mean() / source.output_tokens.mean()
        )
        wanted = by_minute(source)
        excess = [((by_minute(of) - wanted) ** 2 / (by_minute(of) + wanted) / squares).mean() for of in drawn]
        assert 0.6 < np.mean(excess) < 2
        flat = ((wanted.mean() - wanted) ** 2 / wanted / squares).mean()
        assert flat > 2 or np.mean(excess) < 1.6  # more than a constant rate would do, where the rate moves at all


def test_bursts_are_those_of_the_trace(real):
    """Mean of the seeds: the index over so many windows scatters by sqrt(2 window / span), a sixth at 60 s."""
    _, source, _, drawn = real
    span_s = arrivals_s(source)[-1]
    for window in WINDOWS_S:
        wanted = dispersion(arrivals_s(source), window, span_s)
        got = np.mean([dispersion(arrivals_s(of), window, arrivals_s(of)[-1]) for of in drawn])
        assert got == pytest.approx(wanted, rel=0.05 if window <= 5 else 0.15)


def test_an_infinite_cache_hits_as_often(real):
    name, source, _, drawn = real
    if name == "azure-conversation-2023":
        assert source.prefixes is None
        assert all(of.prefixes is None for of in drawn)
        return
    for of in drawn:
        assert hit_ratio(of) == pytest.approx(hit_ratio(source), abs=0.03)


def lru_hits(requests: Requests, capacity: int) -> float:
    """Share of blocks that a cache of so many would hit if requests came one by one."""
    cached: dict[tuple[int, int], None] = {}
    hits = 0
    for request in range(len(requests)):
        keys = list(enumerate(requests.prefixes.of(request).tolist()))
        found = next((i for i, key in enumerate(keys) if key not in cached), len(keys))
        hits += found
        for key in reversed(keys):
            cached.pop(key, None)
            cached[key] = None
        while len(cached) > capacity:
            del cached[next(iter(cached))]
    return hits / len(requests.prefixes.hashes)


@pytest.mark.parametrize("capacity", [1000, 10_000])
def test_a_finite_cache_hits_nearly_as_often(real, capacity):
    _, source, _, drawn = real
    if source.prefixes:
        assert lru_hits(drawn[1], capacity) == pytest.approx(lru_hits(source, capacity), abs=0.03)


def served(requests: Requests, gpu: str, replicas: int, cache: str = "none") -> tuple[dict[str, float], float]:
    """Latencies, and the share of input that a prefix cache had; the deployment is busy most of the time and never falls
    behind."""
    scenario = Scenario.model_validate({
        "workload": {"kind": "trace", "path": "given"},
        "deployment": {"gpu": gpu, "replicas": replicas},
        "scheduler": {"max_num_seqs": 64},
        "memory": {"prefix_cache": {"kind": cache}, "kv_block_tokens": 512, "oversized": "reject"},
    })  # fmt: skip
    found = evaluate(simulate(prepare(scenario, Path(), requests)))
    metrics = ("time_to_first_token", "request_latency")
    latencies = {f"{metric} {p}": found.metrics[metric][p] for metric in metrics for p in ("p50", "p90")}
    return latencies, (found.memory.get("prefix_cache") or {}).get("reused_input_ratio", 0.0)


def test_a_deployment_is_as_fast_as_on_the_trace(real):
    name, source, _, drawn = real
    replicas = {"azure-conversation-2023": 1, "mooncake-conversation": 6}[name]
    wanted, _ = served(source, "h100-sxm", replicas)
    for of in drawn:
        assert served(of, "h100-sxm", replicas)[0] == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("cache", ["attention", "hybrid"])
def test_a_deployment_with_a_prefix_cache_too(real, cache):
    _, source, _, drawn = real
    if source.prefixes:
        wanted, got = (served(of, "b200", 1, cache) for of in (source, drawn[1]))
        assert got[0] == pytest.approx(wanted[0], rel=0.1)
        assert got[1] == pytest.approx(wanted[1], abs=0.03)


def test_shipped_fingerprints_are_what_measuring_gives(data):
    for name, file in FILES.items():
        shipped = load_fingerprint(name, ROOT)
        again = measure(trace(data / "traces" / file).requests, shipped.source.trace, shipped.source.licence)
        again = again.model_copy(update={"source": shipped.source})
        assert text_of(again) == text_of(shipped)


def test_shipped_fingerprints_are_small_and_name_their_source():
    assert names("fingerprints") == sorted(FILES)
    for name in FILES:
        text = (ROOT / "twotower_sim" / "presets" / "fingerprints" / f"{name}.yaml").read_text()
        assert len(text) < 10_000
        assert text.startswith(f"# twotower-sim trace fingerprint traces/downloads/{name}")
        source = load_fingerprint(name, ROOT).source
        assert " @ " in source.trace
        assert source.licence in ("CC-BY-4.0", "Apache-2.0")


# ---------------------------------------------------------------------- known structure


def test_tables_hold_atoms_and_tails():
    rng = np.random.default_rng(3)
    values = np.concatenate(
        [np.full(5000, 7), rng.integers(100, 105, 3000), rng.pareto(1.5, 4000) * 1000 + 900]
    ).astype(int)
    table = quantiles(values)
    assert len(table) < 60
    p = np.linspace(0.001, 0.999, 999)
    low, high = (np.quantile(values, np.clip(p + by, 0, 1)) for by in (-0.001, 0.001))
    drawn = at(table, p)
    assert ((drawn > 0.985 * low) & (drawn < 1.015 * high)).all()
    assert (drawn[p < 0.415] == 7).all()
    assert (table[0][1], table[-1][1]) == pytest.approx((7, values.max()), rel=1e-5)


def test_kinds_of_requests_take_turns():
    """Half an hour of long prompts with short answers, then half an hour of the opposite."""
    rng = np.random.default_rng(0)
    times_s = np.sort(rng.uniform(0, 3600, 12_000))
    late = times_s > 1800
    inputs = np.where(late, rng.integers(90, 110, 12_000), rng.integers(4000, 5000, 12_000))
    outputs = np.where(late, rng.integers(400, 500, 12_000), rng.integers(10, 20, 12_000))
    source = Requests(np.rint(times_s * 1e9).astype(np.int64), inputs, outputs)
    found = measure(source, "turns")
    assert len(found.joint) == 2
    drawn = draw(found, 24_000, 1.0, 1)
    in_hour = arrivals_s(drawn) % 3600
    for low, high, wanted in ((100, 1700, True), (1900, 3500, False)):
        inside = (in_hour > low) & (in_hour < high)
        assert ((drawn.input_tokens[inside] > 1000) == wanted).mean() > 0.99
        assert ((drawn.output_tokens[inside] < 100) == wanted).mean() > 0.99
    assert len(measure(requests_at(times_s), "one kind").joint) == 1


def modulated(seed: int = 0) -> np.ndarray:
    """An hour and a half in which 30 s at 4/s and 5 s at 30/s take turns, on average."""
    rng, now, parts = np.random.default_rng(seed), 0.0, []
    while now < 5400:
        for rate, mean_s in ((4, 30), (30, 5)):
            stay_s = rng.exponential(mean_s)
            parts.append(now + np.sort(rng.random(rng.poisson(rate * stay_s))) * stay_s)
            now += stay_s
    return np.concatenate(parts)


def test_bursts_of_a_known_process():
    source = requests_at(modulated())
    found = measure(source, "modulated")
    span_s = arrivals_s(source)[-1]
    drawn = [draw(found, len(source), 1.0, seed) for seed in range(8)]
    for window in WINDOWS_S:
        wanted = dispersion(arrivals_s(source), window, span_s)
        got = np.mean([dispersion(arrivals_s(of), window, arrivals_s(of)[-1]) for of in drawn])
        assert got == pytest.approx(wanted, rel=0.2), window


def test_twice_the_rate_doubles_bursts_and_keeps_the_curve():
    source = requests_at(modulated())
    found = measure(source, "modulated")
    once, twice = (draw(found, 20_000, scale, 3) for scale in (1.0, 2.0))
    rates = [len(of) / arrivals_s(of)[-1] for of in (once, twice)]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.1)
    excess = [dispersion(arrivals_s(of), 5, arrivals_s(of)[-1]) - 1 for of in (once, twice)]
    assert excess[1] == pytest.approx(2 * excess[0], rel=0.2)


def test_arrivals_that_no_cox_process_matches_are_named():
    source = requests_at(np.arange(6000) * 0.25)
    found = measure(source, "even")
    assert not found.arrivals.noise
    assert found.source.notes == [
        "arrivals are more regular than Poisson over windows of 1, 2, 5, 10, 20, 30 s; drawn ones are not"
    ]
    drawn_s = arrivals_s(draw(found, 6000, 1.0, 0))
    assert dispersion(drawn_s, 5, drawn_s[-1]) == pytest.approx(1, abs=0.25)
    assert not measure(requests_at(np.cumsum(np.random.default_rng(1).exponential(0.2, 9000))), "poisson").source.notes


def test_bins_of_long_and_short_traces():
    for span_s, count in ((30, 100), (3600, 5000), (86_400 * 30, 1000)):
        bins, bin_s, bin_count = bins_of(np.linspace(0, span_s, count))
        assert bin_count <= 180
        assert bin_count * bin_s == pytest.approx(span_s * count / (count - 1))
        assert (bins[0], bins[-1]) == (0, bin_count - 1)


def tools() -> Requests:
    """Six system prompts, two of which begin alike, and prompts that go on from an earlier one."""
    rng, n = np.random.default_rng(1), 8000
    beginnings = [[1000 * tool + i for i in range(depth)] for tool, depth in enumerate((3, 9, 20, 1, 14, 6))]
    beginnings[1][:3] = beginnings[0]
    rows: list[list[int]] = []
    unused = 100_000
    for i in range(n):
        tail = int(rng.integers(1, 12))
        earlier = rows[i - int(rng.integers(20, 500))] if i > 500 and rng.random() < 0.3 else None
        tool = int(rng.choice(6, p=[0.38, 0.3, 0.15, 0.1, 0.04, 0.03]))
        rows.append([*(earlier or beginnings[tool]), *range(unused, unused + tail)])
        unused += tail
    first = np.concatenate(([0], np.cumsum([len(row) for row in rows])))
    source = requests_at(np.cumsum(rng.exponential(0.2, n)), prefixes=Prefixes(first, np.concatenate(rows), 512))
    return replace(source, input_tokens=np.diff(first) * 512 - rng.integers(0, 511, n))


def test_system_prompts_and_conversations():
    source = tools()
    found = measure(source, "tools")
    assert sorted((entry.blocks, entry.as_previous) for entry in found.prefixes.common) == [
        (1, 0), (3, 0), (6, 0), (9, 3), (14, 0), (20, 0)]  # fmt: skip
    for seed in SEEDS:
        drawn = draw(found, len(source), 1.0, seed)
        assert hit_ratio(drawn) == pytest.approx(hit_ratio(source), abs=0.03)
    assert lru_hits(drawn, 1000) == pytest.approx(lru_hits(source, 1000), abs=0.03)
    assert (np.diff(drawn.prefixes.first) == -(-drawn.input_tokens // 512)).all()


def conversations(waits: str) -> Requests:
    rng, rows = np.random.default_rng(2), []
    for session, start_s in enumerate(np.cumsum(rng.exponential(1.0, 2500))):
        length, now = int(rng.lognormal(6, 1)) + 1, start_s
        for turn in range(rng.geometric(0.3)):
            answer, wait_s = int(rng.lognormal(5, 0.7)) + 1, rng.exponential(20) if turn else 0.0
            now += wait_s
            rows.append((now, length, answer, session, turn, wait_s))
            length += answer + int(rng.lognormal(4, 1)) + 1
    times_s, inputs, outputs, sessions, turns, waits_s = np.array(sorted(rows)).T
    later, session = turns > 0, sessions.astype(int)
    after = Dependencies(
        np.concatenate(([0], np.cumsum(later))),
        turns_of(session)[1][later],
        (waits_s[later] * 1e9).astype(np.int64),
        np.full(later.sum(), waits == "arrival"),
        np.zeros(len(turns), bool),
    )
    after = None if waits == "record" else after
    plain = Requests((times_s * 1e9).astype(np.int64), inputs.astype(int), outputs.astype(int), None, session, after)
    return replace(plain, prefixes=grown_prefixes(plain, 16))


@pytest.mark.parametrize("waits", ["finish", "arrival", "record"])
def test_conversations_are_drawn_as_such(waits):
    source = conversations(waits)
    found = measure(source, "chats")
    assert found.sessions.waits_for == waits
    drawn = [draw(found, len(source), 1.0, seed) for seed in SEEDS]
    assert all((np.diff(of.arrival_ns) >= 0).all() for of in drawn)
    for name in ("input_tokens", "output_tokens"):
        wanted, *got = (np.quantile(getattr(of, name), [0.1, 0.5, 0.9]) for of in (source, *drawn))
        assert np.mean(got, axis=0) == pytest.approx(wanted, rel=0.05)
    assert np.mean([hit_ratio(of) for of in drawn]) == pytest.approx(hit_ratio(source), abs=0.03)
    of = drawn[0]
    turn, previous = turns_of(of.sessions)
    assert np.mean([(turns_of(d.sessions)[0] == 0).mean() for d in drawn]) == pytest.approx(0.3, abs=0.03)
    if waits == "record":
        assert of.after is None
        return
    assert (of.after.on == previous[turn > 0]).all()
    assert (of.after.dispatch == (waits == "arrival")).all()
    assert of.after.delay_ns.mean() == pytest.approx(20e9, rel=0.05)
    affine = Scenario.model_validate({"workload": {"kind": "trace", "path": "given"}, "latency": AFFINE})
    run = simulate(prepare(affine, Path(), of.take(slice(300))))
    later = np.flatnonzero(turn[:300] > 0)
    before = previous[later]
    arrived, finished = np.array(run.records.arrival_ns), np.array(run.records.finish_ns)
    waited_ns = arrived[later] - (finished if waits == "finish" else arrived)[before]
    assert waited_ns.tolist() == of.after.delay_ns[: len(later)].tolist()


# ---------------------------------------------------------------------- drawing, files, scenarios


def same(a: Requests, b: Requests) -> bool:
    columns = [(of.arrival_ns, of.input_tokens, of.output_tokens) for of in (a, b)]
    hashes = [of.prefixes.hashes.tobytes() if of.prefixes else b"" for of in (a, b)]
    return all((x == y).all() for x, y in zip(*columns, strict=True)) and hashes[0] == hashes[1]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_seed_gives_the_same_trace(name):
    found = load_fingerprint(name, ROOT)
    once, again, other = (draw(found, 3000, 1.5, seed) for seed in (1, 1, 2))
    assert same(once, again)
    assert not same(once, other)
    assert len(draw(found, 1, 1.0, 0)) == 1


def test_the_curve_repeats():
    found = load_fingerprint("azure-conversation-2023", ROOT)
    drawn = draw(found, 3 * found.source.requests, 1.0, 0)
    hour = (arrivals_s(drawn) / found.source.span_s).astype(int)
    counts = np.bincount(hour)[:2]
    assert counts == pytest.approx(found.source.requests, rel=0.03)
    peak = arrivals_s(drawn) % found.source.span_s // 60 == 30
    assert np.bincount(hour[peak])[:2] == pytest.approx(465, rel=0.15)


def test_a_file_reads_back(tmp_path):
    for source in (tools(), conversations("finish"), requests_at(np.array([0.0, 3.0]))):
        found = measure(source, "made up", "none", ["noted: \"this\", [and] that"])  # fmt: skip
        text = text_of(found, "a comment\nof two lines")
        assert text.startswith("# a comment\n# of two lines\nversion: 1\n")
        assert len(text) < 12_000
        (tmp_path / "made-up.yaml").write_text(text)
        assert load_fingerprint("made-up.yaml", tmp_path) == found


def test_what_has_no_rate_is_refused():
    with pytest.raises(InputError, match="one.csv: 1 requests at one time have no rate"):
        measure(requests_at(np.array([0.0])), "one.csv")
    with pytest.raises(InputError, match="all sessions start at one time"):
        measure(replace(requests_at(np.array([0.0, 1.0])), sessions=np.array([0, 0])), "chat.csv")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("version: 1", "version: 2", r"made.yaml:1: version: found 2; "),
        ("requests: 8000", "requests: many", r"made.yaml:4: source.requests: found 'many'"),
        ("requests: 8000", "rows: 8000", r"source.rows: unknown key; allowed: trace, licence, requests"),
        ("  span_s:", "  length:", r"source.length: unknown key"),
        ("output_tokens: [[0,", "output_tokens: [[0.5,", r"output_tokens: expected \[probability, value\] from probability 0 to 1"),
        ("input_tokens: [[0, ", "input_tokens: [[0, 9000000], [0, ", r"input_tokens: found \[0.0, 9000000.0\] before"),
        ("input_tokens: [[0, ", "input_tokens: [[0, 0], [0.000001, ", r"input_tokens: found values from 0 to .*; allowed: 1 to 2.14748e\+09"),
        ("counts: [[", "counts: [[-", r"arrivals: counts: expected numbers from 0 on, and not only zeros"),
        ("counts: [[", "counts: [[.inf, ", r"arrivals.counts.0.0: found inf"),
        ("counts: [[", "counts: [[], [", r"arrivals: counts: found \[0, \d+\] bins; expected as many of every kind"),
        ("counts: [[", "counts: [[1], [", r"arrivals: counts: found"),
        ("joint: [[[", "joint: [[[1]], [[", r"joint: found 2 kinds; expected 1, as in arrivals.counts"),
        ("joint: [[[", "joint: [[[1], [", r"joint: expected as many rows as columns"),
        ("joint: [[[", "joint: [[[-1, ", r"joint.0.0.0: found -1"),
        ("as_previous: 3", "as_previous: 4", r"prefixes: common: as_previous is longer than an entry"),
        ("continues: [", "continues: [2, ", r"prefixes: continues has \d+ strata"),
        ("  age_s:", "  ages:", r"prefixes.ages: unknown key"),
    ],
)  # fmt: skip
def test_errors_name_file_and_field(old, new, said, tmp_path):
    text = text_of(measure(tools(), "tools"))
    assert old in text
    (tmp_path / "made.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=said):
        load_fingerprint("made.yaml", tmp_path)


def test_a_scenario_names_a_fingerprint(tmp_path):
    (tmp_path / "mine.yaml").write_text(text_of(measure(tools(), "tools")))
    (tmp_path / "case.yaml").write_text(
        "workload: {kind: fingerprint, fingerprint: mine.yaml, requests: 50, rate_scale: 2}"
    )
    scenario = load_scenario(tmp_path / "case.yaml")
    requests = prepare(scenario, tmp_path).requests
    assert same(requests, draw(load_fingerprint("mine.yaml", tmp_path), 50, 2.0, scenario.seed))
    wrong = call(
        "run", str(tmp_path / "case.yaml"), "--set", "workload.fingerprint=yours", "--out", str(tmp_path / "out")
    )
    assert wrong.returncode == 2
    assert (
        "fingerprint 'yours' is neither a preset (azure-conversation-2023, mooncake-conversation) nor a file"
        in wrong.stderr
    )
    slow = call(
        "run", str(tmp_path / "case.yaml"), "--set", "workload.requests=2000000", "--set", "workload.rate_scale=1e-6"
    )
    assert slow.returncode == 2
    assert "the last request would arrive after" in slow.stderr


@pytest.mark.parametrize("suffix", [".html", ".png", ".svg"])
def test_source_and_drawn_side_by_side(suffix, tmp_path):
    source = tools()
    compared = compare(source, draw(measure(source, "tools"), len(source), 1.0, 0))
    figures = {figure.name: figure for figure in compared.figures}
    assert figures["input_tokens p50"].source == np.median(source.input_tokens)
    assert figures["infinite-cache hit ratio"].source == hit_ratio(source)
    assert figures["requests per minute"].source == pytest.approx(300, rel=0.05)
    assert abs(figures["index of dispersion over 5 s"].off) < 0.2
    assert sum(compared.counts[0]) == len(source)
    plot_comparison(compared, "tools", tmp_path / f"tools{suffix}")
    assert (tmp_path / f"tools{suffix}").stat().st_size > 10_000
    with pytest.raises(InputError, match="allowed: .html, .png, .svg"):
        plot_comparison(compared, "tools", tmp_path / "tools.pdf")
