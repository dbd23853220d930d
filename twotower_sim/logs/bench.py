"""Results of vLLM's ``bench serve`` and SGLang's ``bench_serving``: one object of parallel arrays with an element a
request: input_lens, output_lens, ttfts (s), itls (a list of gaps, s), errors ("" where there was none) and, where the
version or fork writes them, start_times (or arrival_times; s)."""

from collections.abc import Iterable, Iterator
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.logs.entries import Entry
from twotower_sim.logs.fields import Row, present, span_ns, tokens

ARRIVALS = ("start_times", "arrival_times")
_DETAILS = "; the tools write it with --save-detailed (vLLM) or --output-details (SGLang)"
_NO_ARRIVALS = (
    "start_times is missing, without which nobody knows when requests came; vllm bench serve --save-detailed writes it "
    "in recent versions, sglang.bench_serving may not: measure with AIPerf, or make a CSV with the columns arrival_s, "
    "first_token_s, finish_s, input_tokens, output_tokens"
)


def sniff(first: Any) -> bool:
    """``request_throughput`` tells results without details, so that it can be said that these are missing."""
    return isinstance(first, dict) and ("input_lens" in first or {"request_throughput", "duration"} <= first.keys())


def read(entries: Iterable[Entry]) -> Iterator[Row | str]:
    """Rows, or why a request is none."""
    (where, result), *others = entries
    if others:
        raise InputError(f"{others[0][0]}: another run begins here; expected one a file")
    columns = {name: _column(result, name, where) for name in ("input_lens", "output_lens", "ttfts", "itls")}
    starts = next((name for name in ARRIVALS if result.get(name)), None)
    if starts is None:
        raise InputError(f"{where}: {_NO_ARRIVALS}")
    count = len(columns["input_lens"])
    columns |= {starts: _column(result, starts, where), "errors": result.get("errors") or [""] * count}
    for name, column in columns.items():
        if len(column) != count:
            raise InputError(f"{where}: {name}: found {len(column)} elements; input_lens has {count}")
    for index, (input_, output, ttft, gaps, start, error) in enumerate(zip(*columns.values(), strict=True)):
        if error:
            yield "failed"
            continue
        first_ns = span_ns(start, f"{starts}[{index}]", where) + _ttft_ns(ttft, index, where)
        yield Row(
            where,
            span_ns(start, f"{starts}[{index}]", where),
            first_ns,
            first_ns + sum(_gaps_ns(gaps, index, where)),
            tokens(input_, f"input_lens[{index}]", where),
            tokens(output, f"output_lens[{index}]", where),
        )


def _column(result: dict[str, Any], name: str, where: str) -> list:
    if name not in result:
        raise InputError(f"{where}: {name} is missing{_DETAILS}")
    column = present(result, name, where)
    if not isinstance(column, list):
        raise InputError(f"{where}: {name}: found {column!r:.60}; expected a list")
    return column


def _ttft_ns(value: Any, index: int, where: str) -> int:
    ttft_ns = span_ns(value, f"ttfts[{index}]", where)
    if not ttft_ns:
        raise InputError(f"{where}: ttfts[{index}]: found 0, as if nothing was streamed; expected more")
    return ttft_ns


def _gaps_ns(gaps: Any, index: int, where: str) -> list[int]:
    if not isinstance(gaps, list):
        raise InputError(f"{where}: itls[{index}]: found {gaps!r:.60}; expected a list of seconds")
    return [span_ns(gap, f"itls[{index}]", where) for gap in gaps]
