"""Several loads at once: shares and rates, what parts have in common (nothing), classes and objectives of parts."""

from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import AFFINE, ROOT, run_of, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check
from test_sessions import conversations

from twotower_sim.console import _lines
from twotower_sim.draws import seed_of
from twotower_sim.errors import InputError
from twotower_sim.mix import mix
from twotower_sim.requests import Prefixes, Requests, merged
from twotower_sim.result import summary
from twotower_sim.scenario import Scenario, load_scenario
from twotower_sim.simulation import prepare

EXAMPLES = ROOT / "traces" / "examples"
S = 1_000_000_000


def every(gap_s: float, count: int, **more) -> Requests:
    """A request every so many seconds from 0 on, with as many input tokens as its number."""
    number = np.arange(count)
    return Requests((number * gap_s * S).astype(np.int64), number + 1, np.full(count, 8), **more)


def load(*, rate_rps=None, requests=None, **parts) -> dict:
    return {"kind": "mix", "parts": parts, "rate_rps": rate_rps, "requests": requests}


def prepared(workload: dict, **sections):
    return prepare(Scenario.model_validate({"workload": workload, "latency": AFFINE} | sections), ROOT)


CHAT = {"workload": synthetic(requests=600, rate_rps=30, input_tokens=100)}
BATCH = {"workload": synthetic(requests=100, rate_rps=10, input_tokens=900)}


# ---------------------------------------------------------------------- merging


@st.composite
def loads(draw):
    """Requests that share prefixes, or wait for others, or neither."""
    requests = draw(conversations())
    if draw(st.booleans()):
        counts = draw(st.lists(st.integers(0, 4), min_size=len(requests), max_size=len(requests)))
        first = np.concatenate(([0], np.cumsum(counts)))
        hashes = np.array(draw(st.lists(st.integers(0, 5), min_size=sum(counts), max_size=sum(counts))), np.int64)
        requests = replace(requests, prefixes=Prefixes(first, hashes, 16))
    if draw(st.booleans()):
        sessions = draw(st.lists(st.integers(-3, 3), min_size=len(requests), max_size=len(requests)))
        requests = replace(requests, sessions=np.array(sessions))
    return requests if draw(st.booleans()) else replace(requests, after=None)


@settings(max_examples=100, deadline=None)
@given(st.lists(loads(), min_size=1, max_size=4))
def test_merging_keeps_all_that_a_load_says_and_adds_nothing(parts):
    whole, part = merged(parts)
    assert (np.diff(whole.arrival_ns) >= 0).all()
    at = [np.flatnonzero(part == index) for index in range(len(parts))]  # of each part, its requests in the whole
    seen: dict[int, tuple[int, int]] = {}
    for index, (of, rows) in enumerate(zip(parts, at, strict=True)):
        back = whole.take(rows)
        for column in ("arrival_ns", "input_tokens", "output_tokens"):
            assert (getattr(back, column) == getattr(of, column)).all()
        if of.sessions is not None:
            assert same_groups(back.sessions, of.sessions)
        elif back.sessions is not None:
            assert len(set(back.sessions.tolist())) == len(of)
        if of.prefixes:
            assert (back.prefixes.first == of.prefixes.first).all()
            assert same_groups(back.prefixes.hashes, of.prefixes.hashes)
        elif back.prefixes:
            assert not len(back.prefixes.hashes)
        if of.after:
            for name in ("first", "on", "delay_ns", "dispatch", "binding"):
                assert (getattr(back.after, name) == getattr(of.after, name)).all()
        elif back.after:
            assert not len(back.after.on)
            assert back.after.binding.all()
        for kind, numbers in enumerate((back.sessions, back.prefixes.hashes if back.prefixes else None)):
            for number in [] if numbers is None else numbers.tolist():
                assert seen.setdefault((kind, number), index) == index  # no other part has it
    if whole.after:
        owner = np.repeat(np.arange(len(whole)), np.diff(whole.after.first))
        assert (part[owner] == part[whole.after.on]).all()


def same_groups(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether numbers are equal where others are."""
    return len(set(zip(found.tolist(), expected.tolist(), strict=True))) == len(set(found)) == len(set(expected))


def test_at_one_instant_parts_come_in_their_order():
    _, part = merged([every(2.0, 3), every(1.0, 4)])
    assert part.tolist() == [0, 1, 1, 0, 1, 1, 0]


def test_prefixes_in_blocks_of_different_sizes_do_not_mix():
    parts = {
        str(size): every(1.0, 2, prefixes=Prefixes(np.arange(3), np.zeros(2, np.int64), size)) for size in (512, 16)
    }
    with pytest.raises(InputError, match=r"^workload.parts: prefixes are hashed in blocks of 16 and 512 tokens"):
        mix(parts, None, None, None)


# ---------------------------------------------------------------------- shares and rates


def test_without_shares_each_part_keeps_its_times_until_the_first_ends():
    mixed = mix({"a": every(1.0, 11), "b": every(0.5, 100)}, None, None, None)
    assert mixed.requests.arrival_ns[mixed.part == 0].tolist() == [i * S for i in range(11)]
    assert mixed.requests.arrival_ns[mixed.part == 1].tolist() == [i * S // 2 for i in range(21)]  # to 10 s
    assert mixed.notes == ["the mix ends where a does; requests left out: 79 of 100 of b"]
    assert mix({"a": every(1.0, 11), "b": every(0.5, 21)}, None, None, None).notes == []


def test_shares_are_of_the_rate_of_all_together():
    """1/s and 2/s are 3/s: a quarter is 0.75/s, three quarters 2.25/s."""
    parts = {"a": every(1.0, 1001), "b": every(0.5, 4001)}
    mixed = mix(parts, {"a": 0.25, "b": 0.75}, None, None)
    for index, rate in enumerate((0.75, 2.25)):
        gaps_s = np.diff(mixed.requests.arrival_ns[mixed.part == index]) / 1e9
        assert gaps_s == pytest.approx(np.full(len(gaps_s), 1 / rate), rel=1e-8)
    assert (mixed.part == 0).mean() == pytest.approx(0.25, abs=0.001)
    assert mixed.requests.arrival_ns[-1] == pytest.approx(1000 / 0.75 * S, rel=1e-3)


def test_a_rate_without_shares_keeps_the_proportions():
    mixed = mix({"a": every(1.0, 1001), "b": every(0.5, 2001)}, None, 30.0, None)
    assert np.diff(mixed.requests.arrival_ns[mixed.part == 0]).mean() == pytest.approx(S / 10, rel=1e-6)
    assert np.diff(mixed.requests.arrival_ns[mixed.part == 1]).mean() == pytest.approx(S / 20, rel=1e-6)


def test_only_so_many_requests():
    mixed = mix({"a": every(1.0, 11), "b": every(0.5, 100)}, None, None, 7)
    assert (len(mixed.requests), mixed.notes) == (7, [])
    more = mix({"a": every(1.0, 11), "b": every(0.5, 100)}, None, None, 33)
    assert len(more.requests) == 32
    assert more.notes


def test_drawn_parts_have_their_shares_and_the_mix_its_rate():
    """Times are scaled to exact mean gaps; what is left is how many of b fall before a's end: sqrt(5000) of them."""
    parts = {name: {"share": share, "workload": synthetic(requests=10_000, rate_rps=rate)}
             for name, share, rate in (("a", 0.5, 3), ("b", 0.3, 3), ("c", 0.2, 40))}  # fmt: skip
    run = prepared(load(**parts, rate_rps=20.0))
    assert np.bincount(run.classes) / len(run.requests) == pytest.approx([0.5, 0.3, 0.2], abs=0.01)
    assert len(run.requests) / (run.requests.arrival_ns[-1] / 1e9) == pytest.approx(20, rel=0.03)


def test_bursts_stay_bursts():
    """Shares scale time, so that gaps keep their coefficient of variation."""
    bursty = synthetic(requests=20_000) | {"arrivals": {"kind": "gamma", "rate_rps": 1, "cv": 3}}
    run = prepared(load(a={"share": 0.5, "workload": bursty}, b={"share": 0.5, "workload": bursty}, rate_rps=8.0))
    for index in range(2):
        gaps = np.diff(run.requests.arrival_ns[run.classes == index])
        assert gaps.std() / gaps.mean() == pytest.approx(3, rel=0.1)


# ---------------------------------------------------------------------- draws


def test_parts_draw_from_their_own_seeds():
    """Two equal sections give different requests; a third part, or another order, changes neither."""

    def lengths(*names: str) -> dict[str, list[int]]:
        run = prepared(load(**dict.fromkeys(names, CHAT)))
        of = run.scenario.workload.class_names
        return {name: run.requests.input_tokens[run.classes == of.index(name)][:100].tolist() for name in names}

    two, three = lengths("a", "b"), lengths("c", "b", "a")
    assert two["a"] != two["b"]
    assert two == {name: three[name] for name in two}
    assert len({seed_of(seed, name) for seed in range(3) for name in ("a", "b", "ab", "ba", "")}) == 15


def test_classes_of_a_part_are_drawn_within_it():
    shares = {"short": 0.8, "long": 0.2}
    run = prepared(load(chat={"workload": CHAT["workload"] | {"classes": shares}}, batch=BATCH))
    assert run.scenario.workload.class_names == ["chat/short", "chat/long", "batch"]
    found = np.bincount(run.classes, minlength=3)
    assert found[2] <= 100
    assert found[0] / found[:2].sum() == pytest.approx(0.8, abs=0.08)  # of some 300: standard error 2.3 %


# ---------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("kind", ["two_tower", "autoregressive"])
def test_a_mix_of_a_trace_and_drawn_load_runs(kind):
    trace = {"kind": "trace", "path": str(EXAMPLES / "mooncake.jsonl")}
    workload = load(a={"workload": trace}, b={"workload": synthetic(requests=500, rate_rps=20)})
    cached = {"prefix_cache": {"kind": "attention"}}
    run, results = run_of(workload=workload, decoding={"kind": kind}, memory=cached, latency=AFFINE)
    check(run, results)
    assert set(results.classes) == {"a", "b"}
    assert run.requests.prefixes.block_tokens == 512


def test_a_part_has_its_own_threshold():
    run, results = run_of(
        workload=load(chat=CHAT, batch=BATCH),
        decoding={"kind": "two_tower", "gamma_by_class": {"batch": 0.6}},
    )
    check(run, results)
    output = run.requests.output_tokens
    blocks = [(-(-output[run.classes == index] // 16)).sum() for index in (0, 1)]
    assert results.quality["0.6"]["share_of_blocks"] == pytest.approx(blocks[1] / sum(blocks))


def test_a_part_has_its_own_objectives():
    own = {"request_latency_ms": 1000.0}
    run, results = run_of(
        workload=load(chat=CHAT, batch=BATCH | {"slo": own}), latency=AFFINE, slo={"time_to_first_token_ms": 350.0}
    )
    c = results.columns
    chat, batch = run.classes == 0, run.classes == 1
    first_ms, latency_ms = (c.first_ns - c.arrival_ns) / 1e6, (c.finish_ns - c.arrival_ns) / 1e6
    good = np.where(batch, latency_ms <= 1000, first_ms <= 350)
    for index, mine in enumerate((chat, batch)):
        name = run.scenario.workload.class_names[index]
        assert 0 < good[mine].mean() < 1
        assert results.classes[name]["good_request_fraction"]["avg"] == pytest.approx(good[mine].mean())
    assert results.metrics["good_request_fraction"]["avg"] == pytest.approx(good.mean())
    seconds = (c.finish_ns.max() - c.arrival_ns.min()) / 1e9
    assert results.metrics["goodput"]["avg"] == pytest.approx(good.sum() / seconds)
    lines = [line for line in _lines(summary(run, results)) if line.startswith("Class")]
    assert [f"{good[mine].mean():.1%} good" in line for line, mine in zip(lines, (chat, batch), strict=True)] == [
        True
    ] * 2


def test_a_part_without_objectives_is_good_beside_one_that_has_some():
    _, results = run_of(workload=load(chat=CHAT, batch=BATCH | {"slo": {"request_latency_ms": 1e-3}}), latency=AFFINE)
    fraction = {name: of["good_request_fraction"]["avg"] for name, of in results.classes.items()}
    assert fraction == {"chat": 1, "batch": 0}
    _, none = run_of(workload=load(chat=CHAT, batch=BATCH), latency=AFFINE)
    assert none.metrics["goodput"]["avg"] is None
    assert none.classes["chat"]["good_request_fraction"]["avg"] is None


# ---------------------------------------------------------------------- the file

MIXED = """\
workload:
  kind: mix
  parts:
    chat:
      workload:
        kind: synthetic
        requests: 30
        arrivals: {kind: markov, states: [{rate_rps: 5, mean_s: 9}, {rate_rps: 50, mean_s: 1}]}
        input_tokens: {kind: constant, value: 100}
        output_tokens: {kind: constant, value: 40}
    batch:
      slo: {request_latency_ms: 9000}
      workload:
        kind: synthetic
        requests: 30
        arrivals: {kind: poisson, rate_rps: 4}
        input_tokens: {kind: constant, value: 100}
        output_tokens: {kind: constant, value: 40}
"""


def test_a_mix_reads_back_as_itself_and_is_overridden(tmp_path):
    (tmp_path / "case.yaml").write_text(MIXED)
    more = ["workload.parts.chat.workload.requests=50", "workload.parts.batch.workload.arrivals.rate_rps=9"]
    scenario = load_scenario(tmp_path / "case.yaml", more)
    assert scenario.workload.parts["chat"].workload.requests == 50
    assert scenario.workload.parts["batch"].workload.arrivals.rate_rps == 9
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(scenario.model_dump(by_alias=True)))
    assert load_scenario(tmp_path / "case.yaml") == scenario


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("workload.classes={a: 1.0}", "workload.classes: unknown key; allowed: kind, parts, rate_rps, requests"),
        ("workload.parts.chat.share=0.5", "workload: parts.batch.share: is missing; every part has one, or none has"),
        ("workload.parts.chat.share=1.5", "workload.parts.chat.share: found 1.5"),
        ("workload.parts.chat.shares=0.5", "workload.parts.chat.shares: unknown key (did you mean share?)"),
        ("workload.parts.chat.slo={latency_ms: 5}", "workload.parts.chat.slo.latency_ms: unknown key"),
        ("workload.parts={chat: {workload: {}}}", "workload.parts.chat.workload.kind: is missing; allowed: "),
        ("workload.parts.chat.workload.kind=closed_loop", "workload.parts.chat.workload.kind: found 'closed_loop'; allowed: trace, "),
        ("workload.parts.chat.workload.kind=mix", "workload.parts.chat.workload.kind: found 'mix'; allowed: trace, "),
        ("workload.parts.chat.workload.requests=0", "workload.parts.chat.workload.requests: found 0"),
        ("workload.parts.chat.workload.arrivals.states=[{rate_rps: 1, mean_s: 0}]", "workload.parts.chat.workload.arrivals.states.0.mean_s: found 0"),
        ("workload.parts.batch.workload.arrivals.rate=3", "case.yaml:17: workload.parts.batch.workload.arrivals.rate: unknown key (did you mean rate_rps?)"),
        ("workload.parts.a b={}", "workload.parts.a b: found 'a b'; string should match pattern"),
        ("workload.parts={}", "workload.parts: found {}"),
        ("workload.rate_rps=0", "workload.rate_rps: found 0"),
        ("workload.requests=0", "workload.requests: found 0"),
        ("decoding.gamma_by_class={chats: 0.6}", "decoding.gamma_by_class: found 'chats'; allowed: chat, batch"),
    ],
)  # fmt: skip
def test_bad_mixes_are_named(tmp_path, override, said):
    (tmp_path / "case.yaml").write_text(MIXED)
    with pytest.raises(InputError) as error:
        load_scenario(tmp_path / "case.yaml", [override])
    text = str(error.value).replace(f"--set {override}", "case.yaml:17")
    assert said in text
    assert "pydantic" not in text


def test_shares_add_up(tmp_path):
    (tmp_path / "case.yaml").write_text(MIXED)
    shares = [f"workload.parts.{name}.share=0.4" for name in ("chat", "batch")]
    with pytest.raises(InputError, match="workload: parts: the shares add up to 0.8; expected 1"):
        load_scenario(tmp_path / "case.yaml", shares)


def test_what_is_wrong_in_a_part_names_it():
    late = {"workload": {"kind": "trace", "path": "no.jsonl"}}
    with pytest.raises(InputError, match=r"^workload.parts.a: .*no.jsonl: cannot be read"):
        prepared(load(a=late, b=BATCH))
    one = {"share": 0.5, "workload": synthetic(requests=1)}
    with pytest.raises(InputError, match=r"^workload.parts.a: its 1 requests arrive at one time, so that they have no"):
        prepared(load(a=one, b=BATCH | {"share": 0.5}))
    assert len(prepared(load(a={"workload": synthetic(requests=1)}, b=BATCH)).requests) >= 1


def test_requests_from_elsewhere_are_of_no_part():
    scenario = Scenario.model_validate({"workload": load(chat=CHAT, batch=BATCH), "latency": AFFINE})
    with pytest.raises(InputError, match="workload.kind: found mix; requests that come from elsewhere"):
        prepare(scenario, ROOT, every(1.0, 3))
