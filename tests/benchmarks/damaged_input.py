"""Fifty kinds of damaged traces through the command line, and what each gets: python tests/benchmarks/damaged_input.py
> reports/damaged_input.md. Writes up to 1 GiB into a temporary folder; takes a minute."""

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from backports import zstd

MOONCAKE = '{"timestamp": 3000, "input_length": 600, "output_length": 20, "hash_ids": [7, 8]}\n'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
AGENTIC = '{"schema": "dynamo.agentic_mooncake", "version": 2, "block_size": 512, "hash_id_scope": "local"}\n'
WEKA = {
    "id": "s",
    "block_size": 64,
    "hash_id_scope": "local",
    "requests": [{"t": 0.0, "type": "n", "in": 70, "out": 9, "hash_ids": [1]}],
}
SPAN = {"trace_id": "t", "span_id": "1", "start_time": "2025-10-07T05:00:00Z", "end_time": "2025-10-07T05:00:01Z",
        "attributes": {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 5, "gen_ai.usage.output_tokens": 5}}  # fmt: skip


def play(name: str, *waits: str) -> str:
    on = [{"request_id": of, "trigger": "completion"} for of in waits]
    row = {
        "request_id": name,
        "play_id": "p",
        "input_length": 10,
        "output_length": 5,
        "hash_ids": [1],
        "not_before_ms": 0,
    }
    return json.dumps(row | {"dependencies": on}) + "\n"


def twice(text: str, *change: str) -> str:
    """A good row, and one with something changed."""
    head, row = (text[: text.index("\n") + 1], text[text.index("\n") + 1 :]) if text[0] != "{" else ("", text)
    return head + row + row.replace(*change)


def bomb(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(80):
            file.write((MOONCAKE.encode() * 200_000)[: 16 << 20])


def long_line(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b"7" * (16 << 20))


CASES: dict[str, str | bytes | Callable[[Path], None]] = {
    "an empty file": "",
    "blank lines alone": "\n \n\n",
    "no trace": "hello\nworld\n",
    "a picture": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "UTF-16": MOONCAKE.encode("utf-16"),
    "Latin-1 in a comment": AZURE.encode() + b"2023-11-16 18:15:47,\xe9,1\n",
    "truncated gzip": gzip.compress(MOONCAKE.encode() * 1000)[:-20],
    "gzip with a wrong checksum": gzip.compress(MOONCAKE.encode())[:-8] + bytes(8),
    "gzip in name only": b"\x1f\x8bnot gzip",
    "truncated Zstandard": zstd.compress(MOONCAKE.encode() * 1000)[:-5],
    "a gzip bomb": bomb,
    "a line of 1 GiB": long_line,
    "a line cut off": MOONCAKE + MOONCAKE[:40],
    "a file cut off in a JSON document": json.dumps([SPAN, SPAN], indent=1)[:200],
    "nesting 100,000 deep": MOONCAKE + '{"timestamp":' + "[" * 100_000 + "\n",
    "a list in place of an object": MOONCAKE + "[1, 2]\n",
    "a text in place of an object": MOONCAKE + '"x"\n',
    "BOM (read)": "\ufeff" + MOONCAKE,
    "CRLF (read)": AZURE.replace("\n", "\r\n"),
    "no end of the last line (read)": MOONCAKE.rstrip(),
    "a missing field": twice(MOONCAKE, '"output_length": 20, ', ""),
    "null": twice(MOONCAKE, "600", "null"),
    "a number as text": twice(MOONCAKE, "600", '"600"'),
    "true": twice(MOONCAKE, "600", "true"),
    "negative tokens": twice(MOONCAKE, "600", "-600"),
    "half a token": twice(MOONCAKE, "600", "600.5"),
    "no output tokens": twice(MOONCAKE, "20,", "0,"),
    "more tokens than 64 bits hold": twice(MOONCAKE, "600", "99999999999999999999"),
    "NaN": twice(MOONCAKE, "3000", "NaN"),
    "a time of 1e300": twice(MOONCAKE, "3000", "1e300"),
    "a negative time": twice(MOONCAKE, "3000", "-1"),
    "times in nanoseconds, by far too late": twice(MOONCAKE, "3000", "1759813207532900363"),
    "fewer hashes than blocks": twice(MOONCAKE, "[7, 8]", "[7]"),
    "hashes of text": twice(MOONCAKE, "[7, 8]", '["a", "b"]'),
    "hashes in some rows only": twice(MOONCAKE, ', "hash_ids": [7, 8]', ""),
    "a session without times": '{"input_length": 5, "output_length": 5, "session_id": "a"}\n',
    "a header without a column": AZURE.replace("Generated", "Created"),
    "a header and no rows": AZURE.splitlines()[0] + "\n",
    "a row with a column too few": AZURE + "2023-11-16 18:15:47,1\n",
    "a quote that never ends": AZURE + '2023-11-16 18:15:47,1,"1\n',
    "a date that is none": AZURE + "2023-02-30 18:15:47,1,1\n",
    "yesterday": AZURE + "yesterday,1,1\n",
    "digits of another script": AZURE + "2023-11-16 18:15:47,\u0664\u0662,1\n",
    "a span of 299 years": AZURE.replace("2023", "1900") + "2199-01-01 00:00:00,1,1\n",
    "BurstGPT: only failed requests": BURST.replace(",18,", ",0,"),
    "a request id twice": AGENTIC + play("a") + play("a"),
    "a wait for what is not there": AGENTIC + play("a", "b"),
    "a wait in a circle": AGENTIC + play("a", "b") + play("b", "a"),
    "an unknown version": AGENTIC.replace("2,", "9,") + play("a"),
    "WEKA: a session without requests": json.dumps(WEKA | {"requests": []}) + "\n",
    "WEKA: hashes that do not fit": json.dumps(WEKA).replace("[1]", "[1, 2, 3]") + "\n",
    "OTLP: ends before it starts": json.dumps(SPAN).replace("05:00:01", "04:00:01") + "\n",
    "OTLP: spans without tokens": json.dumps(SPAN | {"attributes": {"gen_ai.operation.name": "chat"}}) + "\n",
    "bench results without arrivals": json.dumps({"input_lens": [5], "output_lens": [5], "ttfts": [0.1], "itls": [[0.1]], "errors": [""]}),
    "a folder": lambda path: path.mkdir(),
    "no such file": lambda path: None,
    "Parquet in name only": b"PAR1 and nothing else",
}  # fmt: skip


def answers(folder: Path) -> Iterator[tuple[str, int, str]]:
    for number, (name, content) in enumerate(CASES.items()):
        path = folder / ("trace.parquet" if "Parquet" in name else f"trace{number}")
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        done = subprocess.run(
            [sys.executable, "-m", "twotower_sim", "trace", "describe", path],
            capture_output=True,
            text=True,
            timeout=300,
        )
        said = done.stderr.strip().splitlines() or done.stdout.strip().splitlines()
        yield name, done.returncode, said[0].replace(f"{folder}/", "")
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main() -> None:
    print(
        "# Damaged traces, and what each gets\n\nMade by `python tests/benchmarks/damaged_input.py`: `trace describe` of each file.\n"
    )
    print("| damage | exit code | the first line that is said |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, code, said in answers(Path(folder)):
            print(f"| {name} | {code} | {said.replace('|', chr(92) + '|'):.200} |", flush=True)


if __name__ == "__main__":
    main()
