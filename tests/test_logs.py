"""Logs of real engines: what is read of every family, what is skipped, and what is said of damaged ones."""

import gzip
import json

import numpy as np
import pytest
from conftest import AFFINE, ROOT, run_of, synthetic

from twotower_sim.errors import InputError
from twotower_sim.measurements import STATISTICS, Measurements, figures, metrics
from twotower_sim.readers.log import read_log
from twotower_sim.result import summary, write_requests

START_NS = 1_759_813_207_532_900_363


def aiperf(at_ns=0, latency_ms=300.25, ttft_ms=100.5, tokens=(550, 9), **more) -> dict:
    metrics = {
        "input_sequence_length": {"value": tokens[0], "unit": "tokens"},
        "output_sequence_length": {"value": tokens[1], "unit": "tokens"},
        "request_latency": {"value": latency_ms, "unit": "ms"},
    }
    if ttft_ms is not None:
        metrics["time_to_first_token"] = {"value": ttft_ms, "unit": "ms"}
    about = {"request_start_ns": START_NS + at_ns, "benchmark_phase": "profiling", "was_cancelled": False}
    return {"metadata": about | more, "metrics": metrics, "error": None}


def bench(**more) -> dict:
    arrays = {
        "input_lens": [550, 20],
        "output_lens": [9, 3],
        "ttfts": [0.1005, 0.05],
        "itls": [[0.1, 0.09975], [0.0, 0.1]],
        "start_times": [1000.5, 1000.0],
        "errors": ["", ""],
    }
    return {"duration": 1.5, "request_throughput": 1.3} | arrays | more


def attributes(tokens=(550, 9), ttft_s=0.1005, **more) -> dict:
    of = {"gen_ai.usage.input_tokens": tokens[0], "gen_ai.usage.output_tokens": tokens[1]}
    return of | ({"gen_ai.latency.time_to_first_token": ttft_s} if ttft_s else {}) | more


CHAT = {"gen_ai.operation.name": "chat"}


def span(id="1", parent=None, start="2025-10-07T05:00:00.500000Z", end="2025-10-07T05:00:00.800250Z", of=None) -> dict:
    return {
        "trace_id": "t", "span_id": id, "parent_span_id": parent, "start_time": start, "end_time": end,
        "attributes": attributes(**CHAT) if of is None else of,
    }  # fmt: skip


FIRST = span("2", start="2025-10-07T05:00:00Z", end="2025-10-07T05:00:00.150000+00:00", of=attributes((20, 3), 0.05))


def otlp(span: dict) -> dict:
    """As exporters write it: nanoseconds and 64-bit integers are text."""
    start, end = {"1": (500_000_000, 800_250_000), "2": (0, 150_000_000)}[span["span_id"]]
    kinds = {str: "stringValue", int: "intValue", float: "doubleValue"}
    of = [
        {"key": key, "value": {kinds[type(value)]: str(value) if type(value) is int else value}}
        for key, value in span["attributes"].items()
    ]
    times = {"startTimeUnixNano": str(START_NS + start), "endTimeUnixNano": str(START_NS + end)}
    return {"traceId": "t", "spanId": span["span_id"], "status": {}, "attributes": of} | times


def resource(*spans: dict) -> dict:
    return {"resourceSpans": [{"scopeSpans": [{"spans": [otlp(span)]} for span in spans]}]}


CSV = (
    "arrival_s,first_token_s,finish_s,input_tokens,output_tokens\n"
    "1759813208.032900363,1759813208.133400363,1759813208.333150363,550,9\n"
    "1759813207.532900363,1759813207.582900363,1759813207.682900363,20,3\n"
)


def lines(*objects: dict) -> str:
    return "".join(json.dumps(of) + "\n" for of in objects)


EARLY = aiperf(0, 150, 50, (20, 3))
THE_SAME = {
    "aiperf": lines(aiperf(500_000_000), EARLY),
    "aiperf, in seconds": lines(aiperf(500_000_000), EARLY).replace('150, "unit": "ms"', '0.15, "unit": "sec"'),
    "bench": json.dumps(bench()),
    "bench, of a fork": json.dumps(bench()).replace("start_times", "arrival_times"),
    "bench, indented": json.dumps(bench(), indent=2),
    "otlp": lines(span(), FIRST),
    "otlp, a list": json.dumps([span(), FIRST]),
    "otlp, in traces": lines({"trace_id": "t", "spans": [span(), FIRST]}),
    "otlp, OTLP": json.dumps(resource(span(), FIRST), indent=1),
    "otlp, OTLP by line": lines(resource(span()), resource(FIRST)),
    "columns": CSV,
    "columns, among others": "".join(f"x,{line}\n" for line in CSV.splitlines()) + "\n",
}


def write(tmp_path, text: str | bytes):
    path = tmp_path / "log"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def columns(of: Measurements) -> list[list[int]]:
    return [c.tolist() for c in (of.arrival_ns, of.first_ns, of.finish_ns, of.input_tokens, of.output_tokens)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", THE_SAME)
def test_every_family_says_the_same(tmp_path, name, packed):
    text = THE_SAME[name].encode()
    path = write(tmp_path, gzip.compress(text) if packed else b"\xef\xbb\xbf\n" + text)
    log = read_log(path)
    assert log.format == name.partition(",")[0]
    assert columns(read_log(path, log.format).measurements) == columns(log.measurements)
    assert log.skipped == {}
    assert columns(log.measurements) == [
        [0, 500_000_000],
        [50_000_000, 600_500_000],
        [150_000_000, 800_250_000],
        [20, 550],
        [3, 9],
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "traces" / "examples").iterdir()), ids=lambda path: path.name)
def test_what_trace_is_a_log(path):
    says_when_requests_finished = {"aiperf", "bench", "burstgpt", "columns", "copilot", "dynamo", "otlp", "tracelab"}
    if path.name.partition(".")[0] in says_when_requests_finished:
        measured = read_log(path).measurements
        assert (measured.finish_ns > measured.arrival_ns).all()
        assert measured.arrival_ns[0] == 0
    else:
        with pytest.raises(InputError, match=r"holds no request that finished; \d+ unfinished|when sessions start"):
            read_log(path)


@pytest.mark.parametrize(
    ("text", "skipped"),
    [
        (lines(aiperf(benchmark_phase="warmup"), aiperf()), {"warm-up": 1}),
        (lines(aiperf(was_cancelled=True), aiperf(), aiperf() | {"error": {"code": 500}, "metrics": None}),
         {"cancelled": 1, "failed": 1}),
        (lines(aiperf(tokens=(5, 0)), aiperf()), {"without input or output tokens": 1}),
        (json.dumps(bench(errors=["", "timeout"], ttfts=[0.1, 0], output_lens=[9, 0])), {"failed": 1}),
        (lines(span(), FIRST | {"status": {"status_code": "ERROR"}}), {"failed": 1}),
        (lines(span(), FIRST | {"attributes": FIRST["attributes"] | {"error.type": "timeout"}}), {"failed": 1}),
        (lines(span(), span("3", of={"gen_ai.operation.name": "execute_tool"}), span("4", of={"http.method": "POST"})), {}),
        (lines(span("1"), span("2", "1", of={}), span("3", "2", of=attributes())), {"around another span": 1}),
        (lines(span("1", "2", of=attributes((20, 3))), span("2", "1", of={})), {}),  # a loop of parents
        (CSV.rstrip() + "\n9,,,1,1\n" * 2, {"unfinished": 2}),
    ],
)  # fmt: skip
def test_what_is_no_request_that_finished_is_skipped_and_counted(tmp_path, text, skipped):
    log = read_log(write(tmp_path, text))
    assert log.skipped == skipped
    assert len(log.measurements) == (2 if text.startswith("arrival") else 1)


def test_the_inner_of_nested_spans_counts(tmp_path):
    outer, between, inner = span("1"), span("2", "1", of={}), span("3", "2", of=attributes((7, 8)))
    assert columns(read_log(write(tmp_path, lines(outer, between, inner))).measurements)[3:] == [[7], [8]]


@pytest.mark.parametrize(
    "text",
    [lines(aiperf(ttft_ms=None)), lines(span(of=attributes(ttft_s=None))), CSV.replace("first_token_s", "other")],
)
def test_first_tokens_may_be_unknown(tmp_path, text):
    measured = read_log(write(tmp_path, text)).measurements
    assert set(measured.first_ns) == {-1}
    assert np.isnan(measured.ttft_s).all()
    of = metrics(measured)
    assert (of["time_to_first_token"]["count"], of["inter_token_latency"]["count"]) == (0, 0)
    assert set(figures(measured)) == {
        *(f"request_latency.{statistic}" for statistic in STATISTICS),
        "output_token_throughput.avg",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("hello\n", ":1: not a known trace format: the file starts with 'hello'; known are mooncake, "),
        ('{"a": 1}', "not a known trace format: the file starts with keys a"),
        (b"\xff\xfe\x00", "cannot be read"),
        (gzip.compress(CSV.encode() * 99)[:-9], "cannot be read"),
        ("[1]", ": found '[1]'; expected a list of JSON objects"),
        (THE_SAME["bench, indented"][:-9], ":32: not JSON"),
        (THE_SAME["aiperf"] + "{", ":3: not a JSON object: unexpected end of data"),
        (THE_SAME["aiperf"] + "3", ":3: not a JSON object: 3"),
        (lines(aiperf(), {"metadata": 5}), ":2: metadata: found 5; expected a JSON object"),
        (lines(aiperf(), aiperf() | {"metrics": {}}), ":2: metrics.request_latency is missing"),
        (lines(aiperf(request_start_ns=None)), "metadata.request_start_ns is missing"),
        (lines(aiperf(request_start_ns="5")), "metadata.request_start_ns: found '5'; expected ns from 0"),
        (lines(aiperf(latency_ms=-5)), "metrics.request_latency.value: found -5; expected ms from 0"),
        (lines(aiperf(tokens=(5.5, 1))), "input_sequence_length: found 5.5; expected a whole number of tokens"),
        (lines(aiperf(tokens=(True, 1))), "input_sequence_length: found True; expected a whole number of tokens"),
        (lines(aiperf()).replace('"ms"', '"min"'), "unit: found 'min'; allowed: ns, us, ms, sec, s"),
        (lines(aiperf(latency_ms=50)), "the finish comes 0.0505 s before the first token"),
        (lines(aiperf(was_cancelled=True)), "holds no request that finished; 1 cancelled"),
        (lines(aiperf(-START_NS), aiperf(4 * 10**18 - START_NS, 4e12)), "spans 253 years; at most 146"),
        (json.dumps({"duration": 5, "request_throughput": 1}), ": input_lens is missing; the tools write it with --save"),
        (json.dumps(bench(start_times=[])), "start_times is missing, without which nobody knows when requests came"),
        (json.dumps(bench(ttfts=[1])), ": ttfts: found 1 elements; input_lens has 2"),
        (json.dumps(bench(ttfts=3)), ": ttfts: found 3; expected a list"),
        (json.dumps(bench(ttfts=[0, 1])), ": ttfts[0]: found 0, as if nothing was streamed"),
        (json.dumps(bench(itls=[[1], ["x"]])), ": itls[1]: found 'x'; expected seconds from 0"),
        (json.dumps(bench(itls=[1, [1]])), ": itls[0]: found 1; expected a list of seconds"),
        (json.dumps(bench(output_lens=[-1, 1])), ": output_lens[0]: found -1; expected a whole number of tokens"),
        (lines(bench(), bench()), ":2: another run begins here; expected one a file"),
        (lines(span(end=None)), "end_time is missing"),
        (lines(span(end="now")), "end_time: found 'now'; expected YYYY-MM-DD"),
        (lines(span(), {"a": 5}), ":2: found keys a; expected a span"),
        (lines(span(), span(of=CHAT)), ":2: attributes: gen_ai.usage.input_tokens or gen_ai.usage.prompt_tokens is missing"),
        (lines(span(of=[5])), "attributes: found [5]; expected a JSON object or a list"),
        (lines({"resourceSpans": [{"scopeSpans": [{"spans": 5}]}]}), "resourceSpans[0].scopeSpans[0].spans: found 5"),
        (lines(resource(span())).replace(f'"{START_NS + 500_000_000}"', '"x"'), "startTimeUnixNano: found 'x'; expected"),
        (CSV.replace("finish_s", "end"), ":1: column finish_s is missing; found arrival_s, first_token_s, end"),
        (CSV + "1,2\n", ":4: found 2 columns; expected 5"),
        (CSV + "x,2,3,4,5\n", ":4: arrival_s: found 'x'; expected seconds from 0"),
        (CSV + "1,2,nan,4,5\n", ":4: finish_s: found 'nan'"),
        (CSV + "1,2,3,4.5,5\n", ":4: input_tokens: found '4.5'; expected a whole number of tokens"),
        (CSV + "3,2,3,4,5\n", ":4: the first token comes 1 s before the arrival"),
        (CSV + '1,2,3,4,"5\n', ":4: not CSV: unexpected end of data"),
    ],
)  # fmt: skip
def test_damaged_logs_are_named_with_line_and_field(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_log(path)
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)


def test_a_forced_family_is_held_to(tmp_path):
    for name in ("aiperf", "bench", "otlp", "columns"):
        other = lines({"a": 1}) if name != "columns" else "a,b\n1,2\n"
        with pytest.raises(InputError, match="is missing|found keys a; expected a span"):
            read_log(write(tmp_path, other), name)


@pytest.mark.parametrize("kind", ["two_tower", "autoregressive"])
def test_a_run_reads_as_a_log_with_the_same_figures(tmp_path, kind):
    run, results = run_of(workload=synthetic(), decoding={"kind": kind}, latency=AFFINE)
    path = tmp_path / "requests.csv.gz"
    write_requests(path, results.columns)
    log = read_log(path)
    start_ns = results.columns.arrival_ns[0]
    assert columns(log.measurements)[1] == (results.columns.first_ns - start_ns).tolist()
    told = summary(run, results)["metrics"]
    for name, of in metrics(log.measurements).items():
        assert of == pytest.approx(told[name]), name
    assert columns(log.measurements)[0] == log.measurements.requests.arrival_ns.tolist()
