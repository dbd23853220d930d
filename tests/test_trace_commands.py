"""``twotower-sim trace``: what is fetched, described, converted and drawn; what is refused, and what stays."""

import errno
import gzip
import hashlib
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import ClassVar

import pytest
from conftest import ROOT
from test_cli import call

from twotower_sim import public_traces, trace_fetch
from twotower_sim.errors import InputError
from twotower_sim.trace_fetch import fetch_traces

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
    traces = public_traces.public_traces(registry)
    monkeypatch.setattr(trace_fetch, "public_traces", lambda: traces)
    folder = tmp_path / "to"

    def run(how="good", names=("small",), force=False):
        fetch_traces(list(names), folder, how if ":" in how else f"{host}/{how}/", force)

    run.folder = folder
    return run


def names_of(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_list():
    done = call("trace", "list")
    assert done.returncode == 0, done.stderr
    for name, trace in public_traces.public_traces().items():
        (row,) = (line.split() for line in done.stdout.splitlines() if line.split()[:1] == [name])
        assert {f"{trace.of.requests:,}", trace.source.licence, trace.source.repository} <= set(row)
    assert "mooncake  Mooncake JSONL (kvcache-ai/Mooncake, FAST'25)" in done.stdout


def test_the_registry_is_what_scenarios_and_the_readme_say():
    files = {trace.file: trace for trace in public_traces.public_traces().values()}
    for name in ("azure_conversation", "mooncake_conversation"):
        text = (ROOT / "scenarios" / f"{name}.yaml").read_text()
        assert sum(f"../traces/downloads/{file}\n" in text for file in files) == 1
    assert (
        files["mooncake-toolagent.jsonl"].url
        == "https://raw.githubusercontent.com/kvcache-ai/Mooncake/3b5a594133958449a1feaf1c9e0fc1b553e34a28/FAST25-release/traces/toolagent_trace.jsonl"
    )
    assert public_traces.downloads().resolve() == ROOT / "traces" / "downloads"


def test_the_registry_has_the_hashes_of_the_real_traces(data):
    traces = public_traces.public_traces()
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
    monkeypatch.setattr(trace_fetch, "TIMEOUT_S", 0.3)
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

    monkeypatch.setattr(trace_fetch.HTTPDownloader, "__call__", full)
    with pytest.raises(InputError, match="to/small.csv: cannot be written: No space left on device"):
        fetch()
    assert not fetch.folder.exists()


def test_folders_that_cannot_be_written_and_names_that_are_none(fetch, tmp_path):
    for folder in ("/proc/nowhere", "README.md"):
        done = call("trace", "fetch", "mooncake-synthetic", "--to", folder, "--from", "http://127.0.0.1:1")
        assert (done.returncode, done.stdout) == (2, "")
        assert "cannot be written" in done.stderr
    for arguments, said in (
        (
            ["mooncake-conv"],
            "'mooncake-conv' is no public trace (did you mean mooncake-conversation?); there are: azure-",
        ),
        ([], "expected names, or --all for azure-conversation-2023, "),
        (["mooncake-synthetic", "--all"], "expected names, or --all"),
    ):
        done = call("trace", "fetch", *arguments, "--to", str(tmp_path))
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr


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
    monkeypatch.setattr(trace_fetch, "Console", partial(trace_fetch.Console, force_terminal=True, width=100))
    fetch()
    said = capsys.readouterr().err
    assert "small" in said
    assert f"{len(AZURE)}/{len(AZURE)} bytes" in said
