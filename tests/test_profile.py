"""Profile files: what is refused and how it is said, and that what is written reads back as itself."""

import gzip
import json
from copy import deepcopy

import pytest
from profiles import measured_profile, write

from twotower_sim.errors import InputError
from twotower_sim.luck import OBSERVED
from twotower_sim.profile import Profile, load_profile, save_profile

RECORD = {"class": "math", "prompt": 0, "gamma": 0.8, "steps_per_block": 4, "blocks": [[4, 4, 4, 4], [16]]}
CLASS = {"mean": -3, "sd": 1, "blocks": 8, "points": [[0.8, 16]]}
COMMITS = {
    "gamma": 0.8, "committed": 0.7, "steps": 1.8, "steps_committed": -10.9, "block": 1.7, "block_sd": 1.2,
    "concentration": 1.05, "block_size": 16, "classes": {"a": CLASS},
}  # fmt: skip


def changed(*keys_and_value) -> dict:
    """The handmade profile with one value set."""
    profile = measured_profile()
    *keys, last, value = keys_and_value
    at = profile
    for key in keys:
        at = at[key]
    at[last] = value
    return profile


DENOISE = ("latency", "passes", "denoise")


@pytest.mark.parametrize("name", ["hand.json", "hand.json.gz"])
def test_what_is_written_reads_back(tmp_path, name):
    data = measured_profile() | {
        "commit_records": [RECORD],
        "quality": [{"class": "math", "gamma": 0.8, "steps_per_block": 4}],
    }
    data["latency"]["skipped"] = [{"pass": "denoise", "point": [16, 512, 0], "why": "out of memory"}]
    profile = Profile.model_validate(data)
    save_profile(profile, tmp_path / name)
    assert load_profile(name, tmp_path) == profile
    before = (tmp_path / name).read_bytes()
    save_profile(profile, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before
    assert (before[:2] == b"\x1f\x8b") == name.endswith("gz")


def test_the_shipped_profile_is_valid_without_what_is_optional():
    profile = load_profile(OBSERVED)
    assert profile.latency is profile.device is None
    assert profile.of("commits") == profile.provenance


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (changed("provenance", "kind", "guessed"), "provenance.kind: found 'guessed'"),
        (changed("provenance", "weights", "some"), "provenance.weights: found 'some'"),
        (changed("version", 2), "profile version 2; this program reads 1"),
        (changed("speed", 2), "speed: found 2; extra inputs are not permitted"),
        (changed(*DENOISE, "axes", "sequences", [4, 1]), "latency.passes.denoise: axes.sequences is [4, 1]; expected rising integers above 0"),
        (changed(*DENOISE, "axes", "sequences", [0, 1]), "axes.sequences is [0, 1]; expected rising integers above 0"),
        (changed(*DENOISE, "axes", "sequences", []), "axes.sequences is []"),
        (changed(*DENOISE, "axes", "context", [-1, 1]), "latency.passes.denoise.axes.context.0: found -1"),
        (changed(*DENOISE, "axes", {"sequences": [1], "context": list(range(20))}), "latency: denoise has the axes sequences, context; expected block_size, sequences, context"),
        (changed(*DENOISE, "median_s", [1.0]), "latency.passes.denoise: median_s has 1 entries; the axes have 20 points"),
        (changed(*DENOISE, "samples_s", [[1.0]]), "samples_s has 1 entries; the axes have 20 points"),
        (changed(*DENOISE, "median_s", [0.0] * 20), "latency.passes.denoise.median_s.0: found 0.0"),
        (changed(*DENOISE, "median_s", [float("nan")] * 20), "latency.passes.denoise.median_s.0: found nan"),
        (changed(*DENOISE, "median_s", [float("inf")] * 20), "latency.passes.denoise.median_s.0: found inf"),
        (changed(*DENOISE, "median_s", [None] + [1.0] * 19), "p20_s <= median_s <= p80_s does not hold"),
        (changed(*DENOISE, "p20_s", [9.0] * 20), "p20_s <= median_s <= p80_s does not hold"),
        (changed("latency", "passes", {"mock": {}}), "latency.passes.mock"),
        (changed("latency", "passes", "extend+prefill", "at_context", None), "latency: extend+prefill does not say at_context"),
        (changed("latency", "passes", "extend+prefill", "at_block_size", 8), "latency: extend+prefill.at_block_size is 8; extend was measured at 16"),
        (changed("provenance", "placement", "colocated"), "latency.transfer is measured between split towers"),
        (changed("device", "memory_mib", 0), "device.memory_mib: found 0"),
        (changed("device", "bf16_tflops", float("inf")), "device.bf16_tflops: found inf"),
        (changed("commit_records", [RECORD | {"blocks": [[16], [3, 3, 3, 3]]}]), "commits are of blocks of 12, 16 tokens"),
        (changed("commit_records", [RECORD | {"blocks": [[8, 0, 8]]}]), "commit_records.0.blocks.0.1: found 0"),
        (changed("commit_records", [RECORD | {"blocks": [[8, 2, 2, 2, 2]]}]), "commit_records.0: block 0 commits 2 of 8 masked tokens at step 1 of at most 4"),
        (changed("commit_records", [RECORD | {"blocks": [[4, 4, 4, 2, 2]]}]), "block 0 commits 2 of 4 masked tokens at step 3 of at most 4"),
        (changed("quality", [{"class": "a", "gamma": 2, "steps_per_block": 4}]), "quality.0.gamma: found 2"),
        (changed("commits", COMMITS | {"concentration": 1e-320}), "commits.concentration: found 1e-320"),
        (changed("commits", COMMITS | {"concentration": 1e308}), "commits.concentration: found 1e+308"),
        (changed("commits", COMMITS | {"committed": 1e5}), "commits.committed: found 100000.0"),
        (changed("commits", COMMITS | {"classes": {}}), "commits.classes: found {}"),
        (changed("commits", COMMITS | {"classes": {"a": CLASS | {"blocks": 10**9}}}), "commits.classes.a.blocks: found 1000000000"),
        ([], "top level: found []"),
        (None, "top level: found None"),
    ],
)  # fmt: skip
def test_what_is_refused_and_how_it_is_said(tmp_path, profile, said):
    path = write(profile, tmp_path / "bad.json")
    with pytest.raises(InputError) as error:
        load_profile(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff\xfe", b"\x1f\x8b", gzip.compress(b"{}")[:-6], gzip.compress(b"["), b"[" * 100_000]
)
def test_files_that_are_no_profile(tmp_path, raw):
    (tmp_path / "bad.json").write_bytes(raw)
    with pytest.raises(InputError, match="bad.json: not a profile"):
        load_profile("bad.json", tmp_path)


def test_the_latency_only_profile_of_a_hand_needs_little():
    bare = {"axes": {"block_size": [16], "sequences": [1], "context": [0]}, "median_s": [0.01]}
    profile = deepcopy(measured_profile())
    profile["latency"] = {"passes": {"denoise": bare}}
    grid = Profile.model_validate(profile).latency.passes["denoise"]
    assert grid.seconds("p20_s").tolist() == [[[0.01]]]
    assert json.loads(grid.model_dump_json(exclude_defaults=True)) == bare
