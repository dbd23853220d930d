"""Every format of traces: what a request, a time, a session is in it, and what is said where a file is damaged."""

import json
import re
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from conftest import AFFINE, ROOT, run_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from twotower_sim import text_file
from twotower_sim.errors import InputError
from twotower_sim.readers import FORMATS, Trace, read_trace
from twotower_sim.readers.columns import Columns
from twotower_sim.readers.log import read_log
from twotower_sim.scenario import Scenario

EXAMPLES = {
    path.name.partition(".")[0]: path
    for path in sorted((ROOT / "traces" / "examples").iterdir())
    if path.suffix != ".parquet"
}
STARTS = {"kind": "constant", "rate_rps": 0.1}


def example(name: str) -> str:
    return "".join(text_file.lines(EXAMPLES[name]))


def read(tmp_path, text: str | bytes, *options) -> Trace:
    path = tmp_path / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_trace(path, *options)


def lines(*objects: dict) -> str:
    return "".join(json.dumps(of) + "\n" for of in objects)


def lengths(trace: Trace) -> list[tuple[int, int]]:
    return list(zip(trace.requests.input_tokens.tolist(), trace.requests.output_tokens.tolist(), strict=True))


def seconds(trace: Trace) -> list[float]:
    return (trace.requests.arrival_ns / 1e9).tolist()


def waits(trace: Trace) -> list[list[tuple]]:
    """Of each request, what it waits for: which, seconds, and "sent" if from when that was sent."""
    of = trace.requests.after
    assert of is not None
    each = [
        (int(on), ns / 1e9, *(["sent"] if sent else []))
        for on, ns, sent in zip(of.on, of.delay_ns, of.dispatch, strict=True)
    ]
    return [each[first:end] for first, end in pairwise(of.first.tolist())]


def blocks(trace: Trace) -> list[list[int]]:
    prefixes = trace.requests.prefixes
    assert prefixes is not None
    return [prefixes.of(request).tolist() for request in range(len(trace.requests))]


# ---------------------------------------------------------------------- every format


@pytest.mark.parametrize("sessions", ["closed", "open"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs(name, sessions):
    relative = getattr(FORMATS[name], "RELATIVE", False)
    load = {"kind": "trace", "path": str(EXAMPLES[name]), "format": name, "sessions": sessions}
    load |= {"session_starts": STARTS} if relative else {}
    _, results = run_of(workload=load, latency=AFFINE)
    trace = read_trace(EXAMPLES[name], name)
    assert sorted(results.columns.input_tokens.tolist()) == sorted(trace.requests.input_tokens.tolist())
    assert (results.columns.finish_ns > results.columns.arrival_ns).all()
    if relative:
        with pytest.raises(InputError, match="not when sessions start; give workload.session_starts"):
            run_of(workload=load | {"session_starts": None}, latency=AFFINE)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("change", ["crlf", "bom", "blank lines"])
def test_ways_to_write_the_same(tmp_path, name, change):
    text = example(name)
    changed = {"crlf": text.replace("\n", "\r\n"), "bom": "\ufeff" + text, "blank lines": "\n" + text + "\n \n"}[change]
    trace, same = read(tmp_path, changed, name), read_trace(EXAMPLES[name], name)
    assert (lengths(trace), seconds(trace)) == (lengths(same), seconds(same))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_forced_format_is_held_to(tmp_path, name):
    """No file of another format reads as this one, but for those that have the same names."""
    alike = {("mooncake", "mooncake_delta"), ("mooncake_delta", "mooncake")}
    alike |= {(name, "bailian") for name in ("mooncake", "mooncake_delta")}
    for other in EXAMPLES:
        if other != name and (name, other) not in alike:
            with pytest.raises(InputError):
                read(tmp_path, example(other), name)


# ---------------------------------------------------------------------- damage

DAMAGE = [
    # format, what is replaced (once), by what, what is said; "" where a line more is skipped
    ("mooncake", '"output_length": 52', '"output_length": 0', ":2: output_length: found 0; expected a whole number"),
    ("mooncake", '"timestamp": 3000', '"timestamp": -1', ":3: timestamp: found -1; expected milliseconds from 0"),
    ("mooncake", '"timestamp": 3000', '"timestamp": "3"', ":3: timestamp: found '3'; expected milliseconds"),
    ("mooncake", '"timestamp": 3000, ', "", ":3: timestamp is missing"),
    ("mooncake", '"input_length": 1100, ', '"text_input": "hello", ', ":2: input_length is missing: the row has text_input"),
    ("mooncake", '"input_length": 1100, ', '"messages": [], ', "the row has messages, and to count its tokens takes a tok"),
    ("mooncake", '"timestamp": 3000', '"session_id": [], "timestamp": 0', ":3: session_id: found []; expected text or"),
    ("mooncake", '"timestamp": 3000', '"session_id": 1, "delay": -5', ":3: delay: found -5; expected milliseconds"),
    ("mooncake", "[0, 14, 15]", "[0, 14]", ":2: hash_ids: found 2 for 1100 tokens; expected one for each block of 512, 3"),
    ("mooncake", "[0, 14, 15]", '[0, 14, "15"]', ":2: hash_ids: expected a list of whole numbers of 64 bits"),
    ("mooncake_delta", '"delay": 2500, ', "", ":3: timestamp is missing"),
    ("mooncake_delta", "[4]", "[4, 5, 6]", ":3: hash_ids: found 3 for 40 new tokens; expected one for each block of 512, 1"),
    ("mooncake_delta", "[4]", "4", ":3: hash_ids: expected a list of whole numbers"),
    ("mooncake_delta", '"output_length": 310', '"output_length": 2147483647', ":3: input_length: the session comes to 1340"),
    ("agentic_mooncake", '"request_id": "p1:main:0", ', "", ":5: request_id is missing"),
    ("agentic_mooncake", '"not_before_ms": 1200', '"not_before_ms": "soon"', ":5: not_before_ms: found 'soon'"),
    ("agentic_mooncake", '"trigger": "dispatch"', '"trigger": "start"', ":3: dependencies.trigger: found 'start'; allowed: dis"),
    ("agentic_mooncake", '"delay_ms": 250.5', '"delay_ms": -1', ":3: dependencies.delay_ms: found -1; expected"),
    ("agentic_mooncake", '"hash_ids": [0], ', '"hash_ids": [0, 1, 2], ', ":3: hash_ids: found 3 for 64 tokens"),
    ("agentic_mooncake", '"hash_ids": [0], ', '"hash_ids": [0.5], ', ":3: hash_ids: expected a list of whole numbers"),
    ("azure", "2023-11-16 18:00:04.5", "16/11/2023 18:00:04", ":4: TIMESTAMP: found '16/11/2023 18:00:04000000'; expected YY"),
    ("azure", ",879,", ",NaN,", ":4: ContextTokens: found 'NaN'"),
    ("azure", ",55", ",0", ":4: GeneratedTokens: found '0'"),
    ("burstgpt", "45.5,,", "noon,,", ":3: Timestamp: found 'noon'; expected seconds from 0"),
    ("burstgpt", "11.25", "-11.25", ":4: Elapsed time: found '-11.25'; expected seconds"),
    ("burstgpt", "GPT-4,1360,27", "GPT-4,0,27", ":6: Request tokens: found '0'; expected a whole number of tokens from 1"),
    ("burstgpt", "GPT-4,1360,27", "GPT-4,1e3,27", ":6: Request tokens: found '1e3'"),
    ("burstgpt", "11.25,ChatGPT", "11.25,ChatGPT,", ":4: found 9 columns; expected 8"),
    ("bailian", '"chat_id": 160, ', "", ":2: chat_id is missing"),
    ("bailian", '"chat_id": 160', '"chat_id": 159', ":2: request 159 was there before"),
    ("bailian", '"timestamp": 61.5', '"timestamp": -61.5', ":2: timestamp: found -61.5; expected seconds from 0"),
    ("bailian", "[8, 9]", "[8, 9, 10]", ":4: hash_ids: found 3 for 20 tokens; expected one for each block of 16, 2"),
    ("bailian", '"hash_ids": [8, 9]', '"hash_ids": null', ":4: hash_ids: none, though others have"),
    ("vidur", "2.5,", "nan,", ":4: arrived_at: found 'nan'; expected seconds"),
    ("vidur", "2.5,87,", "2.5,", ":4: found 2 columns; expected 3"),
    ("vidur", ",640", ",640.5", ":4: num_decode_tokens: found '640.5'"),
    ("splitwise", "0.0525", "-0.0525", ":3: arrival_timestamp: found '-0.0525'"),
    ("weka", '"out": 7', '"out": -7', ":2: requests[0]: out: found -7; expected a whole number of tokens from 0"),
    ("weka", '"t": 5.0', '"t": null', ":2: requests[1]: t is missing"),
    ("weka", '"hash_ids": [1, 4], "api_time": 1.5', '"hash_ids": 4, "api_time": 1.5', ":1: requests[1].requests[0]: hash_ids: found 4;"),
    ("weka", '"hash_ids": [1, 2, 3, 5, 6], ', '"hash_ids": [1], ', ":1: hash_ids: found 1 for 320 tokens; expected one for each block of 64, 5"),
    ("weka", '"ttft": 0.5', '"ttft": 2.5', ":1: requests[0]: the finish comes 0.5 s before the first token"),
    ("weka", '"t": 2.5, "type": "subagent"', '"t": "x", "type": "subagent"', ":1: requests[1]: t: found 'x'; expected seconds"),
    ("weka", '"duration_ms": 4000', '"duration_ms": true', ":1: requests[1]: duration_ms: found True; expected milliseconds"),
    ("aiperf", '"value": 250.0, "unit": "ms"', '"value": 250.0, "unit": "min"', ":2: metrics.request_latency.unit: found 'min'; allowed"),
    ("aiperf", '"request_start_ns": 1759813208833150363', '"request_start_ns": 1.5e300', ":3: metadata.request_start_ns: found 1.5e+300"),
    ("aiperf", '"x_correlation_id": "c1"', '"x_correlation_id": {}', ":2: metadata.x_correlation_id: found {}; expected text"),
    ("otlp", '"intValue": "40"', '"intValue": "-40"', "resourceSpans[0].scopeSpans[0].spans[2]: gen_ai.usage.output_tokens: found -40"),
    ("otlp", '"startTimeUnixNano": "1759813208433150363"', '"startTimeUnixNano": "1759813209433150363"', "spans[2]: the finish comes 0.5 s before the arrival"),
    ("otlp", '{"intValue": "812"}', '{"intValue": "many"}', "scopeSpans[0].spans[2]: attributes: found [{"),
    ("bench", "[0.03, 0.1]", "[0.03, -0.1]", "itls[1]: found -0.1; expected seconds"),
    ("bench", "1000.0,", "null,", "start_times[1] is missing"),
    ("columns", ",550,", ",5_50,", ":3: input_tokens: found '5_50'"),
    ("columns", "1,b,0.500000000", "1,b,", ":3: arrival_s: found ''; expected seconds"),
    ("columns", "1,b,0.500000000", "1,b,0.7", ":3: the first token comes 0.0995 s before the arrival"),
    ("dynamo", '"request_received_ms": 1759813208010, ', "", ":3: request.request_received_ms is missing"),
    ("dynamo", '"request_id": "r1"', '"request_id": "r0"', ":3: request 'r0' was there before"),
    ("dynamo", '"trace_block_size": 16, "input_length": 64', '"trace_block_size": 32, "input_length": 64', ":3: hashed blocks have 32 tokens; they had 16"),
    ("dynamo", "3, 17, 18]", "3, 17, 18446744073709551616]", ":3: hash_ids: expected a list of whole numbers of 64 bits"),
    ("applied_compute_agentic", '"num_turns": 1', '"num_turns": 2', ":3: assistant_response_length: found 1 elements; num_turns is 2"),
    ("applied_compute_agentic", "[40]", "[0]", ":3: assistant_response_length[0]: found 0"),
    ("applied_compute_agentic", "[4]", "[-4]", ":3: tool_call_latency[0]: found -4; expected seconds"),
    ("llmservingsim", '"input_toks": 420, ', "", ":2: sub_requests[1].input_toks is missing"),
    ("aibrix", '"prompt_length": 64', '"prompt_length": "64"', ":1: requests[1]: prompt_length: found '64'"),
    ("apex", '"StartTimeOffset": 52500000', '"StartTimeOffset": -52500000', ":2: StartTimeOffset: found -52500000; expected nano"),
    ("copilot", "2026-02-03T10:00:01Z", "3 February", ":2: turns[0].llm_calls[0]: timestamp: found '3 February'; expected"),
    ("copilot", '"prompt": 600, ', "", ":2: turns[0].llm_calls[0]: tokens.prompt is missing"),
    ("tracelab", '"event_type": "user_message", "timestamp": "2026-01-05T08:00:01', '"event_type": "text", "timestamp": "then', ":3: timing_events.timestamp: found 'then"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "said"), DAMAGE)
def test_damage_is_named_or_skipped(tmp_path, name, old, new, said):
    text = example(name)
    assert old in text
    damaged = text.replace(old, new, 1)
    with pytest.raises(InputError) as error:
        read(tmp_path, damaged, name)
    assert str(error.value).startswith(str(tmp_path / "trace"))
    assert said in str(error.value)
    trace, whole = read(tmp_path, damaged, name, "skip"), read_trace(EXAMPLES[name], name)
    assert trace.skipped == whole.skipped | {"malformed": 1}
    assert trace.first_bad == str(error.value)
    if old not in ('"duration_ms": 4000', '"t": 2.5, "type": "subagent"') and name not in (
        "applied_compute_agentic",
        "llmservingsim",
    ):
        assert len(trace.requests) == len(whole.requests) - 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_format_has_damage_to_show(name):
    assert any(row[0] == name for row in DAMAGE)


@pytest.mark.parametrize(
    ("name", "column"),
    [("azure", "TIMESTAMP"), ("burstgpt", "Response tokens"), ("vidur", "arrived_at"), ("splitwise", "token_size"), ("columns", "output_tokens")],
)  # fmt: skip
def test_a_column_that_is_missing(tmp_path, name, column):
    with pytest.raises(InputError, match=rf":1: column {column} is missing; found "):
        read(tmp_path, example(name).replace(column, "other", 1), name)


def test_bench_results_without_arrivals(tmp_path):
    with pytest.raises(InputError, match="start_times is missing, without which nobody knows when requests came"):
        read(tmp_path, example("bench").replace("start_times", "other"))


DEEP = "[" * 1000 + "]" * 1000


@pytest.mark.parametrize("name", [name for name, path in EXAMPLES.items() if ".json" in path.name])
def test_any_value_may_be_of_any_kind(tmp_path, name):
    """Each value in turn, of every object, is replaced by values of all kinds; only InputError may come of it."""
    objects = (
        [json.loads(line) for line in example(name).splitlines()]
        if name not in ("otlp", "bench")
        else [json.loads(example(name))]
    )
    for of in objects[:2]:
        for holder, key in places_of(of):
            was = holder[key]
            for value in (None, True, -1, 0, 1.5, 1e300, 2**63, 10**30, "", "x", [], [None], {}, {"a": 1}, "deep"):
                holder[key] = value
                text = "".join(
                    json.dumps(other).replace('"deep"', DEEP if value == "deep" else '"deep"') + "\n"
                    for other in objects
                )
                for on_error in ("fail", "skip"):
                    assert len(refusal(lambda: read(tmp_path, text, name, on_error))) < 1000  # noqa: B023
            holder[key] = was


def refusal(read, otherwise: str = "") -> str:
    """What is said where a file is refused; anything but InputError fails the test."""
    try:
        read()
    except InputError as error:
        return str(error)
    return otherwise


def places_of(of):
    for key in of if isinstance(of, dict) else range(len(of)):
        yield of, key
        if isinstance(of[key], dict | list):
            yield from places_of(of[key])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["auto", *FORMATS]))
def test_any_bytes_read_or_are_refused(tmp_path_factory, raw, name):
    path = tmp_path_factory.mktemp("any") / "trace"
    path.write_bytes(raw)
    assert refusal(lambda: read_trace(path, name), str(path)).startswith(str(path))


CUTS = st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.text(max_size=12))


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(EXAMPLES)), st.lists(CUTS, min_size=1, max_size=4), st.sampled_from(["fail", "skip"]))
def test_any_edit_reads_or_is_refused(tmp_path_factory, name, cuts, on_error):
    text = example(name)
    for at, length, new in cuts:
        at %= len(text)
        text = text[:at] + new + text[at + length :]
    path = tmp_path_factory.mktemp("any") / "trace"
    path.write_bytes(text.encode("utf-8", "replace"))
    for read in (lambda: read_trace(path, name, on_error), lambda: read_trace(path), lambda: read_log(path, name)):
        assert refusal(read, str(path)).startswith(str(path))


# ---------------------------------------------------------------------- packed and large


def test_long_lines_and_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "LONGEST_LINE", 1 << 20)
    long = example("mooncake") + '{"timestamp": 0, "x": "' + "x" * (3 << 20)
    with pytest.raises(InputError, match=r"trace:4: a line of more than 1 MiB; expected a request"):
        read(tmp_path, long)
    from backports import zstd  # compression.zstd from Python 3.14 on

    monkeypatch.setattr(text_file, "BOMB_BYTES", 1 << 20)
    for pack in (text_file.gzip.compress, zstd.compress):
        with pytest.raises(InputError, match="unpacks to more than 200 times its size"):
            read(tmp_path, pack(b"\n" * (64 << 20)))


def test_packed_files_that_break_off(tmp_path):
    from backports import zstd

    text = example("vidur").encode() * 50
    for raw in (
        zstd.compress(text)[:-9],
        text_file.gzip.compress(text)[:-9],
        zstd.compress(text)[:9],
        b"\x28\xb5\x2f\xfdno",
    ):
        with pytest.raises(InputError, match="trace: cannot be read"):
            read(tmp_path, raw, "vidur")


# ---------------------------------------------------------------------- what is in each


def test_mooncake_turns_as_aiperf_has_them(tmp_path):
    trace = read(
        tmp_path,
        lines(
            {"session_id": "a", "timestamp": 500.5, "input_length": 10, "output_length": 5, "request_id": "x", "extra": {}},
            {"timestamp": 700, "input_length": 9, "output_length": 4},
            {"session_id": "a", "delay": 250, "input_length": 30, "output_length": 6, "request_id": "x"},
            {"session_id": "a", "timestamp": 2000, "input_length": 40, "output_length": 7},
        ),
    )  # fmt: skip
    assert seconds(trace) == [0, 0.1995, 0.25, 1.4995]
    assert trace.requests.sessions.tolist() == [0, 1, 0, 0]
    assert waits(trace) == [[], [], [(0, 0.25)], [(2, 0)]]
    assert trace.requests.after.binding.tolist() == [True, True, False, True]


def test_mooncake_deltas_are_summed_up():
    trace = read_trace(EXAMPLES["mooncake_delta"], "mooncake_delta")
    assert lengths(trace) == [(1100, 200), (600, 30), (1100 + 200 + 40, 310), (1340 + 310 + 900, 12)]
    first, other, second, third = blocks(trace)  # full ones; the two sessions start with the same block
    assert (first[:1], len(first), len(second), len(third)) == (other, 2, 2, 4)
    assert first == second == third[:2]
    assert len({*first, *third}) == 4


def test_hash_ids_without_a_sign_stay_apart(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [i]}
        for i in (2**64 - 1, 2**63, 5, 2**64 - 1)
    ]
    ids = [of[0] for of in blocks(read(tmp_path, lines(*rows)))]
    assert ids[0] == ids[3]
    assert len(set(ids)) == 3


def test_agentic_mooncake_waits_for_what_it_says():
    trace = read_trace(EXAMPLES["agentic_mooncake"])
    assert seconds(trace) == [0, 0.2505, 0.9, 1.2]
    assert waits(trace) == [[], [(0, 0.2505, "sent")], [(0, 0.1), (1, 0)], []]
    assert trace.requests.sessions.tolist() == [0, 0, 0, 1]
    assert trace.requests.prefixes.block_tokens == 64
    main, worker, joined, other = blocks(trace)
    assert (main[0], main[:2]) == (worker[0], joined[:2])
    assert not {*main, *joined} & {*other}  # ids of another play mean other blocks


def test_agentic_mooncake_that_cannot_be(tmp_path):
    text = example("agentic_mooncake")
    cases = {
        text.replace('"version": 2', '"version": 3'): r":1: schema and version: found 'dynamo.agentic_mooncake' 3; expected",
        text.replace('"p0:main:0", "trigger"', '"gone", "trigger"'): r":3: waits for request 'gone', which is not in the file",
        text.replace('"not_before_ms": 0, "dependencies": []', '"not_before_ms": 0, "dependencies": [{"request_id": "p0:main:1", "trigger": "completion"}]'): ":2: waits, through others, for itself",
    }  # fmt: skip
    for changed, said in cases.items():
        with pytest.raises(InputError, match=said):
            read(tmp_path, changed)


def test_delays_that_add_up_to_centuries(tmp_path):
    turn = {"session_id": "a", "delay": 4e12, "input_length": 10, "output_length": 5}
    with pytest.raises(InputError, match=r":3: waits, through others, for itself or for more than 146 years"):
        read(tmp_path, lines(turn | {"timestamp": 0}, turn, turn, turn))


def test_burstgpt():
    trace = read_trace(EXAMPLES["burstgpt"])
    assert (seconds(trace), trace.skipped) == ([0, 40.5, 55, 113], {"failed": 1})
    assert lengths(trace) == [(472, 18), (1087, 230), (512, 64), (1360, 27)]
    assert waits(trace) == [[], [], [(0, 60 - 5 - 9.5)], []]


def test_burstgpt_of_the_first_version_has_no_sessions(tmp_path):
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,API log\n7,x,1,2,3,y\n"
    trace = read(tmp_path, text)
    assert (trace.format, seconds(trace), lengths(trace)) == ("burstgpt", [0, 2], [(472, 18), (1, 2)])
    assert trace.requests.sessions is trace.requests.after is None


def test_bailian_chains():
    trace = read_trace(EXAMPLES["bailian"])
    assert np.allclose(seconds(trace), [0, 0.386, 14.136, 18.886, 38.761])
    assert trace.requests.sessions.tolist() == [0, 1, 0, 2, 0]  # the parent of 170 is not there
    assert waits(trace) == [[], [], [(0, 0)], [], [(2, 0)]]
    assert trace.requests.after.binding.all()
    assert trace.requests.prefixes.block_tokens == 16


def test_bailian_blocks_have_16_tokens_however_few_there_are(tmp_path):
    row = {"chat_id": 1, "parent_chat_id": -1, "timestamp": 1.5, "input_length": 9, "output_length": 2, "hash_ids": [4]}
    assert read(tmp_path, lines(row)).requests.prefixes.block_tokens == 16


def test_weka_branches_and_joins():
    """Session s1: main 0, subagent a (1, 3) that main 4 joins, subagent b (2) that nobody waits for, main 5."""
    trace = read_trace(EXAMPLES["weka"])
    assert trace.relative
    assert seconds(trace) == [0, 2.5, 3, 4.5, 7, 11, 0, 5]
    assert lengths(trace)[1:5] == [(128, 10), (60, 5), (190, 30), (320, 40)]
    assert waits(trace) == [
        [], [(0, 0)], [(0, 1)], [(1, 0.5)], [(0, 0.5), (3, 0.5)], [(4, 1)],
        [], [(6, 4.25)],
    ]  # fmt: skip
    assert trace.requests.sessions.tolist() == [0] * 6 + [1] * 2
    assert not trace.requests.after.binding[[1, 2, 3, 4, 5, 7]].any()
    of = blocks(trace)
    assert of[0] == of[4][:3] == of[5][:3]
    assert of[1][0] == of[0][0] != of[6][0]  # ids are local to a session
    assert of[1][1] not in of[0]


def weka(*requests, **more) -> str:
    return lines({"id": "s", "block_size": 64, "hash_id_scope": "local", "requests": list(requests)} | more)


def call(t, api_time=None, **more) -> dict:
    return {"t": t, "type": "n", "in": 10, "out": 1, "hash_ids": [], "api_time": api_time} | more


def agent(t, *requests, **more) -> dict:
    return {"t": t, "type": "subagent", "status": "completed", "requests": list(requests)} | more


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([call(0, 1), call(3)], [[], [(0, 2)]]),
        ([call(0, 1), call(3, think_time=0.5)], [[], [(0, 0.5)]]),
        ([call(0), call(3)], [[], [(0, 3)]]),  # nobody knows how long the first took
        ([call(0, 9), call(3)], [[], [(0, 3, "sent")]]),  # beside it
        ([call(0, 1), agent(2, call(2, 1)), call(4)], [[], [(0, 1)], [(0, 1), (1, 1)]]),
        ([call(0, 1), agent(2, call(0.5, 1)), call(4)], [[], [(0, 1.5)], [(0, 0.5), (1, 0.5)]]),  # from the subagent's start
        ([call(0, 1), agent(2, call(2, 1), duration_ms=1500), call(4)], [[], [(0, 1)], [(0, 0.5), (1, 1)]]),
        ([call(0, 1), agent(2, call(2, 9)), call(4), call(20)], [[], [(0, 1)], [(0, 3)], [(1, 9), (2, 9)]]),  # joined later
        ([call(0, 9), agent(2, call(2, 1)), call(10)], [[], [(0, 2, "sent")], [(0, 1), (1, 1)]]),
        ([agent(1, call(1, 1)), call(4)], [[], []]),  # nothing launched it, and then nothing is before the next
        ([call(0, 1), agent(2), call(4)], [[], [(0, 3)]]),
        ([call(0, 1), agent(1, call(1, 1), agent(3, call(3, 1)), call(5, 1)), call(7)],
         [[], [(0, 0)], [(1, 1)], [(1, 1), (2, 1)], [(0, 1), (3, 1)]]),
    ],
)  # fmt: skip
def test_what_requests_of_agents_wait_for(tmp_path, requests, expected):
    trace = read(tmp_path, weka(*requests))
    assert [sorted(of) for of in waits(trace)] == [sorted(of) for of in expected]


def test_weka_sessions_that_cannot_be(tmp_path):
    nested: dict = call(0)
    for _ in range(400):
        nested = agent(0, nested)
    with pytest.raises(InputError, match="subagents are nested more than 20 deep"):
        read(tmp_path, weka(nested))
    with pytest.raises(InputError, match=r":2: id: session 's' was there before"):
        read(tmp_path, weka(call(0)) * 2)
    skipped = read(tmp_path, weka(call(0), call(1, out=0), call(2)))
    assert (skipped.skipped, waits(skipped)) == ({"without input or output tokens": 1}, [[], [(0, 2)]])


def test_aiperf_turns():
    trace = read_trace(EXAMPLES["aiperf"])
    assert seconds(trace) == [0, 0.2, 1.30025]
    assert (trace.requests.sessions.tolist(), waits(trace)) == ([0, 1, 0], [[], [], [(0, 1)]])


def test_spans_of_a_conversation_are_a_session():
    trace = read_trace(EXAMPLES["otlp"])
    assert (seconds(trace), lengths(trace)) == ([0, 0.90025], [(550, 9), (812, 40)])
    assert waits(trace) == [[], [(0, 0.6)]]


def test_bench_results_are_requests():
    trace = read_trace(EXAMPLES["bench"])
    assert (seconds(trace), lengths(trace)) == ([0, 0.5, 2], [(20, 3), (550, 5), (96, 2)])
    assert trace.requests.sessions is None


def test_other_agents():
    trace = read_trace(EXAMPLES["applied_compute_agentic"])
    assert lengths(trace) == [(1800, 120), (2820, 64), (2914, 210), (350, 80), (1750, 40), (1802, 55)]
    assert waits(trace) == [[], [(0, 1.5)], [(1, 0.25)], [], [], [(4, 4)]]
    assert waits(read_trace(EXAMPLES["llmservingsim"])) == [[], [], [(1, 1.5)], []]
    assert waits(read_trace(EXAMPLES["copilot"])) == [[], [], [(0, 1.475)]]
    assert waits(read_trace(EXAMPLES["tracelab"])) == [[], [], [(0, 1.5)]]
    dynamo = read_trace(EXAMPLES["dynamo"])
    assert waits(dynamo) == [[], [(0, 0.1755)]]
    assert (blocks(dynamo)[0][:2], dynamo.requests.prefixes.block_tokens) == (blocks(dynamo)[1][:2], 16)


def test_dynamo_events_in_envelopes(tmp_path):
    wrapped = "".join(f'{{"event": {line}}}\n' for line in example("dynamo").splitlines())
    trace = read(tmp_path, wrapped)
    assert (trace.format, lengths(trace)) == ("dynamo", lengths(read_trace(EXAMPLES["dynamo"])))


# ---------------------------------------------------------------------- any table

MAPPING = Columns("ts", "prompt", "gen", session="conv", finish="done")
TABLE = "ts,prompt,gen,conv,done\n{},20,3,a,{}\n{},550,9,,{}\n{},30,4,a,\n"


@pytest.mark.parametrize(
    ("unit", "times"),
    [
        ("s", ["1759813207.5", "1759813208.0", "1759813208.25", "1759813208.5", "1759813209"]),
        ("ms", ["1759813207500", "1759813208000.0", "1759813208250", "1.7598132085e12", "1759813209000"]),
        ("us", ["1759813207500000", "1759813208000000", "1759813208250000", "1759813208500000", "1759813209000000"]),
        ("ns", ["1759813207500000000", "1759813208000000000", "1759813208250000000", "1759813208500000000", "1759813209000000000"]),
        ("iso", ["2025-10-07T05:00:07.5Z", "2025-10-07 05:00:08", "2025-10-07T07:00:08.250000000+02:00", "2025-10-07T05:00:08.500", "2025-10-07T05:00:09"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_columns_by_name(tmp_path, unit, times, kind):
    text = TABLE.format(*times)
    if kind == "jsonl":
        _, *rows = (line.split(",") for line in text.splitlines())
        number = str if unit == "iso" else float
        text = lines(*(
            {"ts": number(ts), "prompt": int(prompt), "gen": float(gen), "conv": conv or None, "done": number(done) if done else None}
            for ts, prompt, gen, conv, done in rows
        ))  # fmt: skip
    trace = read(tmp_path, text, Columns("ts", "prompt", "gen", session="conv", finish="done", time_unit=unit))
    assert trace.format == "columns"
    assert np.allclose(seconds(trace), [0, 0.75, 1.5], atol=1e-6)
    assert (lengths(trace), trace.requests.sessions.tolist()) == ([(20, 3), (550, 9), (30, 4)], [0, 1, 0])
    (wait,) = waits(trace)[2]
    assert wait == (0, pytest.approx(1.0, abs=1e-6))


def test_columns_of_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    stamps = pa.array(
        [1759813207500000000, 1759813208250000123, 1759813209000000000],
        pa.timestamp("us", "UTC").__class__ and pa.int64(),
    )
    table = {
        "ts": stamps.cast(pa.timestamp("ns")).cast(pa.timestamp("us"), safe=False),
        "prompt": [20, 550, 30],
        "gen": [3.0, 9.0, 4.0],
        "conv": [1, None, 1],
    }
    parquet.write_table(pa.table(table), path)
    trace = read_trace(path, Columns("ts", "prompt", "gen", session="conv", time_unit="iso"))
    assert (seconds(trace), lengths(trace)) == ([0, 0.75, 1.5], [(20, 3), (550, 9), (30, 4)])
    assert trace.requests.sessions.tolist() == [0, 1, 0]
    with pytest.raises(
        InputError, match=re.escape(f"{path}: row 0: column when is missing; found ts, prompt, gen, conv")
    ):
        read_trace(path, Columns("when", "prompt", "gen"))
    parquet.write_table(pa.table(table | {"gen": [3, None, -4]}), path)
    with pytest.raises(InputError, match=re.escape(f"{path}: row 2: gen: found ''; expected a whole number of tokens")):
        read_trace(path, Columns("ts", "prompt", "gen", time_unit="iso"))
    assert read_trace(path, Columns("ts", "prompt", "gen", time_unit="iso"), "skip").skipped == {"malformed": 2}
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=re.escape(f"{path}: cannot be read: ")):
        read_trace(path)


@pytest.mark.parametrize("option", [{"format": "azure"}, {"columns": None, "time_unit": "ms"}])
def test_options_that_do_not_go_with_columns(option):
    load = {
        "kind": "trace",
        "path": "x",
        "columns": {"arrival": "a", "input_tokens": "b", "output_tokens": "c"},
    } | option
    with pytest.raises(ValueError, match=r"with columns it is 'columns'|time_unit: goes with columns"):
        Scenario.model_validate({"workload": load})


def test_scenarios_know_every_format():
    from twotower_sim.scenario_workload import TraceFormat

    assert set(TraceFormat.__args__) == {"auto", *FORMATS}
