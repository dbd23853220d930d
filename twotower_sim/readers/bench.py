"""Results of vLLM's ``bench serve`` and SGLang's ``bench_serving``: one object of parallel arrays with an element a
request: input_lens, output_lens, ttfts (s), itls (a list of gaps, s), errors ("" where there was none) and, where the
version or fork writes them, start_times (or arrival_times; s)."""

from collections.abc import Callable, Iterator
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.readers.items import Head
from twotower_sim.readers.rows import Found, Row, answered, array, in_order, shown, span_ns, tokens

ARRIVALS = ("start_times", "arrival_times")
_DETAILS = "; the tools write it with --save-detailed (vLLM) or --output-details (SGLang)"
_NO_ARRIVALS = (
    "start_times is missing, without which nobody knows when requests came; vllm bench serve --save-detailed writes it "
    "in recent versions, sglang.bench_serving may not: measure with AIPerf, or make a CSV with the columns arrival_s, "
    "first_token_s, finish_s, input_tokens, output_tokens"
)


def sniff(head: Head) -> bool:
    """``request_throughput`` tells results without details, so that it can be said that these are missing."""
    return isinstance(head, dict) and ("input_lens" in head or {"request_throughput", "duration"} <= head.keys())


def reader(head: dict[str, Any]) -> Callable[[dict[str, Any]], Found]:
    runs = 0

    def read(result: dict[str, Any]) -> Found:
        nonlocal runs
        runs += 1
        if runs > 1:
            raise InputError("another run begins here; expected one a file")
        return list(_requests(result))

    return read


def _requests(result: dict[str, Any]) -> Iterator[Row | str | InputError]:
    columns = {name: _column(result, name) for name in ("input_lens", "output_lens", "ttfts", "itls")}
    starts = next((name for name in ARRIVALS if result.get(name)), None)
    if starts is None:
        raise InputError(_NO_ARRIVALS)
    count = len(columns["input_lens"])
    columns |= {
        starts: _column(result, starts),
        "errors": array(result, "errors") if result.get("errors") else [""] * count,
    }
    for name, column in columns.items():
        if len(column) != count:
            raise InputError(f"{name}: found {len(column)} elements; input_lens has {count}")
    for index, request in enumerate(zip(*columns.values(), strict=True)):
        try:
            yield _request(index, starts, *request)
        except InputError as error:
            yield error


def _request(
    index: int, starts: str, input_: Any, output: Any, ttft: Any, gaps: Any, start: Any, error: Any
) -> Row | str:
    if error:
        return "failed"
    arrival_ns = span_ns(start, f"{starts}[{index}]")
    first_ns = arrival_ns + _ttft_ns(ttft, index)
    row = Row(
        tokens(input_, f"input_lens[{index}]", 0),
        tokens(output, f"output_lens[{index}]", 0),
        arrival_ns,
        first_ns=first_ns,
        finish_ns=first_ns + sum(_gaps_ns(gaps, index)),
    )
    return answered(in_order(row))


def _column(result: dict[str, Any], name: str) -> list:
    if name not in result:
        raise InputError(f"{name} is missing{_DETAILS}")
    return array(result, name)


def _ttft_ns(value: Any, index: int) -> int:
    ttft_ns = span_ns(value, f"ttfts[{index}]")
    if not ttft_ns:
        raise InputError(f"ttfts[{index}]: found 0, as if nothing was streamed; expected more")
    return ttft_ns


def _gaps_ns(gaps: Any, index: int) -> list[int]:
    if not isinstance(gaps, list):
        raise InputError(f"itls[{index}]: found {shown(gaps)}; expected a list of seconds")
    return [span_ns(gap, f"itls[{index}]") for gap in gaps]
