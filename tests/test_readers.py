"""Trace files: what is read, and what is said of files that are damaged."""

import gzip
import json
import os
import re
from threading import Thread

import numpy as np
import pytest
from conftest import ROOT

from twotower_sim import readers
from twotower_sim.errors import InputError
from twotower_sim.readers import FORMATS
from twotower_sim.readers.items import items

EXAMPLES = ROOT / "traces" / "examples"
MOONCAKE = '{"timestamp": 3000, "input_length": 5, "output_length": 2}\n'
HASHED = '{"timestamp": 3000, "input_length": 5, "output_length": 2, "hash_ids": [7]}\n'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"


def read_trace(path, *options):
    return readers.read_trace(path, *options).requests


def write(tmp_path, text: str | bytes):
    path = tmp_path / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def columns(requests):
    return [column.tolist() for column in (requests.arrival_ns, requests.input_tokens, requests.output_tokens)]


def test_there_is_an_example_of_every_format():
    assert {name_of(path) for path in EXAMPLES.iterdir()} == set(FORMATS)
    assert {path.suffix for path in EXAMPLES.iterdir()} >= {".jsonl", ".json", ".csv", ".gz", ".zst", ".parquet"}


def name_of(path) -> str:
    return path.name.partition(".")[0]


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_examples_are_known_by_their_content(path):
    forced = readers.read_trace(path, name_of(path))
    assert len(forced.requests) >= 2
    if name_of(path) == "mooncake_delta":
        assert readers.read_trace(path).format == "mooncake"  # nothing in it says otherwise
        return
    found = readers.read_trace(path)
    assert found.format == name_of(path)
    assert columns(found.requests) == columns(forced.requests)
    head = items(path).head
    assert [name for name, family in FORMATS.items() if family.sniff(head)] == [name_of(path)]


def test_mooncake_milliseconds():
    arrival, inputs, outputs = columns(read_trace(EXAMPLES / "mooncake.jsonl"))
    assert arrival == [0, 0, 3_000_000_000]
    assert inputs == [6758, 1100, 2048]
    assert outputs == [500, 52, 1]


def test_mooncake_prefixes_follow_their_request(tmp_path):
    prefixes = read_trace(EXAMPLES / "mooncake.jsonl").prefixes
    assert prefixes.block_tokens == 512
    assert [prefixes.of(request).tolist() for request in (1, 2)] == [[0, 14, 15], [0, 1, 2, 3]]
    assert read_trace(write(tmp_path, MOONCAKE)).prefixes is None
    rows = [(9, 40, [1, 2, 3]), (5, 16, [4]), (7, 33, [1, 2, 5])]  # out of order, in blocks of 16
    lines = (
        json.dumps({"timestamp": at, "input_length": n, "output_length": 1, "hash_ids": ids}) for at, n, ids in rows
    )
    requests = read_trace(write(tmp_path, "\n".join(lines)))
    assert requests.prefixes.block_tokens == 16
    assert [requests.prefixes.of(request).tolist() for request in range(3)] == [[4], [1, 2, 5], [1, 2, 3]]
    assert [requests.take(slice(1, 3)).prefixes.of(request).tolist() for request in range(2)] == [[1, 2, 5], [1, 2, 3]]


def test_azure_hundred_nanosecond_stamps():
    arrival, inputs, outputs = columns(read_trace(EXAMPLES / "azure.csv"))
    assert arrival == [0, 4_314_579_000, 4_500_000_000]
    assert (inputs, outputs) == ([374, 396, 879], [44, 109, 55])


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + MOONCAKE,
        MOONCAKE.replace("\n", "\r\n"),
        MOONCAKE + "\n \n",
        MOONCAKE.rstrip(),
        '{"output_length": 2, "extra": [1], "timestamp": 3000.0, "input_length": 5}\n',
        gzip.compress(MOONCAKE.encode()),
        "\n \n" + MOONCAKE,
    ],
)
def test_ways_to_write_the_same_mooncake_line(tmp_path, text):
    assert columns(read_trace(write(tmp_path, text))) == [[0], [5], [2]]


@pytest.mark.parametrize(
    "text",
    [
        AZURE,
        AZURE.replace("\n", "\r\n"),
        AZURE.replace(".6805900", ".6805900+00:00"),
        "Id,GeneratedTokens,ContextTokens,TIMESTAMP\n7,44,374,2024-05-10 00:00:00.009930\n",
        gzip.compress(AZURE.encode()),
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2025-03-04 00:00:00.0000000,2,374,44\n",
        "\ufeff\n" + AZURE,
        AZURE.replace(",374,", ", 374 ,"),
        re.sub(r"([^,\n]+)", r'"\1"', AZURE),
    ],
)
def test_ways_to_write_the_same_azure_row(tmp_path, text):
    assert columns(read_trace(write(tmp_path, text))) == [[0], [374], [44]]


def test_requests_come_in_order_of_arrival_and_ties_in_file_order(tmp_path):
    rows = [(5, 1), (2, 2), (5, 3), (0, 4), (2, 5)]
    lines = (f'{{"timestamp": {at}, "input_length": {n}, "output_length": 1}}\n' for at, n in rows)
    arrival, inputs, _ = columns(read_trace(write(tmp_path, "".join(lines))))
    assert arrival == [0, 2_000_000, 2_000_000, 5_000_000, 5_000_000]
    assert inputs == [4, 2, 5, 1, 3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("hello\n", ":1: not a known trace format: the file starts with 'hello'; known are mooncake, "),
        (MOONCAKE + "{", ":2: not a JSON object"),
        (MOONCAKE + "[1]\n", ":2: not a JSON object"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 5}\n', ":2: output_length is missing"),
        (MOONCAKE + MOONCAKE.replace(": 5", ": -5"), ":2: input_length: found -5; expected a whole number of tokens"),
        (MOONCAKE + MOONCAKE.replace(": 5", ": 5.5"), ":2: input_length: found 5.5"),
        (MOONCAKE + MOONCAKE.replace(": 5", ': "5"'), ":2: input_length: found '5'"),
        (MOONCAKE + MOONCAKE.replace(": 5", ": true"), ":2: input_length: found True"),
        (MOONCAKE + MOONCAKE.replace(": 2", ": 0"), ":2: output_length: found 0"),
        (MOONCAKE + MOONCAKE.replace("3000", "-1"), ":2: timestamp: found -1; expected milliseconds"),
        (MOONCAKE + MOONCAKE.replace("3000", "NaN"), ":2: not a JSON object"),
        (MOONCAKE + MOONCAKE.replace("3000", "1e300"), ":2: timestamp: found 1e+300"),
        (MOONCAKE + MOONCAKE.replace(": 5", ": 99999999999999999999"), ":2: input_length: found"),
        (HASHED + MOONCAKE, ":2: hash_ids: none, though others have"),
        (
            HASHED + HASHED.replace("[7]", "[7, 8]"),
            ":2: hash_ids: found 2 for 5 tokens; expected one for each block of 512, 1",
        ),
        (HASHED.replace("[7]", '["x"]'), ":1: hash_ids: expected a list of whole numbers"),
        (HASHED.replace("[7]", "7"), ":1: hash_ids: expected a list of whole numbers"),
        (HASHED.replace("[7]", "[1.5]"), ":1: hash_ids: expected a list of whole numbers"),
        (HASHED.replace("[7]", '{"7": 1}'), ":1: hash_ids: expected a list of whole numbers"),
        (HASHED + HASHED.replace("7", "18446744073709551616"), ":2: hash_ids: expected a list of whole numbers"),
        (HASHED + HASHED.replace("[7]", "[]"), ":2: hash_ids: found 0 for 5 tokens"),
        (HASHED + HASHED.replace("[7]", "null"), ":2: hash_ids: none, though others have"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        (AZURE + "yesterday,1,1\n", ":3: TIMESTAMP: found 'yesterday'; expected YYYY-MM-DD HH:MM:SS.fffffff"),
        (AZURE + "today,1,1\n", ":3: TIMESTAMP"),
        (AZURE + ",1,1\n", ":3: TIMESTAMP"),
        (AZURE + "9999-01-01 00:00:00,1,1\n", ":3: TIMESTAMP"),
        (AZURE + "2023-13-16 18:15:46,1,1\n", ":3: TIMESTAMP"),
        (
            AZURE + "2023-11-16 18:15:46,1.5,1\n",
            ":3: ContextTokens: found '1.5'; expected a whole number of tokens from 1",
        ),
        (
            AZURE + "2023-11-16 18:15:46,1,0\n",
            ":3: GeneratedTokens: found '0'; expected a whole number of tokens from 1 to 2147483647",
        ),
        (AZURE + "2023-11-16 18:15:46,1\n", ":3: found 2 columns; expected 3"),
        (AZURE + "\n2023-11-16 18:15:46,x,1\n", ":4: ContextTokens"),
        (AZURE + "2023-11-16 18:15:46,99999999999999999999,1\n", ":3: ContextTokens"),
        ("\n" + AZURE + "2023-11-16 18:15:46,x,1\n", ":4: ContextTokens"),
        ("\nhello\n", ":2: not a known trace format"),
        (
            AZURE.replace("Generated", "Made"),
            ":1: not a known trace format: the file starts with 'TIMESTAMP,ContextTokens,MadeTokens'; azure has the column GeneratedTokens too",
        ),
        ("\n\n", "is empty"),
        (",\n" + AZURE, ":1: not a known trace format"),
        *((AZURE + f"2023-11-16 18:15:46,{n},1\n", ":3: ContextTokens") for n in ("1_00", "+44", "\u0664", "4 4", "")),
        (AZURE + "202\u0663-11-16 18:15:46,1,1\n", ":3: TIMESTAMP"),
        (AZURE + '2023-11-16 18:15:46,1,"1\n', ":3: not CSV: unexpected end of data"),
        (AZURE + '2023-11-16 18:15:46,1,"' + "1" * 140_000 + '"\n', ":3: not CSV: field larger than field limit"),
        ('"' + "x" * 140_000 + '"\n', ":1: not CSV: field larger than field limit"),
        (AZURE + "1900-01-01 00:00:00,1,1\n2199-01-01 00:00:00,1,1\n", "spans 299 years; at most 146 are replayed"),
        (MOONCAKE + MOONCAKE.replace("3000", "9000000000000"), ":2: timestamp: found 9000000000000; expected"),
        (b"\xff\xfe\x00", "cannot be read"),
        (gzip.compress(MOONCAKE.encode() * 100)[:-20], "cannot be read"),
        (b"\x1f\x8bnot gzip", "cannot be read"),
        (gzip.compress(MOONCAKE.encode())[:-8] + b"\0" * 8, "cannot be read"),
    ],
)
def test_damaged_files_are_named_with_line_and_field(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_trace(path)
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)


def test_a_forced_format_is_held_to(tmp_path):
    with pytest.raises(InputError, match=":1: found JSON; format azure is a table with the columns TIMESTAMP"):
        read_trace(write(tmp_path, MOONCAKE), "azure")
    with pytest.raises(InputError, match=":1: not a JSON object"):
        read_trace(write(tmp_path, AZURE), "mooncake")


@pytest.mark.parametrize("text", [AZURE.encode(), gzip.compress(AZURE.encode())])
def test_a_pipe_is_read_once(tmp_path, text):
    os.mkfifo(tmp_path / "pipe")
    writer = Thread(target=(tmp_path / "pipe").write_bytes, args=[text])
    writer.start()
    assert columns(read_trace(tmp_path / "pipe")) == [[0], [374], [44]]
    writer.join()


def test_what_is_no_path(tmp_path):
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(InputError, match="cannot be read"):
            read_trace(tmp_path / name)


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_trace(path)


def test_the_real_traces(data):
    """Figures of data/README.md."""
    azure = read_trace(data / "traces" / "AzureLLMInferenceTrace_conv.csv.gz")
    assert len(azure) == 19366
    assert azure.arrival_ns[-1] / 60e9 == pytest.approx(58.36, abs=0.01)
    mooncake = read_trace(data / "traces" / "mooncake_conversation_trace.jsonl.gz")
    assert len(mooncake) == 12031
    assert len(np.unique(mooncake.arrival_ns)) == 1180
