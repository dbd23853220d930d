"""Measured latency: exact at its points, linear and rising between them, one formula for numbers and arrays, and
nothing beyond what was measured unless asked."""

import json
import re
from itertools import product

import numpy as np
import pytest
from conftest import run_of, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check
from profiles import SEQUENCES, measured_profile, write

from twotower_sim.errors import InputError
from twotower_sim.latency import Host
from twotower_sim.measured import Hull, PassTime, autoregressive_measured, rising, two_tower_measured
from twotower_sim.preset import ROOT
from twotower_sim.profile import Grid, MeasuredLatency, Profile
from twotower_sim.result import summary
from twotower_sim.simulation import extrapolated_share, prepare, simulate

MOST = SEQUENCES[-1]
NO_HOST = Host()
PRESETS = ROOT / "profiles"


def measured(**changes) -> MeasuredLatency:
    return Profile.model_validate(measured_profile(**changes)).latency


def two_tower(of=None, extrapolate=False, split=False, host=NO_HOST, block_size=16, mixes=True, most=MOST):
    hull = Hull("hand.json", extrapolate)
    return two_tower_measured(of or measured(), hull, block_size, split, host, most, mixes)


def autoregressive(of=None, extrapolate=False, mixes=True):
    return autoregressive_measured(of or measured(), Hull("hand.json", extrapolate), NO_HOST, MOST, mixes)


def points(grid: Grid):
    """(point without its block size, seconds) of every measured point."""
    for at, seconds in zip(product(*grid.axes.values()), grid.median_s, strict=True):
        yield at[-2:] if "block_size" in grid.axes else at, seconds


def test_every_pass_is_exact_at_its_points():
    of = measured()
    latency, baseline = two_tower(of), autoregressive(of)
    for (n, context), seconds in points(of.passes["denoise"]):
        assert latency.decode(n, n * context, 0, 0) == (seconds, 0.0, seconds)
    for (n, context), seconds in points(of.passes["extend"]):
        assert latency.decode(0, 0, n, n * context) == (0.0, seconds, seconds)
    for (n, context), seconds in points(of.passes["decode"]):  # the round's context counts the new token too
        assert baseline.decode(n, n * (context + 1), 0, 0) == (0.0, seconds, seconds)
    for (n, tokens, context), seconds in points(of.passes["prefill"]):
        prompts = n * tokens, 0, n * (tokens + context), n
        assert latency.mixed(0, 0, 0, 0, *prompts) == (0.0, seconds, seconds)
        assert baseline.mixed(0, 0, 0, 0, *prompts) == (0.0, seconds, seconds)


def test_a_mix_is_met_at_its_points():
    of = measured()
    latency, baseline = two_tower(of), autoregressive(of)
    for (n, tokens), seconds in points(of.passes["extend+prefill"]):
        assert latency.mixed(0, 0, n, 0, tokens, 0, tokens, 1)[1] == pytest.approx(seconds, rel=1e-12)
    for (n, tokens), seconds in points(of.passes["decode+prefill"]):
        assert baseline.mixed(n, n, 0, 0, tokens, 0, tokens, 1)[1] == pytest.approx(seconds, rel=1e-12)


def test_a_mix_takes_no_less_than_its_longer_part():
    profile = measured_profile()
    profile["latency"]["passes"]["extend+prefill"] |= {"median_s": [1e-6] * 20, "p20_s": [], "p80_s": []}
    latency = two_tower(Profile.model_validate(profile).latency)
    alone = latency.decode(0, 0, 4, 0)[1], latency.mixed(0, 0, 0, 0, 64, 0, 64, 1)[1]
    assert latency.mixed(0, 0, 4, 0, 64, 0, 64, 1)[1] == max(alone)


def test_between_points_it_is_linear():
    latency, of = two_tower(), measured().passes["denoise"].seconds()[0]
    assert latency.decode(10, 10 * 128, 0, 0)[0] == pytest.approx(of[1:3, :2].mean(), rel=1e-12)
    low = [two_tower().mixed(0, 0, 0, 0, t, 0, t, 1)[1] for t in (64, 544, 1024)]
    assert low[1] == pytest.approx((low[0] + low[2]) / 2, rel=1e-12)


def test_a_round_apart_ends_when_both_towers_have_finished_and_sent():
    of = measured()
    latency, together = two_tower(of, split=True, host=Host(1e-3)), two_tower(of, host=Host(1e-3))
    for shape in ((64, 64 * 256, 1, 256), (1, 256, 64, 64 * 256)):
        denoiser_s, context_s, round_s = latency.decode(*shape)
        sent_s = 1e-3 * (0.1 + 0.02 * shape[2] + 1e-4 * 16 * shape[2])
        assert round_s == pytest.approx(1e-3 + max(denoiser_s, context_s + sent_s), rel=1e-3)
        assert together.decode(*shape) == (denoiser_s, context_s, 1e-3 + (denoiser_s + context_s))
    assert latency.side_by_side
    assert not together.side_by_side
    prompts = 1000, 0, 1000, 2
    _, context_s, round_s = latency.mixed(0, 0, 0, 0, *prompts)
    assert round_s == pytest.approx(1e-3 + context_s + 1e-3 * (0.1 + 0.04 + 0.1), rel=1e-3)


# ---------------------------------------------------------------------- random grids

TIMES = st.one_of(st.none(), st.floats(1e-4, 1.0))


@st.composite
def grids(draw, gaps=True):
    axes = [sorted(draw(st.sets(st.integers(least, 60), min_size=1, max_size=4))) for least in (1, 0)]
    size = len(axes[0]) * len(axes[1])
    times = draw(st.lists(TIMES if gaps else st.floats(1e-4, 1.0), min_size=size, max_size=size))
    if all(t is None for t in times):
        times[0] = 0.5
    return Grid(axes={"sequences": axes[0], "context": axes[1]}, median_s=times)


@settings(max_examples=300, deadline=None)
@given(grids(), st.lists(st.tuples(st.integers(0, 70), st.integers(0, 5000)), min_size=1, max_size=20))
def test_numbers_and_arrays_give_the_same_floats(grid, asked):
    n = np.array([n for n, _ in asked])
    total = np.array([total * (n > 0) for n, total in asked])
    one, many = PassTime("decode", grid, Hull("x"), 1).of_sums(70)
    for count, tokens, seconds in zip(n.tolist(), total.tolist(), many(n, total).tolist(), strict=True):
        if np.isnan(seconds):
            with pytest.raises(InputError, match="was not measured at"):
                one(count, tokens)
        else:
            assert one(count, tokens) == seconds


@settings(max_examples=300, deadline=None)
@given(grids(), st.integers(1, 70), st.floats(0, 70))
def test_what_is_tabulated_is_what_is_interpolated(grid, n, context):
    time = PassTime("decode", grid, Hull("x"), 1)
    _, many = time.of_sums(70)
    total = int(n * context)
    np.testing.assert_allclose(many(n, total), time.measured(n, total / n), rtol=1e-9)


@settings(max_examples=300, deadline=None)
@given(grids(), st.tuples(st.integers(1, 90), st.integers(1, 90)), st.tuples(st.floats(0, 90), st.floats(0, 90)))
def test_it_never_falls_along_an_axis_even_over_gaps_nor_below_the_edge_beyond(grid, n, context):
    time, axes = PassTime("decode", grid, Hull("x", extrapolate=True), 1), grid.axes.values()
    low, high = (
        [min(max(x, known[0]), known[-1]) for x, known in zip(point, axes, strict=True)]
        for point in ((min(n), min(context)), (max(n), max(context)))
    )
    assert 0 < time(*low) <= time(*high) * (1 + 1e-9) <= time(max(n), max(context)) * (1 + 2e-9)


@settings(max_examples=200, deadline=None)
@given(grids(gaps=False))
def test_beyond_the_last_point_the_slope_goes_on_and_before_the_first_nothing_falls(grid):
    hull = Hull("x", extrapolate=True)
    time, known, seconds = PassTime("decode", grid, hull, 1), list(grid.axes.values()), rising(grid.seconds())
    n, context = known[0][-1], known[1][-1]
    slope = 0.0 if len(known[1]) == 1 else (seconds[-1, -1] - seconds[-1, -2]) / (context - known[1][-2])
    assert time(n, context + 100) == pytest.approx(seconds[-1, -1] + 100 * slope)
    assert time(known[0][0] / 2, known[1][0]) == seconds[0, 0]
    assert hull.left["decode"] == 2


# ---------------------------------------------------------------------- outside


def test_outside_is_an_error_that_says_what_was_asked_and_what_there_is():
    with pytest.raises(InputError) as error:
        two_tower().decode(3, 3 * 40_000, 0, 0)
    assert str(error.value) == (
        "latency.path hand.json: denoise was not measured at sequences 3, context 40000; it was at sequences 1 to 256, "
        "context 0 to 32768; set latency.extrapolate to go beyond"
    )
    with pytest.raises(InputError, match="prefill was not measured at sequences 1, tokens 20000, context 0"):
        two_tower().mixed(0, 0, 0, 0, 20_000, 0, 20_000, 1)
    with pytest.raises(InputError, match=r"extend\+prefill was not measured at sequences 1, tokens 32000"):
        two_tower().mixed(0, 0, 1, 0, 32_000, 0, 32_000, 2)


def test_a_point_without_a_time_is_outside_and_so_is_all_beside_it():
    profile = measured_profile()
    denoise = profile["latency"]["passes"]["denoise"]
    for column in ("median_s", "p20_s", "p80_s"):
        denoise[column][-1] = None  # 256 sequences at 32768: out of memory
    latency = two_tower(Profile.model_validate(profile).latency)
    assert latency.decode(256, 256 * 4096, 0, 0)[0] == denoise["median_s"][-2]
    assert latency.decode(64, 64 * 32768, 0, 0)[0] == denoise["median_s"][-5]
    for n, context in ((256, 4097), (65, 32768), (65, 4097)):
        with pytest.raises(InputError, match="but not at all points around this"):
            latency.decode(n, n * context, 0, 0)


def test_a_missing_transfer_is_not_hidden_by_a_longer_denoise_pass():
    profile = measured_profile()
    profile["latency"]["transfer"] |= {
        "axes": {"sequences": [1], "tokens": [16]},
        "median_s": [1e-4],
        "p20_s": [],
        "p80_s": [],
    }
    latency = two_tower(Profile.model_validate(profile).latency, split=True)
    assert np.isnan(latency.decode_many(np.array([200]), np.array([0]), np.array([2]), np.array([0]))[2]).all()
    with pytest.raises(InputError, match="transfer was not measured at sequences 2, tokens 16"):
        latency.decode(200, 0, 2, 0)


def test_told_to_extrapolate_it_counts_the_rounds_by_pass():
    latency = two_tower(extrapolate=True)
    edge = latency.decode(1, 32768, 0, 0)[0]
    assert not latency.extrapolated
    assert latency.decode(1, 65536, 2, 2 * 65536)[0] > edge
    latency.mixed(1, 100, 1, 100, 32_000, 0, 32_000, 2)
    assert latency.extrapolated == {"denoise": 1, "extend": 1, "extend+prefill": 1}
    latency.decode_many(np.array([1]), np.array([65536]), np.array([0]), np.array([0]))
    assert latency.extrapolated["denoise"] == 1  # looked at, not run


def test_without_a_mix_prompts_and_extends_come_one_after_the_other_if_told():
    profile = measured_profile()
    del profile["latency"]["passes"]["extend+prefill"]
    of = Profile.model_validate(profile).latency
    with pytest.raises(InputError, match=r"holds no extend\+prefill for decoding.block_size 16; set"):
        two_tower(of)
    two_tower(of, mixes=False)
    latency = two_tower(of, extrapolate=True)
    alone = latency.decode(0, 0, 4, 0)[1], latency.mixed(0, 0, 0, 0, 64, 0, 64, 1)[1]
    assert latency.mixed(0, 0, 4, 0, 64, 0, 64, 1)[1] == sum(alone)
    assert latency.extrapolated == {"extend+prefill": 1}


def test_what_must_fail_fails_before_the_run():
    with pytest.raises(InputError, match="decoding.block_size: found 8; hand.json: denoise was measured at 16"):
        two_tower(block_size=8)
    profile = measured_profile(split=False)
    with pytest.raises(InputError, match="holds no transfer, which this scenario needs"):
        two_tower(Profile.model_validate(profile).latency, split=True)
    del profile["latency"]["passes"]["decode"]
    with pytest.raises(InputError, match="holds no decode, which this scenario needs; it has denoise, extend, prefill"):
        autoregressive(Profile.model_validate(profile).latency)


def test_a_mix_of_another_block_size_is_no_measurement_of_this_one():
    profile = measured_profile()
    passes = profile["latency"]["passes"]
    for name in ("denoise", "extend"):
        passes[name]["axes"]["block_size"] = [16, 32]
        for column in ("median_s", "p20_s", "p80_s"):
            passes[name][column] += [2 * seconds for seconds in passes[name][column]]
    with pytest.raises(ValueError, match=r"at_block_size is None; extend was measured at 16, 32"):
        Profile.model_validate(profile)
    passes["extend+prefill"]["at_block_size"] = 32
    of = Profile.model_validate(profile).latency
    with pytest.raises(InputError, match=r"extend\+prefill for decoding.block_size 16"):
        two_tower(of)
    assert two_tower(of, block_size=32).decode(1, 0, 0, 0)[0] == 2 * two_tower().decode(1, 0, 0, 0)[0]


# ---------------------------------------------------------------------- whole runs

BUSY = synthetic(requests=60, rate_rps=50)


def run_with(tmp_path, profile=None, **sections):
    path = write(profile or measured_profile(), tmp_path / "hand.json")
    latency = {"kind": "profile", "path": path} | sections.pop("latency", {})
    return run_of(tmp_path, **({"workload": BUSY, "latency": latency} | sections))


def test_a_run_names_its_profile_and_takes_its_device(tmp_path):
    run, results = run_with(tmp_path)
    check(run, results)
    figures = summary(run, results)
    assert figures["provenance"]["latency"] == "measured: made by hand (2 x Handmade 96 GB)"
    assert figures["provenance"]["gpu"] == "Handmade 96 GB: measured: made by hand (2 x Handmade 96 GB)"
    assert figures["scenario"]["deployment"]["gpu"] == "Handmade 96 GB"
    assert figures["memory"]["gpus"]["context"]["capacity_bytes"] == int((98304 << 20) * 0.9)
    assert figures["cost"]["usd"] is figures["cost"]["energy_kwh"] is None
    assert figures["utilisation"]["extrapolated_share"] == {}
    assert not [warning for warning in figures["warnings"] if "latency" in warning]
    again, _ = run_with(tmp_path, deployment={"gpu": "Handmade 96 GB"})
    assert again.gpu == run.gpu
    assert json.dumps(figures["scenario"])


@pytest.mark.parametrize("kind", ["two_tower", "autoregressive"])
@pytest.mark.parametrize("placement", ["colocated", "split"])
@pytest.mark.parametrize("prefill", ["mixed", "first"])
def test_runs_of_every_kind_keep_the_invariants(tmp_path, kind, placement, prefill):
    profile = measured_profile()
    profile["device"]["memory_mib"] *= 2  # for both towers
    sections = {"decoding": {"kind": kind}, "deployment": {"placement": {"kind": placement}}}
    check(*run_with(tmp_path, profile, scheduler={"prefill": prefill}, **sections))


def test_another_gpu_lends_memory_and_price_with_a_warning(tmp_path):
    run, results = run_with(tmp_path, deployment={"gpu": "h200"})
    assert results.cost["usd"] > 0
    assert "latency was measured on Handmade 96 GB; memory and price are those of h200" in run.warnings
    profile = measured_profile()
    del profile["device"]
    run, _ = run_with(tmp_path, profile)
    assert run.gpu.name == "h100-sxm"
    assert "latency was measured on 2 x Handmade 96 GB; memory and price are those of h100-sxm" in run.warnings


def test_extrapolated_rounds_stand_in_the_summary(tmp_path):
    narrow = measured_profile(most=4)
    for router in ("round_robin", "least_outstanding_requests"):  # replicas that catch up, and that step along
        with pytest.raises(InputError, match=r"was not measured at sequences [\d]+, context"):
            run_with(tmp_path, narrow, router={"kind": router})
    run, results = run_with(tmp_path, narrow, latency={"extrapolate": True})
    shares = results.utilisation["extrapolated_share"]
    assert shares["denoise"] == pytest.approx(run.latency.extrapolated["denoise"] / results.counts["rounds"])
    assert 0.1 < shares["denoise"] < 0.9
    assert extrapolated_share(simulate(run)) == shares  # not counted twice
    said = next(warning for warning in run.warnings if "extrapolated beyond" in warning)
    assert re.search(r"denoise in \d+\.\d\d% of rounds, extend in", said)


@pytest.mark.parametrize(
    ("changes", "sections", "said"),
    [
        ({"split": False}, {}, "deployment.placement.kind: found split; {path} was measured colocated"),
        ({}, {"deployment": {"tensor_parallel": 2}}, "deployment.tensor_parallel: found 2; {path} was measured with 1"),
        ({"block_size": 8}, {}, "decoding.block_size: found 16; {path}: denoise was measured at 8"),
    ],
)
def test_a_profile_that_does_not_fit_the_scenario(tmp_path, changes, sections, said):
    with pytest.raises(InputError) as error:
        run_with(tmp_path, measured_profile(**changes), **sections)
    assert str(error.value) == said.format(path=tmp_path / "hand.json")


def test_a_profile_without_latency_is_refused(tmp_path):
    with pytest.raises(InputError, match="latency.path observed-h100: the profile holds no latency"):
        run_with(tmp_path, latency={"path": "observed-h100"})


def test_commits_may_be_those_of_the_latency_s_profile(tmp_path):
    profile = measured_profile()
    profile["provenance"]["weights"] = "random"
    with pytest.raises(InputError, match="hand.json: the profile holds no commits"):
        run_with(tmp_path, profile, commits={"kind": "profile"})
    profile["commits"] = json.loads((PRESETS / "observed-h100.json").read_text())["commits"]
    run, _ = run_with(tmp_path, profile, commits={"kind": "profile", "class": "math"})
    assert run.provenance["commits"] == run.provenance["latency"]
    path = tmp_path / "hand.json"
    said = "with random weights, so its routing and commits are no checkpoint's"
    assert [warning for warning in run.warnings if "random" in warning] == [
        f"latency of {path}: {said}", f"commits of {path}: {said}",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="commits.path: is missing; only with latency.kind profile"):
        run_of(tmp_path, workload=BUSY, commits={"kind": "profile"})


def test_a_profile_of_another_model_is_noticed_by_its_bytes(tmp_path):
    profile, run = measured_profile(), run_with(tmp_path)[0]
    bytes_ = {"bytes_per_sequence": run.tower.state_bytes, "bytes_per_token": run.tower.kv_bytes_per_token}
    profile["latency"]["memory"] = bytes_ | {"weights_bytes": 2 * run.tower.weight_bytes()}
    assert not [w for w in run_with(tmp_path, profile)[0].warnings if "weights_bytes" in w]
    profile["latency"]["memory"]["weights_bytes"] = 5_000_000
    (said,) = (w for w in run_with(tmp_path, profile)[0].warnings if "weights_bytes" in w)
    assert "not on nemotron-twotower-30b-a3b in bfloat16: weights_bytes 5,000,000, not 126," in said


# ---------------------------------------------------------------------- inside an engine

ENGINE = {
    "ratios": {"denoise": [1.1, 1.2, 1.3, 1.4, 1.5], "extend+prefill": [2.0] * 5},
    "host_s": 1e-4,
    "wake_s": 2e-3,
    "probe_s": 6e-3,
    "rounds": 100,
}


def inside(**changes) -> dict:
    profile = measured_profile(split=False)
    profile["latency"]["engine"] = ENGINE | changes
    return profile


def test_passes_take_what_they_take_inside_an_engine():
    of, alone = Profile.model_validate(inside()).latency, two_tower()
    latency = two_tower(of)
    for ratio, n in zip(ENGINE["ratios"]["denoise"], SEQUENCES, strict=True):
        assert latency.decode(n, 256 * n, 0, 0)[0] == pytest.approx(ratio * alone.decode(n, 256 * n, 0, 0)[0])
    assert latency.decode(0, 0, 4, 1024) == alone.decode(0, 0, 4, 1024)
    mix = 0, 0, 16, 0, 64, 0, 64, 1
    assert latency.mixed(*mix)[1] == pytest.approx(2 * alone.mixed(*mix)[1])


@given(st.integers(1, MOST), st.integers(0, 32768))
def test_numbers_and_arrays_agree_inside_an_engine(n, context):
    latency = two_tower(Profile.model_validate(inside()).latency)
    many = latency.decode_many(np.array([n]), np.array([n * context]), 0, 0)
    assert [float(np.ravel(of)[0]) for of in many] == list(latency.decode(n, n * context, 0, 0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratios": {"denoise": [1.0]}}, "engine.ratios.denoise has 1 entries; its grid has 5 sequences"),
        ({"ratios": {"verify": [1.0]}}, "engine.ratios.verify has 1 entries; its grid has 0 sequences"),
        ({"wake_s": -1}, "greater than or equal to 0"),
    ],
)
def test_engine_figures_that_cannot_be(changes, said):
    with pytest.raises(ValueError, match=said):
        Profile.model_validate(inside(**changes))


def test_a_slower_machine_is_slower_everywhere():
    fast, slow = two_tower(split=True), two_tower(split=True).slowed(1.5)
    for shape in ((4, 1024, 0, 0), (4, 1024, 2, 512)):
        assert slow.decode(*shape) == pytest.approx([1.5 * s for s in fast.decode(*shape)])
        assert slow.mixed(*shape, 64, 0, 64, 1) == pytest.approx([1.5 * s for s in fast.mixed(*shape, 64, 0, 64, 1)])
    assert slow.transfer(2, 32) == 1.5 * fast.transfer(2, 32)


def test_an_idle_engine_wakes_and_every_round_has_its_host_time(tmp_path):
    """The first token of a lone request is later by the wake and by the host time of its rounds, in both engines."""
    sections = {
        "workload": synthetic(1, rate_rps=1.0, output_tokens=12),
        "deployment": {"gpu": "h200", "placement": {"kind": "colocated"}},
        "scheduler": {"max_num_seqs": 4},
        "commits": {"kind": "constant", "tokens_per_step": 16},
    }
    first_ns = []
    for profile in (measured_profile(split=False), inside(ratios={})):
        latency = {"kind": "profile", "path": write(profile, tmp_path / "p.json")}
        fast, results = run_of(tmp_path, **sections, latency=latency)
        slow = prepare(fast.scenario, tmp_path)
        slow.may_be_fast = False
        assert simulate(slow).records.finish_ns == fast.records.finish_ns
        first_ns.append(results.columns.first_ns[0] - results.columns.arrival_ns[0])
    assert first_ns[1] - first_ns[0] == 2_000_000 + 2 * 100_000
