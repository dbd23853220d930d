"""``twotower-sim trace``: what is fetched, described, converted and drawn; what is refused, and what stays."""

import errno
import gzip
import hashlib
import importlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import ClassVar

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from test_cli import call

from twotower_sim import preset
from twotower_sim.cli import main
from twotower_sim.errors import InputError
from twotower_sim.fingerprint import load_fingerprint
from twotower_sim.readers import FORMATS, Trace, read_trace
from twotower_sim.requests import Dependencies, Prefixes, Requests
from twotower_sim.trace import fetch as fetching
from twotower_sim.trace import public
from twotower_sim.trace.fetch import fetch_traces
from twotower_sim.trace.fingerprint import fingerprint_trace
from twotower_sim.trace.report import describe_trace
from twotower_sim.trace.stats import describe
from twotower_sim.trace.write import ending, write_trace

EXAMPLES = ROOT / "traces" / "examples"
AZURE, MOONCAKE = ((EXAMPLES / name).read_bytes() for name in ("azure.csv", "mooncake.jsonl"))
HASH = hashlib.sha256(AZURE).hexdigest()

# ---------------------------------------------------------------------- list and fetch


class Host(BaseHTTPRequestHandler):
    """Answers as the first part of the path says."""

    done: ClassVar = Event()
    asked: ClassVar = []

    def do_GET(self):
        _, how, name = self.path.split("/")
        self.asked.append(self.path)
        body = {"good": AZURE if name.endswith(".csv") else MOONCAKE, "page": b"<html>"}.get(how, AZURE)
        self.send_response(404 if how == "missing" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:20] if how in ("breaks", "stalls") else body)
        if how == "stalls":
            self.done.wait(30)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    thread = Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Host.done.set()
    server.shutdown()
    thread.join()


@pytest.fixture
def fetch(host, tmp_path, monkeypatch):
    """Fetches from a way of the host, into tmp_path, with a registry of two small files; one has no known hash."""
    registry = tmp_path / "registry.yaml"
    source = f"{{repository: a/b, commit: {'0' * 40}, licence: MIT, attribution: Somebody, traces: {{small: {{path: x.csv, sha256: {HASH}, requests: 3, span_s: 1}}, unknown: {{path: y.jsonl, sha256: null, requests: 3, span_s: 1}}}}}}"
    registry.write_text(f"sources: [{source}]")
    traces = public.public_traces(registry)
    monkeypatch.setattr(fetching, "public_traces", lambda: traces)
    folder = tmp_path / "to"

    def run(how="good", names=("small",), force=False):
        fetch_traces(list(names), folder, how if ":" in how else f"{host}/{how}/", force)

    run.folder = folder
    return run


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command that exits with 2, and gives what it says."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["twotower-sim", "trace", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr()
        assert (exit_.value.code, said.out) == (2, "")
        return said.err

    return run


def names_of(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_list():
    done = call("trace", "list")
    assert done.returncode == 0, done.stderr
    for name, trace in public.public_traces().items():
        (row,) = (line.split() for line in done.stdout.splitlines() if line.split()[:1] == [name])
        assert {f"{trace.of.requests:,}", trace.source.licence, trace.source.repository} <= set(row)
    for name, what in (
        ("mooncake", "Mooncake JSONL (kvcache-ai/Mooncake, FAST'25)"),
        ("vidur", "Vidur's processed traces"),
    ):
        assert re.search(rf"^ {name} +{re.escape(what)}", done.stdout, re.MULTILINE)


def test_the_registry_is_what_scenarios_and_the_readme_say():
    files = {trace.file: trace for trace in public.public_traces().values()}
    for name in ("azure_conversation", "mooncake_conversation"):
        text = (ROOT / "scenarios" / f"{name}.yaml").read_text()
        assert sum(f"../traces/downloads/{file}\n" in text for file in files) == 1
    assert (
        files["mooncake-toolagent.jsonl"].url
        == "https://raw.githubusercontent.com/kvcache-ai/Mooncake/3b5a594133958449a1feaf1c9e0fc1b553e34a28/FAST25-release/traces/toolagent_trace.jsonl"
    )
    assert public.downloads().resolve() == ROOT / "traces" / "downloads"


def test_the_registry_has_the_hashes_of_the_real_traces(data):
    traces = public.public_traces()
    for name, file in (
        ("azure-conversation-2023", "AzureLLMInferenceTrace_conv.csv.gz"),
        ("mooncake-conversation", "mooncake_conversation_trace.jsonl.gz"),
    ):
        raw = gzip.decompress((data / "traces" / file).read_bytes())
        assert traces[name].of.sha256 == hashlib.sha256(raw).hexdigest()
        assert traces[name].of.requests == len(raw.splitlines()) - raw.startswith(b"TIMESTAMP")


def test_fetching_says_whose_it_is_and_does_not_fetch_again(fetch, capsys):
    fetch()
    assert (fetch.folder / "small.csv").read_bytes() == AZURE
    said = capsys.readouterr()
    assert "to/small.csv, 0.0 MB, sha256 as expected\n  Somebody (a/b), MIT\n" in said.out
    assert said.err == ""  # no progress where stderr is no terminal
    asked = len(Host.asked)
    fetch("missing")
    assert len(Host.asked) == asked
    assert "is there, sha256 as expected" in capsys.readouterr().out
    assert names_of(fetch.folder) == ["small.csv"]


def test_an_unknown_hash_is_recorded_and_holds_from_then_on(fetch, capsys):
    found = hashlib.sha256(MOONCAKE).hexdigest()
    fetch(names=["unknown"])
    assert f"sha256 {found} was not known before and is now recorded" in capsys.readouterr().out
    assert (fetch.folder / "unknown.jsonl.sha256").read_text() == f"{found}  unknown.jsonl\n"
    fetch("missing", ["unknown"])
    assert "is there, sha256 as expected" in capsys.readouterr().out
    (fetch.folder / "unknown.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"expected .*recorded in .*unknown.jsonl.sha256; remove that to accept another"
    ):
        fetch("page", ["unknown"])
    fetch(names=["unknown"])
    (fetch.folder / "unknown.jsonl").write_bytes(AZURE)
    with pytest.raises(InputError, match=f"found sha256 {HASH}; expected {found}; --force"):
        fetch(names=["unknown"])


def test_of_an_unknown_hash_only_a_trace_of_that_many_requests_is_recorded(fetch, capsys):
    with pytest.raises(InputError, match="page/unknown.jsonl: found 0 requests; expected the 3 of unknown"):
        fetch("page", ["unknown"])
    assert names_of(fetch.folder) == []
    fetch.folder.mkdir()
    (fetch.folder / "unknown.jsonl").write_bytes(MOONCAKE)  # by hand
    fetch("missing", ["unknown"])
    assert "is there; sha256" in capsys.readouterr().out
    assert names_of(fetch.folder) == ["unknown.jsonl", "unknown.jsonl.sha256"]
    (fetch.folder / "unknown.jsonl.sha256").unlink()
    (fetch.folder / "unknown.jsonl").write_bytes(MOONCAKE[:200])
    with pytest.raises(InputError, match=r"to/unknown.jsonl: found \d requests; expected the 3"):
        fetch("missing", ["unknown"])
    assert names_of(fetch.folder) == ["unknown.jsonl"]


BY_HAND = "By hand: put it at .*to/small.csv, from https://raw.githubusercontent.com/a/b/0+/x.csv"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", f"missing/small.csv: cannot be downloaded: 404 Not Found. {BY_HAND}"),
        ("page", f"page/small.csv: found sha256 [0-9a-f]*; expected {HASH}: damaged on the way, or not the same file; try again"),
        ("breaks", f"cannot be downloaded: .*20 bytes read, {len(AZURE) - 20} more expected.*{BY_HAND}"),
        ("stalls", f"cannot be downloaded: Read timed out. {BY_HAND}"),
        ("refused", f"cannot be downloaded: .*Connection refused. {BY_HAND}"),
        ("nonsense://here", f"cannot be downloaded: No connection adapters were found.*{BY_HAND}"),
        ("http://[", f"cannot be downloaded: .*{BY_HAND}"),
    ],
)  # fmt: skip
def test_every_failure_says_what_to_do_and_changes_nothing(fetch, monkeypatch, how, said):
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.3)
    if how == "refused":
        with socket.create_server(("127.0.0.1", 0)) as free:
            how = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(InputError, match=said):
        fetch(how)
    assert not fetch.folder.exists()
    fetch.folder.mkdir()
    (fetch.folder / "small.csv").write_text("mine")
    with pytest.raises(
        InputError, match=f"to/small.csv: found sha256 [0-9a-f]*; expected {HASH}; --force downloads it"
    ):
        fetch()
    with pytest.raises(InputError, match=said):
        fetch(how, force=True)
    assert names_of(fetch.folder) == ["small.csv"]
    assert (fetch.folder / "small.csv").read_text() == "mine"
    fetch(force=True)
    assert (fetch.folder / "small.csv").read_bytes() == AZURE


def test_a_full_disk(fetch, monkeypatch):
    def full(self, url, file, pooch):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching.HTTPDownloader, "__call__", full)
    with pytest.raises(InputError, match="to/small.csv: cannot be written: No space left on device"):
        fetch()
    assert not fetch.folder.exists()


def test_folders_that_cannot_be_written_and_names_that_are_none(refused, tmp_path):
    for folder in ("/proc/nowhere", ROOT / "README.md"):
        said = refused("fetch", "mooncake-synthetic", "--to", folder, "--from", "http://127.0.0.1:1")
        assert "cannot be written" in said
    for arguments, said in (
        (
            ["mooncake-conv"],
            "'mooncake-conv' is no public trace (did you mean mooncake-conversation?); there are: azure-",
        ),
        ([], "expected names, or --all for azure-conversation-2023, "),
        (["mooncake-synthetic", "--all"], "expected names, or --all"),
    ):
        assert said in refused("fetch", *arguments, "--to", tmp_path)


def test_ctrl_c_leaves_no_half_file(host, tmp_path):
    command = ["trace", "fetch", "mooncake-synthetic", "--to", str(tmp_path / "to"), "--from", f"{host}/stalls"]
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower_sim", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not ("/stalls/mooncake-synthetic.jsonl" in Host.asked and names_of(tmp_path / "to")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "Interrupted; earlier files are as they were.\n")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_drawn_on_a_terminal(fetch, monkeypatch, capsys):
    monkeypatch.setattr(fetching, "Console", partial(fetching.Console, force_terminal=True, width=100))
    fetch()
    said = capsys.readouterr().err
    assert "small" in said
    assert f"{len(AZURE)}/{len(AZURE)} bytes" in said


# ---------------------------------------------------------------------- convert


@st.composite
def traces(draw):
    """Requests with or without prefixes (in blocks of which the last is hashed, or not) and sessions that wait in turn."""
    count = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    unit_ns = draw(st.sampled_from([1, 100, 10**6, 10**9]))
    arrival_ns = np.sort(rng.integers(0, 50, count)) * unit_ns
    input_tokens, output_tokens = rng.integers(1, 3000, count), rng.integers(1, 100, count)
    input_tokens[0] = 3000  # no other block size has as many hashes for it
    prefixes = sessions = after = None
    if size := draw(st.sampled_from([None, 16, 64, 512])):
        counts = input_tokens // size if (floor := draw(st.booleans())) else -(-input_tokens // size)
        first = np.concatenate(([0], np.cumsum(counts)))
        prefixes = Prefixes(first, rng.integers(-3 if floor else 0, 40, first[-1]), size)
    if draw(st.booleans()):
        sessions = rng.integers(0, draw(st.integers(1, count)), count)
        waits = [np.flatnonzero(sessions[:row] == sessions[row])[-1:] for row in range(count)]
        first = np.concatenate(([0], np.cumsum([len(of) for of in waits])))
        binding = rng.random(count) < 0.5
        waiting = np.diff(first) > 0
        delay_ns = np.where(binding, 0, rng.integers(0, 50, count) * unit_ns)[waiting]
        after = Dependencies(first, np.concatenate(waits), delay_ns, np.zeros(len(delay_ns), bool), binding | ~waiting)
    return Requests(arrival_ns - arrival_ns[0], input_tokens, output_tokens, prefixes, sessions, after)


def assert_same(found: Requests, wanted: Requests):
    """But for the numbers of sessions, ids of hashes where they were negative, and hashes of what is not a whole block."""
    for column in ("arrival_ns", "input_tokens", "output_tokens"):
        assert getattr(found, column).tolist() == getattr(wanted, column).tolist()
    if wanted.sessions is not None and len(set(wanted.sessions.tolist())) < len(wanted):
        pairs = set(zip(found.sessions.tolist(), wanted.sessions.tolist(), strict=True))
        assert len(pairs) == len(set(found.sessions.tolist())) == len(set(wanted.sessions.tolist()))
        for column in ("first", "on", "delay_ns", "dispatch", "binding"):
            assert getattr(found.after, column).tolist() == getattr(wanted.after, column).tolist()
    else:
        assert found.sessions is None
    if wanted.prefixes:
        assert found.prefixes.block_tokens == wanted.prefixes.block_tokens
        pairs, seen = set(), []
        for row in range(len(wanted)):
            theirs, ours = wanted.prefixes.of(row).tolist(), found.prefixes.of(row).tolist()
            pairs |= set(zip(theirs, ours, strict=False))
            seen += ours[len(theirs) :]
        assert len(pairs) == len({theirs for theirs, _ in pairs}) == len({ours for _, ours in pairs})
        assert len(seen) == len(set(seen))
        assert not set(seen) & {ours for _, ours in pairs}
        if wanted.prefixes.hashes.min(initial=0) >= 0:
            assert all(theirs == ours for theirs, ours in pairs)
    else:
        assert found.prefixes is None


@settings(max_examples=100, deadline=None)
@given(traces(), st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst"]))
def test_reading_what_was_written_gives_the_same(tmp_path_factory, requests, ending):
    path = tmp_path_factory.mktemp("written") / f"trace{ending}"
    assert write_trace(requests, path, ending) == []
    assert_same(read_trace(path).requests, requests)


@settings(max_examples=50, deadline=None)
@given(traces(), st.sampled_from([".csv", ".csv.gz", ".csv.zst", ".parquet"]))
def test_tables_hold_times_and_lengths_and_say_what_they_lose(tmp_path_factory, requests, ending):
    path = tmp_path_factory.mktemp("written") / f"trace{ending}"
    lost = write_trace(requests, path, ending)
    assert [line.split(":")[0] for line in lost] == (["what prompts share"] if requests.prefixes else []) + (
        ["sessions"] if requests.sessions is not None else []
    )
    assert_same(read_trace(path).requests, Requests(requests.arrival_ns, requests.input_tokens, requests.output_tokens))


def test_packed_files_are_packed_and_the_same_each_time(tmp_path):
    requests = read_trace(EXAMPLES / "mooncake.jsonl").requests
    for kind, magic in ((".jsonl.gz", b"\x1f\x8b"), (".csv.zst", b"\x28\xb5\x2f\xfd"), (".parquet", b"PAR1")):
        raw = []
        for name in ("a", "b"):
            write_trace(requests, tmp_path / f"{name}{kind}", kind)
            raw.append((tmp_path / f"{name}{kind}").read_bytes())
        assert raw[0] == raw[1]
        assert raw[0].startswith(magic)


def waiting(*waits, sessions, binding=False):
    """Requests that wait as [(on, delay, dispatch), …] each."""
    flat = np.array([wait for of in waits for wait in of], np.int64).reshape(-1, 3)
    first = np.concatenate(([0], np.cumsum([len(of) for of in waits])))
    count = len(waits)
    after = Dependencies(first, flat[:, 0], flat[:, 1], flat[:, 2].astype(bool), np.full(count, binding))
    return Requests(np.arange(count) * 10**6, np.full(count, 5), np.full(count, 5), None, np.array(sessions), after)


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        (waiting([], [], [(0, 0, 0), (1, 0, 0)], sessions=[0, 0, 0]), "what 1 requests wait for beside the end of the turn before"),
        (waiting([], [(0, 5, 1)], sessions=[0, 0]), "what 1 requests wait for"),
        (waiting([], [(0, 5, 0)], sessions=[0, 0], binding=True), "what 1 requests wait for"),
        (waiting([], [(0, 0, 0)], [(0, 0, 0)], sessions=[0, 0, 0]), "what 2 requests wait for"),
        (waiting([], [(0, 0, 0)], sessions=[0, 1]), "what 1 requests wait for"),
        (replace(waiting([], [], sessions=[0, 0]), after=None), "sessions: their turns wait for nothing"),
        (Requests(np.array([0, 2**61 + 1]), *np.ones((2, 2), int)), "of times, which are written in milliseconds"),
        (Requests(np.array([0]), np.array([5]), np.array([5]), Prefixes(np.array([0, 1]), np.array([3]), 17)), "readers know 16, 32, 64"),
        (Requests(np.array([0]), np.array([5]), np.array([5]), Prefixes(np.array([0, 1]), np.array([3]), 16)), "no prompt is longer, and 512 is read"),
    ],
)  # fmt: skip
def test_what_mooncake_cannot_hold_is_said(tmp_path, requests, said):
    path = tmp_path / "trace.jsonl"
    (lost,) = write_trace(requests, path, ".jsonl")
    assert said in lost
    found = read_trace(path).requests
    assert found.after is None
    assert found.input_tokens.tolist() == requests.input_tokens.tolist()


def test_a_part_is_converted_and_what_is_lost_is_said(refused, tmp_path):
    source = tmp_path / "in.jsonl"
    rows = [
        {"timestamp": 1000 * at, "input_length": 600, "output_length": 1 + at, "hash_ids": [1, 2 + at]}
        for at in range(9)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not a row\n")
    out = tmp_path / "new" / "out.csv"
    arguments = [
        "trace",
        "convert",
        str(source),
        str(out),
        "--window",
        "2",
        "7.5",
        "--limit",
        "4",
        "--on-error",
        "skip",
    ]
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 4 requests of {source} (mooncake)\n"
    assert f"Warning: rows skipped: 1 malformed; the first at {source}:10: not a JSON object" in done.stderr
    assert f"Warning: not in {out}: what prompts share: this format has times and lengths only" in done.stderr
    found = read_trace(out).requests
    assert found.output_tokens.tolist() == [3, 4, 5, 6]
    assert found.arrival_ns.tolist() == [0, 10**9, 2 * 10**9, 3 * 10**9]
    before = out.read_bytes()
    for changes, said in (
        ([str(source), str(out)], f"{source}:10: not a JSON object"),
        ([str(source), str(out), "--on-error", "skip", "--window", "100", "200"], "no requests in window_s [100.0, 200.0]"),
        ([str(source), str(out), "--on-error", "skip", "--window", "-inf", "2"], "--window: found -inf 2; expected seconds from 0 on"),
        ([str(source), str(out), "--format", "azzure"], "--format: found 'azzure' (did you mean azure?); allowed: auto, mooncake"),
        ([str(source), str(out), "--on-error", "ignore"], "'ignore'"),
        ([str(source), str(out), "--limit", "0"], "--limit"),
        ([str(source), str(tmp_path / "out.txt")], "out.txt: found ending '.txt'; allowed: .jsonl, .jsonl.gz"),
        ([str(source), "/proc/nowhere.csv"], "/proc/nowhere.csv: cannot be written"),
        (["nothing.csv", str(out)], "nothing.csv: cannot be read: No such file"),
    ):  # fmt: skip
        assert said in refused("convert", *changes)
    assert out.read_bytes() == before
    assert names_of(out.parent) == ["out.csv"]


def test_parquet_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"Parquet files need pyarrow: pip install 'twotower-sim\[parquet\]'"):
        ending(Path("a.parquet"))


# ---------------------------------------------------------------------- describe


def stats(arrival_s, input_tokens=None, output_tokens=None, **more):
    """Of requests at these times; lengths differ."""
    lengths = np.arange(len(arrival_s)) % 97 + 10
    columns = [lengths if given is None else np.array(given) for given in (input_tokens, output_tokens)]
    trace = {key: more.pop(key) for key in ("relative", "late") if key in more}
    arrival_ns = np.rint(np.array(arrival_s, float) * 1e9).astype(np.int64)
    return describe(Trace(Requests(arrival_ns, *columns, **more), "made", **trace))


def poisson(count=20_000, rate=5.0):
    return np.cumsum(np.random.default_rng(0).exponential(1 / rate, count))


def test_figures_of_a_poisson_process():
    at = poisson(100_000)
    of = stats(at - at[0]).arrivals
    assert of.rate_rps == pytest.approx(5, rel=0.03)
    assert of.gap_cv == pytest.approx(1, rel=0.03)
    assert of.dispersion == {window: pytest.approx(1, rel=0.15) for window in (1, 10, 60)}
    assert of.bin_s is None
    assert of.peak[1] == max(((at - at[0]) // 60 == minute).sum() for minute in range(400))


def test_bursts_show():
    """Three requests at a time in minute 0, then one a minute later."""
    at = [0, 0.001, 0.002, 20, 20.001, 20.002, 80]
    of = stats(at).arrivals
    assert of.peak == (0, 6)
    gaps = np.diff(at)
    assert of.gap_cv == pytest.approx(gaps.std() / gaps.mean())
    assert of.longest_gap == (pytest.approx(20.002), pytest.approx(59.998))
    assert list(of.dispersion) == [1]  # there are not ten windows of 10 s


def test_lengths_and_their_correlation_are_numpys_and_scipys():
    rng = np.random.default_rng(1)
    input_tokens = rng.integers(1, 30, 500)
    output_tokens = input_tokens + rng.integers(1, 60, 500)
    found = stats(np.arange(500), input_tokens, output_tokens)
    assert found.input_tokens.quantiles == tuple(np.percentile(input_tokens, [1, 10, 50, 90, 99, 100]))
    assert found.output_tokens.mean == output_tokens.mean()
    assert found.rank_correlation == pytest.approx(spearmanr(input_tokens, output_tokens).statistic)
    assert stats(np.arange(5), [7] * 5).rank_correlation is None


def test_reuse_is_counted_in_tokens():
    """Blocks of 16: of 40 tokens the first two and the last eight; the third request has the first block only."""
    prefixes = Prefixes(np.array([0, 3, 6, 8, 8]), np.array([1, 2, 3, 1, 2, 3, 1, 9]), 16)
    found = stats(range(4), [40, 40, 30, 8], prefixes=prefixes).reuse
    assert found.hit_ratio == pytest.approx((40 + 16) / 118)
    assert (found.block_tokens, found.shared_tokens, found.shared_by) == (16, 16, 3)
    equal = Prefixes(np.array([0, 3, 6]), np.array([1, 2, 3, 1, 2, 4]), 16)
    assert stats(range(2), [48, 48], prefixes=equal).reuse.shared_tokens == 32


def test_sessions_are_counted_with_what_waits():
    requests = waiting(
        [], [(0, 10**9, 0)], [(1, 3 * 10**9, 0)], [], [(3, 0, 1), (2, 10**9, 0)], sessions=[0, 0, 0, 1, 1]
    )
    found = describe(Trace(requests, "made")).sessions
    assert (found.count, found.waiting, found.joins) == (2, 3, 1)
    assert found.turns.quantiles[-1] == 3
    assert found.think_s.quantiles[-1] == 3
    assert found.think_s.mean == pytest.approx(5 / 3)


@pytest.mark.parametrize(
    ("arrival_s", "more", "said"),
    [
        (np.repeat(np.arange(0, 300, 3.0), 4), {}, "time stamps are bunched: 75.0% are those of another request, in steps of 3 s"),
        (np.arange(50), {"late": 3}, "out of order: 3 requests arrived before the one that stands before them"),
        ([*range(50), 300], {}, "nothing for more than 10 mean gaps: 1 times, the longest 251 s, after 49 s"),
        (np.arange(50) / 1000, {}, "spans 0.049 s: are time stamps in another unit?"),
        (np.arange(50) * 1e7, {}, "spans 5,671 days: are time stamps in another unit?"),
        (poisson(30_000, 20_000.0), {}, "requests/s: are time stamps in another unit?"),
        ([0] * 5, {}, "identical rows: 4 requests (80.0%) have time and lengths of another"),
        (np.arange(50), {"input_tokens": [7] * 50}, "every input has 7 tokens"),
        (np.arange(50), {"output_tokens": [*range(1, 31), *[400] * 20]}, "a cap: 20 outputs (40.0%) have 400 tokens, and none has more"),
        (np.arange(50), {"output_tokens": [1] * 20 + [*range(2, 32)]}, "outputs of one token: 20 (40.0%)"),
    ],
)  # fmt: skip
def test_what_looks_odd_is_said(arrival_s, more, said):
    if said.startswith("identical"):
        more = {"input_tokens": [3] * 5, "output_tokens": [4] * 5}
    assert any(said in oddity for oddity in stats(arrival_s, **more).oddities)


def test_nothing_odd_is_said_of_a_plain_trace():
    at = np.cumsum(np.random.default_rng(0).uniform(0.1, 1.0, 500))
    assert stats(at - at[0]).oddities == []


def test_describe_prints_and_draws(tmp_path):
    file = tmp_path / "chat.jsonl"
    rows = [{"timestamp": 0, "input_length": 600, "output_length": 7, "session_id": "a", "hash_ids": [1, 2]},
            {"timestamp": 90_000, "input_length": 700, "output_length": 9, "session_id": "a", "delay": 2000, "hash_ids": [1, 3]}]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    out = tmp_path / "picture.html"
    done = call("trace", "describe", str(file), "--on-error", "skip", "--plot", str(out))
    assert done.returncode == 0, done.stderr
    for said in (
        "chat.jsonl: 2 requests, format mooncake",
        "Skipped     1 malformed; the first at",
        "Span        90 s, 0.02222 requests/s on average; at most 1 in a minute",
        "blocks of 512 tokens; an unbounded cache would hold 39.4% of input tokens; 2 requests begin with the same 512",
        "Sessions    1 of 2 (p90 2, max 2) turns; 1 requests wait for others",
        "Think time  2 (p90 2, max 2) s",
    ):
        assert said in done.stdout
    (row,) = (line.split() for line in done.stdout.splitlines() if line.strip().startswith("Input"))
    assert row == ["Input", "650", "601", "610", "650", "690", "699", "700"]
    picture = out.read_text()
    for panel in ("Arrivals", "Lengths", "Gaps between arrivals", "Prefixes seen before"):
        assert panel in picture
    assert "<script src=" not in picture


@pytest.mark.parametrize("example", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_every_example_is_described_and_drawn(example, tmp_path, capsys):
    format = example.name.split(".")[0]
    describe_trace(example, format if format in FORMATS else "auto", "fail", tmp_path / "picture.svg")
    assert "requests, format " in capsys.readouterr().out
    assert names_of(tmp_path) == ["picture.svg"]


def test_png(tmp_path):
    describe_trace(EXAMPLES / "azure.csv", "auto", "fail", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_that_share_nothing_and_a_single_request(tmp_path, capsys):
    file = tmp_path / "trace.jsonl"
    for count in (1, 2):
        rows = [{"timestamp": at, "input_length": 5, "output_length": 5, "hash_ids": [at]} for at in range(count)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        describe_trace(file, "auto", "fail", tmp_path / "picture.svg")
        assert "an unbounded cache would hold 0.0% of input tokens; no two begin alike" in capsys.readouterr().out


def test_describe_refuses(refused):
    for arguments, said in (
        ([str(EXAMPLES / "azure.csv"), "--plot", "picture.pdf"], "found suffix '.pdf'; allowed: .html, .png, .svg"),
        ([str(EXAMPLES / "azure.csv"), "--plot", "/proc/picture.svg"], "/proc/picture.svg: cannot be written"),
        ([str(EXAMPLES / "azure.csv"), "--format", "mooncake"], "azure.csv"),
    ):
        assert said in refused("describe", *arguments)


def test_describe_the_real_traces(data):
    found = describe(read_trace(data / "traces" / "mooncake_conversation_trace.jsonl.gz"))
    assert found.reuse.hit_ratio == pytest.approx(0.374, abs=0.001)
    assert (found.reuse.shared_tokens, found.reuse.shared_by) == (512, 12031)
    assert any("a cap: 30 outputs" in oddity for oddity in found.oddities)
    assert any("time stamps are bunched: 90.2%" in oddity for oddity in found.oddities)


def test_columns_are_named(tmp_path, refused):
    file = tmp_path / "log.csv"
    file.write_text("when,in,out\n2024-01-01T00:00:00Z,5,7\n2024-01-01T00:00:01.5Z,6,8\n")
    named = [
        "--column",
        "arrival=when",
        "--column",
        "input_tokens=in",
        "--column",
        "output_tokens=out",
        "--time-unit",
        "iso",
    ]
    done = call("trace", "convert", str(file), str(tmp_path / "out.jsonl"), *named)
    assert done.returncode == 0, done.stderr
    requests = read_trace(tmp_path / "out.jsonl").requests
    assert requests.arrival_ns.tolist() == [0, 1_500_000_000]
    assert requests.output_tokens.tolist() == [7, 8]
    for arguments, said in (
        (named[2:], "--column: arrival=NAME is missing"),
        ([*named, "--column", "input_token=in"], "--column: found input_token=in (did you mean input_tokens?); allowed: arrival, "),
        ([*named, "--column", "session"], "--column: found session="),
        ([*named, "--format", "azure"], "--format: found 'azure'; with --column it is columns, or left out"),
        (["--time-unit", "ms"], "--time-unit: has no effect without --column"),
        (["--column", "arrival=at", *named[2:]], "column at is missing"),
    ):  # fmt: skip
        assert said in refused("describe", file, *arguments)


# ---------------------------------------------------------------------- fingerprints


@pytest.fixture
def chat(tmp_path):
    """A trace of a thousand requests."""
    rng = np.random.default_rng(0)
    requests = Requests(
        np.cumsum(rng.exponential(2e8, 1000)).astype(np.int64), rng.integers(10, 900, 1000), rng.integers(1, 99, 1000)
    )
    write_trace(requests, tmp_path / "chat.csv", ".csv")
    return tmp_path / "chat.csv"


def test_a_fingerprint_is_written_checked_and_drawn_from(chat, tmp_path):
    out, picture = tmp_path / "chat.yaml", tmp_path / "chat.svg"
    done = call("trace", "fingerprint", str(chat), str(out), "--check", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert f"{out}: fingerprint of 1,000 requests, " in done.stdout
    (row,) = (line.split() for line in done.stdout.splitlines() if line.strip().startswith("input_tokens p50"))
    trace = read_trace(chat).requests
    assert float(row[2]) == pytest.approx(np.median(trace.input_tokens), abs=0.5)
    assert float(row[3]) == pytest.approx(float(row[2]), rel=0.02)
    assert out.read_text().startswith(f"# twotower-sim trace fingerprint {chat} {out}\n")
    assert load_fingerprint(str(out), Path()).source.trace == "chat.csv"
    assert "<svg" in picture.read_text()
    drawn = tmp_path / "drawn.jsonl.gz"
    sample = ["trace", "sample", str(out), str(drawn), "--requests", "3000", "--rate-scale", "2"]
    done = call(*sample)
    assert done.returncode == 0, done.stderr
    requests = read_trace(drawn).requests
    assert len(requests) == 3000
    assert requests.arrival_ns[-1] / 1e9 == pytest.approx(300, rel=0.1)  # 5 a second, twice as fast
    assert np.median(requests.input_tokens) == pytest.approx(np.median(trace.input_tokens), rel=0.02)
    before = drawn.read_bytes()
    assert call(*sample).returncode == 0
    assert drawn.read_bytes() == before
    assert call(*sample, "--seed", "1").returncode == 0
    assert drawn.read_bytes() != before


def test_fingerprints_of_public_traces_say_what_they_are_and_are_the_shipped_ones(data, tmp_path):
    for name, file in (
        ("azure-conversation-2023", "AzureLLMInferenceTrace_conv.csv.gz"),
        ("mooncake-conversation", "mooncake_conversation_trace.jsonl.gz"),
    ):
        path, out = tmp_path / "trace", tmp_path / "out.yaml"
        path.write_bytes(gzip.decompress((data / "traces" / file).read_bytes()))
        fingerprint_trace(path, out, "auto", "fail", False, None)
        shipped = (preset.ROOT / "fingerprints" / f"{name}.yaml").read_text()
        assert out.read_text().partition("\n")[2] == shipped.partition("\n")[2]


def test_fingerprint_and_sample_refuse(chat, tmp_path, refused):
    out = tmp_path / "drawn.csv"
    for arguments, said in (
        (["fingerprint", chat, out, "--plot", "x.svg"], "--plot: has no effect without --check"),
        (["fingerprint", chat, out, "--check", "--plot", "x.pdf"], "found suffix '.pdf'"),
        (["fingerprint", chat, "/proc/nowhere.yaml"], "/proc/nowhere.yaml: cannot be written"),
        (["fingerprint", tmp_path / "nothing", out], "nothing: cannot be read"),
        (
            ["sample", "azure", out, "--requests", "9"],
            "fingerprint 'azure' is neither a preset (azure-conversation-2023, ",
        ),
        (["sample", chat, out, "--requests", "9"], "chat.csv"),
        (["sample", "azure-conversation-2023", tmp_path / "x", "--requests", "9"], "allowed: .jsonl, "),
        (["sample", "azure-conversation-2023", out], "--requests"),
        (
            ["sample", "azure-conversation-2023", out, "--requests", "9", "--rate-scale", "nan"],
            "--rate-scale: found nan",
        ),
    ):
        assert said in refused(*arguments)
    assert names_of(tmp_path) == ["chat.csv"]


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("catalogue", "print_list", ["list"]),
        ("fetch", "fetch_traces", ["fetch", "--all"]),
        ("report", "read_trace", ["describe", "FILE", "--plot", "OUT.svg"]),
        ("convert", "write_trace", ["convert", "FILE", "OUT.csv"]),
        ("fingerprint", "measure", ["fingerprint", "FILE", "OUT.yaml"]),
        ("fingerprint", "write_trace", ["sample", "azure-conversation-2023", "OUT.csv", "--requests", "9"]),
    ],
)
def test_every_command_can_be_interrupted(chat, tmp_path, monkeypatch, capsys, module, name, arguments):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    module = importlib.import_module(f"twotower_sim.trace.{module}")
    monkeypatch.setattr(module, name, interrupt)
    arguments = [a.replace("FILE", str(chat)).replace("OUT", str(tmp_path / "out")) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["twotower-sim", "trace", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 130
    assert capsys.readouterr() == ("", "Interrupted; earlier files are as they were.\n")
    assert names_of(tmp_path) == ["chat.csv"]
