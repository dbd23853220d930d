"""A calibration from the command line to a profile: estimate, measuring, resuming, and what goes wrong."""

import json
import re
import subprocess
import sys

import pytest
import torch
from small_model import CONFIG, small_model
from typer.testing import CliRunner

from calibrate.bench import USABLE, Bench
from calibrate.calibration import BUNDLED
from calibrate.checkpoint import save
from calibrate.cli import app, main
from calibrate.grids import GridOf, held_out_errors, refined
from calibrate.journal import Journal
from calibrate.model import Config
from calibrate.prompts import read_prompts
from calibrate.shapes import Point, Shapes, Sizes, cache_bytes, points
from twotower_sim.cli import app as simulator
from twotower_sim.errors import InputError
from twotower_sim.profile import load_profile

BYTES = CONFIG | {
    "vocab_size": 260,
    "eos_token_id": 2,
    "towers": 2,
    "chunk_size": 16,
    "max_position_embeddings": 262_144,
}
FEW = ["--batch", "1,4", "--context", "0,64", "--tokens", "16,64", "--repetitions", "3", "--refine", "0"]
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # unless another is asked for
GRID_POINTS = 3 * 4 + 2 * 2 * 2 + 2 * 4  # denoise, extend, decode; prefill; mixes


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BYTES))
    return path


def calibrate(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(done.exception, InputError):
        raise done.exception
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def random_weights(config, out, *more):
    return calibrate("--model", config, "--weights", "random", "--out", out, *FEW, *more)


def test_a_dry_run_estimates_and_writes_nothing(config, tmp_path):
    done = random_weights(config, tmp_path / "p.json", "--dry-run")
    assert "latency    28 points x 3 samples" in done.output
    assert not list(tmp_path.glob("p.json*"))


def test_an_estimate_for_two_gpus_that_are_not_here():
    """The published sizes: 63.2 GB a tower, 6,144 B a token, 50 MB of states."""
    nano = ["--model", "nemotron-twotower-30b-a3b", "--weights", "random", "--dry-run"]
    one = calibrate(*nano, "--assume", "h200", "--devices", "cuda:0").output
    two = calibrate(*nano, "--assume", "h100-sxm", "--devices", "cuda:0,cuda:1").output
    assert "63.16 GB for one tower on a device of 86 GB" in two
    assert "for both towers on a device of 151 GB" in one
    assert "49.08 MB of Mamba states a sequence, 6,144 B of keys" in one
    assert "315 points" in two  # with the transfer
    assert "min" in one


def test_random_weights_give_latency_and_no_commits(config, tmp_path):
    random_weights(config, tmp_path / "p.json.gz")
    profile = load_profile(str(tmp_path / "p.json.gz"))
    assert profile.provenance.weights == "random"
    assert profile.provenance.environment["torch"] == torch.__version__
    assert not profile.commits
    assert not profile.commit_records
    latency = profile.latency
    assert set(latency.passes) == {"denoise", "extend", "decode", "prefill", "extend+prefill", "decode+prefill"}
    assert latency.passes["denoise"].axes == {"block_size": [16], "sequences": [1, 4], "context": [0, 64]}
    assert all(len(samples) == 3 for grid in latency.passes.values() for samples in grid.samples_s)
    assert latency.memory.bytes_per_token == 2 * 2 * 2 * 16 * DTYPE.itemsize  # two layers of K and V, two heads of 16
    assert {"denoise", "decode", "prefill"} <= set(latency.held_out)
    assert profile.device.memory_bandwidth_gb_per_s > 0
    assert not (tmp_path / "p.json.gz.journal").exists()


def test_the_simulator_runs_on_the_profile(config, tmp_path):
    random_weights(config, tmp_path / "p.json.gz")
    scenario = tmp_path / "s.yaml"
    scenario.write_text(f"""\
workload:
  kind: closed_loop
  requests: 12
  concurrency: 2
  input_tokens: {{kind: constant, value: 30}}
  output_tokens: {{kind: constant, value: 32}}
model: {config}
deployment: {{placement: {{kind: colocated}}}}
scheduler: {{max_num_seqs: 4, max_num_batched_tokens: 64}}
latency: {{kind: profile, path: p.json.gz}}
commits: {{kind: constant, tokens_per_step: 4}}
""")
    done = CliRunner().invoke(simulator, ["run", str(scenario), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["counts"]["completed"] == 12
    assert summary["provenance"]["latency"].startswith("measured: calibrate --model")


def test_an_interruption_loses_no_sample(config, tmp_path, monkeypatch):
    timed, original = [], Bench.time

    def until(limit):
        def time(self, point):
            if len(timed) == limit:
                raise KeyboardInterrupt
            timed.append(point)
            return original(self, point)

        return time

    monkeypatch.setattr(Bench, "time", until(90))
    done = random_weights(config, tmp_path / "p.json")
    assert done.exit_code == 130
    journal = (tmp_path / "p.json.journal").read_text().splitlines()
    kept = [json.loads(line) for line in journal[1:]]
    assert len(kept) > 30
    assert not (tmp_path / "p.json").exists()
    with pytest.raises(InputError, match="with other settings stopped here.*repetitions was 3, is 4"):
        random_weights(config, tmp_path / "p.json", "--repetitions", "4")
    monkeypatch.setattr(Bench, "time", original)
    random_weights(config, tmp_path / "p.json")
    grid = load_profile(str(tmp_path / "p.json")).latency.passes
    samples = [(key, seconds) for key, seconds in kept if key[0] in grid]
    assert len(samples) > 25
    for (kind, values, repetition), seconds in samples:
        index = [list(point.values) for point in points({kind: grid[kind].axes})].index(values)
        assert grid[kind].samples_s[index][repetition] == seconds


def test_a_line_cut_off_is_dropped(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, {"a": 1})
    journal.add(0.5, "denoise", [1, 2], 0)
    with path.open("a") as file:
        file.write('[["denoise", [1')
    again = Journal(path, {"a": 1})
    assert again.get("denoise", [1, 2], 0) == 0.5
    assert again.get("denoise", (1, 2), 0) == 0.5
    again.add(0.7, "x")
    assert len(Journal(path, {"a": 1})) == 2
    path.write_text('{"a": 1}\nfoo\n')
    with pytest.raises(InputError, match="j:2: not a line of a calibration"):
        Journal(path, {"a": 1})


def test_a_point_without_memory_is_skipped_and_noted(config, tmp_path, monkeypatch):
    original = Bench.time

    def time(self, point):
        if point == Point("decode", (4, 64)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
        return original(self, point)

    monkeypatch.setattr(Bench, "time", time)
    random_weights(config, tmp_path / "p.json")
    latency = load_profile(str(tmp_path / "p.json")).latency
    assert [(s.pass_, s.point, s.why) for s in latency.skipped] == [
        ("decode", [4, 64], "out of memory: CUDA out of memory. Tried")
    ]
    assert latency.passes["decode"].median_s[3] is None


def test_a_cache_beyond_memory_is_not_tried(config, tmp_path, monkeypatch):
    monkeypatch.setattr("calibrate.bench.free_bytes", lambda device: 200_000)
    random_weights(config, tmp_path / "p.json")
    why = {s.why for s in load_profile(str(tmp_path / "p.json")).latency.skipped}
    assert all(re.match(r"out of memory: the cache takes \d\.\d GB, 0\.0 GB are free", text) for text in why)
    assert why


def test_memory_is_counted_with_the_last_cache_given_back(config, tmp_path, monkeypatch):
    held, room = [], Bench.room

    def keep(self, points):
        monkeypatch.setattr("calibrate.bench.free_bytes", lambda device: held.append(self._caches) or 1 << 30)
        room(self, points)

    monkeypatch.setattr(Bench, "room", keep)
    random_weights(config, tmp_path / "p.json")
    assert held
    assert not any(held)


def test_points_that_fit_alone_but_not_together_are_all_measured(config, tmp_path, monkeypatch):
    """One cache for the largest batch and the longest prompt would be larger than either point's."""
    rooms, room = [], Bench.room
    points_of = {Point("extend+prefill", (4, 16)), Point("extend+prefill", (1, 64))}
    sizes = Sizes.of(Config.of(BYTES, "test"), DTYPE)
    limit = max(cache_bytes([point], 64, sizes, 16) for point in points_of)
    assert cache_bytes(list(points_of), 64, sizes, 16) > limit
    monkeypatch.setattr("calibrate.bench.free_bytes", lambda device: int(limit / USABLE) + 1)
    monkeypatch.setattr(Bench, "room", lambda self, points: (rooms.append(points), room(self, points)))
    random_weights(config, tmp_path / "p.json")
    latency = load_profile(str(tmp_path / "p.json")).latency
    grid = latency.passes["extend+prefill"]
    assert [median is not None for median in grid.median_s] == [True, True, True, False]  # (4, 64) alone is too large
    assert {s.pass_ for s in latency.skipped} >= {"extend+prefill"}
    assert all(cache_bytes(points, 64, sizes, 16) <= limit for points in rooms)


def test_a_missing_extra_is_said(tmp_path):
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['calibrate', '--dry-run']; from calibrate.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "Error: torch is not installed: pip install 'twotower-sim[calibrate]'\n"


def test_a_full_disk_keeps_what_is_there(config, tmp_path, monkeypatch):
    written = Journal._write

    def write(self, line):
        if len(self) > 20:
            self._file.close()
            self._file = open("/dev/full", "w")  # noqa: SIM115
        written(self, line)

    monkeypatch.setattr(Journal, "_write", write)
    with pytest.raises(
        InputError, match=r"p\.json\.journal: cannot be written: No space left on device; what is in it is kept"
    ):
        random_weights(config, tmp_path / "p.json")
    assert len((tmp_path / "p.json.journal").read_text().splitlines()) > 20
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--devices", "cuda:0"], "--devices cuda:0: this machine has no CUDA GPU"),
        (["--devices", "foo"], "--devices foo: expected cpu, cuda:0 or cuda:0,cuda:1"),
        (["--devices", "cpu,cpu,cpu"], "expected one device, or two"),
        (["--devices", "mps"], "mps is not supported"),
        (["--dtype", "int4"], "--dtype int4: expected bfloat16 or float32"),
        (["--batch", "1,x"], "--batch 1,x: expected numbers with commas between"),
        (["--batch", "0,1"], "--batch 0,1: found 0; expected numbers from 1"),
        (["--gamma", "1.5"], "--gamma 1.5: expected numbers between 0 and 1"),
        (["--weights", "zero"], "--weights zero: expected checkpoint or random"),
        (["--only", "x"], "--only x: expected latency or commits"),
        (["--only", "commits"], "random weights commit nothing that means anything"),
        (["--assume", "h100-sxm"], "--assume needs --dry-run"),
        (["--context", "0,300000"], "reach 300064 tokens; .* has 262144 positions"),
        (["--backend", "mamba_ssm"], "--backend mamba_ssm: mamba-ssm"),
        (["--backend", "vllm"], "--backend vllm: expected own or mamba_ssm"),
        (["--model", "no/such/folder"], "neither a folder nor the name of a repository"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_bad_input_is_explained(config, tmp_path, more, said):
    with pytest.raises(InputError, match=said):
        random_weights(config, tmp_path / "p.json", *more)
    assert [path.name for path in tmp_path.iterdir() if path.name != "config.json"] in ([], ["p.json.journal"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompts"),
        ('{"class": "a"}\n', "prompts.jsonl:1: prompt: field required"),
        ('{"prompt": "a"}\n{"prompt": ""}\n', "prompts.jsonl:2: prompt: string should have at least 1 character"),
        ('{"prompt": "a"}\nx\n', "prompts.jsonl:2: line: invalid json"),
    ],
)
def test_bad_prompts_are_explained(tmp_path, text, said):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(InputError, match=said):
        calibrate("--only", "commits", "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "p.json")


def test_a_truncated_checkpoint_ends_with_exit_code_2(tmp_path, monkeypatch, capsys):
    save(small_model(), CONFIG, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    monkeypatch.setattr(
        "sys.argv", ["calibrate", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "p.json"), *FEW]
    )
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "is the download complete?" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


# ---------------------------------------------------------------------- grids


def test_held_out_points_lie_between_and_refine_where_lines_bend():
    shapes = Shapes([1, 4, 16], [0, 100, 1000], [16, 256], [16])
    axes = {"decode": {"sequences": [1, 4, 16], "context": [0, 100, 1000]}}

    def seconds(point):
        return 0.01 + 0.001 * point.sequences + 1e-9 * point.context**2

    samples = {point: [seconds(point)] * 3 for point in points(axes)}
    grids = GridOf(axes, samples, shapes)
    held = grids.held_out()
    assert {p.values for p in held} == {(2, 0), (8, 100), (1, 10), (4, 316)}
    samples |= {point: [seconds(point)] * 3 for point in held}
    errors = held_out_errors(grids, samples)["decode"]
    assert errors.worst["sequences"][0] == pytest.approx(0, abs=1e-12)
    line = seconds(Point("decode", (4, 100))) + (316 - 100) / 900 * (
        seconds(Point("decode", (4, 1000))) - seconds(Point("decode", (4, 100)))
    )
    assert errors.worst["context"] == (pytest.approx(line / seconds(Point("decode", (4, 316))) - 1), 316)
    finer = refined(axes, {"decode": errors}, 0.005)
    assert finer == {"decode": {"sequences": [1, 4, 16], "context": [0, 100, 316, 1000]}}
    assert refined(axes, {"decode": errors}, 1.0) == axes


def test_the_bundled_prompts_are_of_the_classes_that_the_simulator_knows():
    prompts = read_prompts(BUNDLED)
    assert {prompt.class_ for prompt in prompts} == {"mixed", "math", "code"}
    assert sum(prompt.answer is not None for prompt in prompts) == 8
