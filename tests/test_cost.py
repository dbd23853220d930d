"""Cost and energy: what GPUs did with their hours, by examples small enough for paper; prices and power, given or not."""

import re

import pytest
import yaml
from conftest import ROOT, run_of, synthetic
from test_plan import found
from test_timelines import A_THEN_B, COSTS, SENT, replay, tandem

from twotower_sim.cost import GpuTime, cost_of
from twotower_sim.errors import InputError
from twotower_sim.gpu import load_gpu
from twotower_sim.preset import preset_path

COLOCATED = {"gpu": "b200", "placement": {"kind": "colocated"}}
SIDE_BY_SIDE = COSTS | {"compose": "max"}
AR, MOCK = {"kind": "autoregressive"}, {"kind": "mock_ar"}
TWO_DRAFTS = {"kind": "speculative", "draft_tokens": 2, "acceptance": 1.0}
DRAFTS = COSTS | {"draft": {"base_ms": 1}}
SLOW_HOST = {"host_overhead_ms": 1}

EXAMPLES: dict[str, tuple[list, dict, tuple[float, float, float]]] = {
    # rows, sections, (computing, waiting, idle) in GPU milliseconds; for most timelines see test_timelines.py
    "colocated: one pass after the other": (A_THEN_B, {"deployment": COLOCATED}, (42, 0, 0)),
    "colocated, at once": (A_THEN_B, {"deployment": COLOCATED, "latency": SIDE_BY_SIDE}, (36, 0, 0)),
    # 0 prefill 11 | A 1 16 | A 2, prefill B 27 | A extend, B 1 32 | A 1, B 2 37 | A 2 42
    "colocated, at once, on a slow host": (
        A_THEN_B, {"deployment": COLOCATED, "latency": SIDE_BY_SIDE, "scheduler": SLOW_HOST}, (36, 6, 0),
    ),
    # of rounds that last at least 5 ms: prefill 10, A 1 4, A 2 4
    "colocated, behind hidden host work": (
        [(0, 5, 16)], {"deployment": COLOCATED, "scheduler": {"host_overhead_ms": 5, "overlap": "hidden"}}, (18, 2, 0),
    ),
    # denoiser 5 passes of 4, context 10 + 10 + 2, of 36
    "split: side by side": (A_THEN_B, {"latency": SIDE_BY_SIDE}, (20 + 22, 16 + 14, 0)),
    "split: two denoiser GPUs": (
        A_THEN_B, {"latency": SIDE_BY_SIDE, "deployment": {"tensor_parallel": {"context": 1, "denoiser": 2}}},
        (2 * 20 + 22, 2 * 16 + 14, 0),
    ),
    "split: in turn": (A_THEN_B, {}, (42, 42, 0)),
    # A is done at 28: prefill 10, 4 passes of 4, extend 2; B takes 10 and two passes of 4 from 100 on
    "split: nothing to do for a while": ([(0, 5, 32), (100, 5, 16)], {}, (28 + 18, 28 + 18, 2 * 72)),
    # extends of 2 wait for a transfer of 3
    "split: transfers": ([(0, 5, 16)], {"latency": SENT}, (18, 18 + 2 * 3, 0)),
    # context 10 + 10 + 2, denoiser 5 passes of 4, of 37
    "split, asynchronous": (
        A_THEN_B, {"latency": SENT, "deployment": {"placement": {"kind": "split", "mode": "asynchronous"}}}, (42, 32, 0),
    ),
    # context as before; one denoiser 4 passes, the other 2, of 36
    "pools": (A_THEN_B, {"latency": SENT, "deployment": tandem(denoiser=2)}, (22 + 16 + 8, 14 + 20 + 28, 0)),
    # 6 passes of a denoiser, of 42
    "pools whose transfers block": (A_THEN_B, {"latency": SENT, "deployment": tandem("blocking")}, (22 + 24, 20 + 18, 0)),
    # A is done at 34, two transfers of 3 included; B takes 21 from 100 on
    "pools: nothing to do for a while": (
        [(0, 5, 32), (100, 5, 16)], {"latency": SENT, "deployment": tandem()}, (28 + 18, 2 * (34 + 21) - 28 - 18, 2 * 66),
    ),
    # 0 prefill A 11 | A, prefill B 25 | A, B 29
    "autoregressive on two GPUs": (
        [(0, 5, 3), (11, 5, 2)], {"decoding": AR, "deployment": {"tensor_parallel": 2}, "scheduler": SLOW_HOST},
        (2 * 26, 2 * 3, 0),
    ),
    # 0 prefill 10 | both towers take 4 + 3 a token
    "mock AR, split": ([(0, 5, 3)], {"decoding": MOCK}, (10 + 3 * 7, 10 + 3 * 7, 0)),
    # 0 prefill, draft, verify 14 | draft, verify 18 | 22
    "speculative": ([(0, 5, 7)], {"decoding": TWO_DRAFTS, "latency": DRAFTS}, (22, 0, 0)),
    "speculative with a draft model": (
        [(0, 5, 7)],
        {"decoding": TWO_DRAFTS | {"drafter": {"kind": "model", "model": "nemotron-3-nano-30b-a3b"}}, "latency": DRAFTS,
         "deployment": {"gpu": "b200"}},
        (22, 0, 0),
    ),
    "speculative, drafts looked up by the host": (
        [(0, 5, 7)], {"decoding": TWO_DRAFTS | {"drafter": {"kind": "ngram"}}, "latency": DRAFTS}, (19, 3, 0),
    ),
    "block diffusion": (
        A_THEN_B,
        {"decoding": {"kind": "block_diffusion", "block_size": 16}, "model": "nemotron-3-nano-30b-a3b"}, (42, 0, 0),
    ),
    "the second replica has nothing to do until 12, nor the first from 28 on": (
        A_THEN_B, {"deployment": COLOCATED | {"replicas": 2}}, (28 + 18, 0, 12 + 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_gpus_do(tmp_path, name):
    rows, sections, (computing, waiting, idle) = EXAMPLES[name]
    sections = sections | {"cost": {"price_usd_per_hour": 2, "power_w": 1000, "idle_power_w": 100}}
    cost = replay(tmp_path, rows, **sections).cost
    found = {key: value * 3.6e6 for key, value in cost.items()}
    parts = [found[f"gpu_hours_{of}"] for of in ("computing", "waiting", "idle")]
    assert parts == pytest.approx([computing, waiting, idle], abs=1e-9)
    assert found["gpu_hours"] == pytest.approx(computing + waiting + idle)
    assert found["usd"] == pytest.approx(2 * (computing + waiting + idle))
    assert found["energy_kwh"] == pytest.approx(computing + 0.1 * (waiting + idle))
    tokens = sum(row[2] for row in rows)
    assert cost["usd_per_million_output_tokens"] == pytest.approx(cost["usd"] / tokens * 1e6)
    assert cost["kwh_per_million_output_tokens"] == pytest.approx(cost["energy_kwh"] / tokens * 1e6)


def test_hours_add_up_to_the_last_bit():
    for time in (GpuTime(1, 2, 3), GpuTime(10**15 + 1, 7**17, 3**30), GpuTime(0, 0, 1)):
        cost = cost_of(load_gpu("h100-sxm", ROOT), time, 1)
        assert cost["gpu_hours_computing"] + cost["gpu_hours_waiting"] + cost["gpu_hours_idle"] == cost["gpu_hours"]
        assert cost["gpu_hours"] == pytest.approx(sum(time) / 3.6e12, rel=1e-15)


@pytest.mark.parametrize("gpu", ["h100-sxm", "h200", "b200", "a100-80gb"])
def test_presets_price_their_hours(gpu):
    """What a waiting GPU draws is some tenth of what a computing one may."""
    preset = load_gpu(gpu, ROOT)
    run, results = run_of(workload=synthetic(requests=20), deployment={"gpu": gpu, "replicas": 3})
    cost, seconds = results.cost, results.utilisation["duration_s"]
    assert cost["gpu_hours"] == pytest.approx(run.gpus * seconds / 3600)
    assert cost["usd"] == pytest.approx(cost["gpu_hours"] * preset.price_usd_per_hour)
    spared = cost["gpu_hours"] * preset.power_w / 1e3 - cost["energy_kwh"]
    standing = cost["gpu_hours_waiting"] + cost["gpu_hours_idle"]
    assert spared == pytest.approx(standing * (preset.power_w - preset.idle_power_w) / 1e3)
    assert 0.1 < preset.idle_power_w / preset.power_w < 0.25
    assert run.provenance["price"].startswith(f"{preset.price_usd_per_hour:g} USD per GPU hour: RunPod")
    assert re.match(rf"modelled: {preset.power_w:g} W while computing \(.+\), {preset.idle_power_w:g} W otherwise \(.+upper bound", run.provenance["power"])  # fmt: skip


def test_what_is_not_known_is_not_told():
    run, results = run_of(workload=synthetic(requests=20), deployment={"gpu": "gb10"})
    assert [results.cost[key] for key in ("usd", "usd_per_million_output_tokens")] == [None, None]
    assert [results.cost[key] for key in ("energy_kwh", "kwh_per_million_output_tokens")] == [None, None]
    assert results.cost["gpu_hours"] > 0
    assert not {"price", "power"} & set(run.provenance)


def test_a_scenario_may_say_price_and_power():
    workload, gb10 = synthetic(requests=20), {"gpu": "gb10"}
    run, results = run_of(workload=workload, deployment=gb10, cost={"price_usd_per_hour": 0.5, "idle_power_w": 40})
    assert results.cost["usd"] == pytest.approx(results.cost["gpu_hours"] / 2)
    assert results.cost["energy_kwh"] > results.cost["gpu_hours"] * 0.04
    assert run.provenance["price"] == "0.5 USD per GPU hour: given in the scenario"
    assert (
        "140 W while computing (SoC 140 W of the 240 W supply), 40 W otherwise (given in the scenario)"
        in run.provenance["power"]
    )
    free = run_of(workload=workload, deployment=gb10, cost={"price_usd_per_hour": 0})[1].cost
    assert (free["usd"], free["energy_kwh"]) == (0, None)


def test_nothing_draws_more_when_it_waits(tmp_path):
    with pytest.raises(InputError, match="gpu h100-sxm: idle_power_w is 121.7; at most power_w, 100"):
        run_of(workload=synthetic(), cost={"power_w": 100})
    gpu = yaml.safe_load(preset_path("gpus", "h100-sxm", ".yaml").read_text()) | {"name": "mine", "idle_power_w": 900}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(gpu))
    with pytest.raises(InputError, match="gpu mine: idle_power_w is 900; at most power_w, 700"):
        run_of(tmp_path, workload=synthetic(), deployment={"gpu": "mine.yaml"})


ONE_WAY = {"choices": {"decoding": [{"kind": "autoregressive"}]}, "replications": 1}


def test_a_plan_pays_the_price_that_its_scenario_says(tmp_path):
    answer = found(tmp_path, ONE_WAY, {"cost": {"price_usd_per_hour": 1.5}})
    assert answer["best"]["usd_per_hour"] == 1.5 * answer["best"]["gpus"]


def test_one_price_is_not_that_of_several_gpus(tmp_path):
    gpus = ONE_WAY["choices"] | {"deployment.gpu": ["h100-sxm", "h200"]}
    with pytest.raises(
        InputError, match="cost.price_usd_per_hour would be that of every deployment.gpu; give prices in"
    ):
        found(tmp_path, ONE_WAY | {"choices": gpus}, {"cost": {"price_usd_per_hour": 1.5}})
