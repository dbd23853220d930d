"""``twotower-sim profile`` and ``calibrate``: what they print, write, draw and refuse."""

import csv
import json
import os
import sys

import pytest
from conftest import ROOT
from profiles import grid, measured_profile, write
from test_cli import call

from twotower_sim.errors import InputError
from twotower_sim.luck import OBSERVED
from twotower_sim.profile import load_profile
from twotower_sim.profile_merge import merge_profiles
from twotower_sim.profile_report import check_profile, compare_profiles, tokens_per_step

RECORD = {"class": "math", "prompt": 0, "gamma": 0.8, "steps_per_block": 16, "blocks": [[4, 4, 4, 4], [8, 8]]}
QUALITY = {"class": "math", "gamma": 0.8, "steps_per_block": 16, "score": 0.75, "bits_per_byte": 1.25}


@pytest.fixture
def hand(tmp_path):
    """Writes the handmade profile with changes and gives its path."""

    def make(name="hand.json", **changes):
        sections = {key: changes.pop(key) for key in ("commit_records", "quality", "commits") if key in changes}
        return write(measured_profile(**changes) | sections, tmp_path / name)

    return make


def test_show(hand):
    done = call("profile", "show", hand(commit_records=[RECORD], quality=[QUALITY]))
    assert done.returncode == 0, done.stderr
    assert "measured: made by hand (2 x Handmade 96 GB)" in done.stdout
    assert "2 x Handmade 96 GB: 98,304 MiB, 3,000 GB/s, 700.00 TFLOP/s" in done.stdout
    assert "extend+prefill" in done.stdout
    (row,) = (line.split() for line in done.stdout.splitlines() if line.strip().startswith("math"))
    assert row == ["math", "0.8", "16", "5.333", "records", "0.750", "1.250"]


def test_show_a_shipped_profile():
    done = call("profile", "show", OBSERVED)
    assert done.returncode == 0, done.stderr
    assert "fitted law" in done.stdout


def test_tokens_per_step_of_the_law_are_those_that_were_measured(data):
    """Against the public records that it was fitted to."""
    with (data / "observed" / "h100_nfe.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["set"] == "math" and row["mode"] == "diff"]
    rows = [row for row in rows if (float(row["gamma"]), int(row["steps_per_block"])) == (0.8, 16)]
    measured = sum(int(row["new_tokens"]) for row in rows) / sum(int(row["nfe"]) for row in rows)
    assert tokens_per_step(load_profile(OBSERVED))["math", 0.8, 16] == pytest.approx(measured, rel=0.05)


def test_check_says_what_limits_a_profile(hand, tmp_path, capsys):
    check_profile(hand())
    fine = capsys.readouterr().out
    assert "fine" in fine
    assert "warning" not in fine
    profile = measured_profile()
    profile["provenance"] |= {"weights": "random", "environment": {"dirty": True}}
    latency = profile["latency"]
    denoise, mix = latency["passes"]["denoise"], latency["passes"]["extend+prefill"]
    denoise |= {"p20_s": [], "p80_s": []}
    denoise["median_s"][1] = denoise["median_s"][0] / 1.25
    mix |= {"median_s": [1e-4] * 20, "p20_s": [], "p80_s": []}
    latency["held_out"] = {"denoise": {"points": 5, "median_error": 0.2, "worst_error": 0.3}}
    latency["drift"] = {"first_s": 0.01, "again_s": 0.012, "spread": 0.02, "moved": True}
    latency["skipped"] = [{"pass": "extend", "point": [16, 512, 0], "why": "out of memory"}]
    check_profile(write(profile, tmp_path / "doubtful.json"))
    said = capsys.readouterr().out
    for doubt in (
        "warning: measured with uncommitted changes in the code",
        "warning: measured with random weights",
        "warning: denoise: 1 medians fall along an axis; they are raised by up to 25.0%",
        "warning: extend+prefill: 20 points took no longer than their longer part alone",
        "warning: denoise: interpolation is off by 20.0% at half of the points held out",
        "warning: the device drifted while measuring: +20.0% at a point whose samples spread 2.0%",
        "warning: extend at 16, 512, 0 was skipped: out of memory",
    ):
        assert doubt in said


def test_check_of_no_profile_exits_with_2(tmp_path):
    done = call("profile", "check", write({}, tmp_path / "bad.json"))
    assert done.returncode == 2
    assert "bad.json: provenance: " in done.stderr


def test_compare(hand, capsys):
    compare_profiles(hand(commit_records=[RECORD]), hand("slow.json", factor=2.0, most=64, commit_records=[RECORD]))
    said = capsys.readouterr().out
    (row,) = (line.split() for line in said.splitlines() if line.strip().startswith("denoise"))
    assert row == ["denoise", "16", "2.000", "2.000", "2.000"]
    assert "5.333 5.333" in " ".join(said.split())


# ---------------------------------------------------------------------- merge


def test_merge_takes_latency_from_one_and_commits_from_another(hand, tmp_path):
    out = tmp_path / "all.json.gz"
    assert call("profile", "merge", str(out), OBSERVED, hand()).returncode == 0
    merged, observed, mine = load_profile(str(out)), load_profile(OBSERVED), load_profile(hand())
    assert (merged.latency, merged.device, merged.provenance) == (mine.latency, mine.device, mine.provenance)
    assert (merged.commits, merged.routing) == (observed.commits, observed.routing)
    assert merged.of("commits") == observed.provenance
    assert merged.of("latency") == mine.provenance


def test_merge_joins_grids_that_complement_each_other(hand, tmp_path):
    whole, low = measured_profile(), measured_profile(most=16)
    high = measured_profile()
    points = {
        "block_size": [16],
        "sequences": [64, 256],
        "context": [0, 256, 4096, 32768],
        "tokens": [1, 64, 1024, 16384],
    }
    high["latency"]["passes"] = {name: grid(name, points) for name in whole["latency"]["passes"]}
    high["latency"]["transfer"] = grid("transfer", points)
    names = [write(low, tmp_path / "low.json"), write(high, tmp_path / "high.json")]
    merge_profiles(tmp_path / "out.json", names)
    assert load_profile("out.json", tmp_path).latency == load_profile(write(whole, tmp_path / "whole.json")).latency


def test_points_that_neither_measured_stay_unmeasured(hand, tmp_path):
    parts = []
    for index, (n, context) in enumerate((([1, 2], [0, 10]), ([4], [20]))):
        profile = measured_profile(split=False)
        points = {"block_size": [16], "sequences": n, "context": context, "tokens": [1]}
        profile["latency"]["passes"] = {"denoise": grid("denoise", points)}
        parts.append(write(profile, tmp_path / f"{index}.json"))
    merge_profiles(tmp_path / "out.json", parts)
    times = load_profile("out.json", tmp_path).latency.passes["denoise"].median_s
    assert [seconds is None for seconds in times] == [False, False, True] * 2 + [True, True, False]


def test_merge_joins_records_and_says_where_they_are_from(hand, tmp_path):
    names = [hand(commit_records=[RECORD]), hand("b.json", commit_records=[RECORD, RECORD | {"prompt": 1}])]
    merge_profiles(tmp_path / "out.json", names)
    merged = load_profile("out.json", tmp_path)
    assert [record.prompt for record in merged.commit_records] == [0, 1]
    assert merged.of("commit_records").notes[-1].startswith("commit_records also from measured: made by hand")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factor": 2.0}, "latency: denoise differs at 16, 1, 0: 0.0062"),
        ({"device": "Other"}, "device differs: Handmade 96 GB and Other"),
        ({"provenance": "Other"}, "latency is of another device: Other, not 2 x Handmade 96 GB"),
        ({"commit_records": [RECORD | {"blocks": [[16]]}]}, "commit_records differs for math, 0, 0.8, 16"),
        ({"commit_records": [RECORD | {"prompt": 2, "blocks": [[8, 4, 4, 1]]}]}, "commits are of blocks of 16, 17 tokens"),
    ],
)  # fmt: skip
def test_what_contradicts_is_not_merged(hand, tmp_path, changes, said):
    profile = measured_profile(factor=changes.get("factor", 1.0))
    profile["commit_records"] = changes.get("commit_records", [])
    profile["device"]["name"] = changes.get("device", "Handmade 96 GB")
    if "provenance" in changes:
        profile = measured_profile(most=4)
        profile["provenance"]["device"] = changes["provenance"]
    second = write(profile, tmp_path / "second.json")
    with pytest.raises(InputError) as error:
        merge_profiles(tmp_path / "out.json", [hand(commit_records=[RECORD]), second])
    assert str(error.value).startswith(f"{second}: cannot be merged: ")
    assert said in str(error.value)
    assert not (tmp_path / "out.json").exists()


# ---------------------------------------------------------------------- plot


@pytest.mark.parametrize("suffix", ["html", "png", "svg"])
def test_plot(hand, tmp_path, suffix):
    out = tmp_path / f"picture.{suffix}"
    done = call("profile", "show", hand(commit_records=[RECORD]), "--plot", str(out))
    assert done.returncode == 0, done.stderr
    raw = out.read_bytes()
    if suffix == "png":
        assert raw.startswith(b"\x89PNG")
        return
    text = raw.decode()
    assert "extend+prefill" in text
    assert "tokens per step" in text
    assert "<script src=" not in text  # offline


def test_plot_refuses_other_files_and_says_what_it_needs(hand, tmp_path, monkeypatch):
    done = call("profile", "show", hand(), "--plot", str(tmp_path / "picture.pdf"))
    assert done.returncode == 2
    assert "found suffix '.pdf'; allowed: .html, .png, .svg" in done.stderr
    from twotower_sim.profile_plot import plot_profile

    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(InputError, match=r"--plot needs altair: pip install 'twotower-sim\[plot\]'"):
        plot_profile(hand(), tmp_path / "picture.png")


# ---------------------------------------------------------------------- calibrate


def test_calibrate_passes_everything_on(tmp_path):
    """With a package of that name in the way, so that it is seen what arrives."""
    package = tmp_path / "calibrate"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import json, sys; print(json.dumps(sys.argv[1:])); sys.exit(7)")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for arguments in (["--help"], ["real", "--out", "x.json", "-k", "--set", "a=b"], []):
        done = call("calibrate", *arguments, cwd=tmp_path, env=environment)
        assert done.returncode == 7, done.stderr
        assert json.loads(done.stdout) == arguments


def test_merging_keeps_what_passes_take_inside_an_engine(tmp_path):
    """Each batch has the ratio of the profile that measured it; what is beside the passes is weighted by rounds."""
    small, large = measured_profile(most=4), measured_profile()
    for name in ("denoise", "extend", "decode"):
        of = large["latency"]["passes"][name]
        kept = [i for i, n in enumerate(of["axes"]["sequences"]) if n > 4]
        contexts = len(of["axes"]["context"])
        of["axes"]["sequences"] = [16, 64, 256]
        for column in ("median_s", "p20_s", "p80_s"):
            of[column] = [of[column][i * contexts + j] for i in kept for j in range(contexts)]
    small["latency"]["engine"] = {
        "ratios": {"denoise": [1.1, 1.2]},
        "host_s": 1e-4,
        "wake_s": 0,
        "probe_s": 1,
        "rounds": 100,
    }
    large["latency"]["engine"] = {
        "ratios": {"denoise": [1.3, 1.4, 1.5]},
        "host_s": 3e-4,
        "wake_s": 4e-3,
        "probe_s": 2,
        "rounds": 300,
    }
    out = tmp_path / "merged.json"
    merge_profiles(out, [write(small, tmp_path / "a.json"), write(large, tmp_path / "b.json")])
    latency = load_profile(str(out)).latency
    assert latency.passes["denoise"].axes["sequences"] == [1, 4, 16, 64, 256]
    assert latency.engine.ratios == {"denoise": [1.1, 1.2, 1.3, 1.4, 1.5]}
    assert (latency.engine.host_s, latency.engine.wake_s) == (pytest.approx(2.5e-4), pytest.approx(3e-3))
    assert (latency.engine.probe_s, latency.engine.rounds) == (pytest.approx(1.75), 400)
