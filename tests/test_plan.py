"""``twotower-sim plan`` from a file to its answer, against brute force, and what it says of plans that cannot be."""

import csv
import json
from itertools import product

import pytest
from conftest import AFFINE, ROOT

from twotower_sim import cli
from twotower_sim.capacity import Objective, judge
from twotower_sim.errors import InputError
from twotower_sim.experiments import Experiment
from twotower_sim.plan_report import plan_and_report
from twotower_sim.result_cache import ResultCache
from twotower_sim.scenario import Setting, load_scenario
from twotower_sim.workers import Workers

LENGTH = {"kind": "lognormal", "mean": 200, "cv": 0.5, "max": 800}
SCENARIO = {
    "workload": {"kind": "synthetic", "requests": 1200, "arrivals": {"kind": "poisson", "rate_rps": 90},
                 "input_tokens": LENGTH, "output_tokens": LENGTH},
    "scheduler": {"max_num_seqs": 16},
    "latency": AFFINE,
    "commits": {"kind": "constant", "tokens_per_step": 4},
    "slo": {"request_latency_ms": 3000},
}  # fmt: skip
PLAN = {
    "scenario": "scenario.yaml",
    "objectives": {"request_latency.p90": 2500, "good_request_fraction": 0.9},
    "choices": {
        "decoding": [{"kind": "two_tower"}, {"kind": "autoregressive"}],
        "scheduler.max_num_seqs": [8, 32],
        "deployment.placement": [{"kind": "split"}, {"kind": "pools", "context": 1, "denoiser": 2}],
    },
    "most_gpus": 24,
    "replications": 3,
    "margin": False,
}


def files(tmp_path, asked: dict, scenario: dict | None = None):
    (tmp_path / "scenario.yaml").write_text(json.dumps(SCENARIO | (scenario or {})))
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(PLAN | asked))
    return path


def found(tmp_path, asked: dict, scenario: dict | None = None) -> dict:
    out = tmp_path / "out"
    plan_and_report(files(tmp_path, asked, scenario), [], out, ResultCache(tmp_path / "cache"), Workers(1), quiet=True)
    return json.loads((out / "plan.json").read_text())


def test_the_answer_is_that_of_brute_force(tmp_path):
    """Every number of replicas of every combination, each on its own."""
    answer = found(tmp_path, {})
    objectives = [Objective("request_latency.p90", 2500), Objective("good_request_fraction", 0.9, least=True)]
    usd, feasible = 2.69, []
    for decoding, seats, placement in product(*PLAN["choices"].values()):
        if decoding["kind"] == "autoregressive" and placement["kind"] == "pools":
            continue
        gpus = 1 if decoding["kind"] == "autoregressive" else 3 if placement["kind"] == "pools" else 2
        for replicas in range(1, 24 // gpus + 1):
            values = {
                "decoding": decoding,
                "scheduler.max_num_seqs": seats,
                "deployment.placement": placement,
                "deployment.replicas": replicas,
            }
            scenario = load_scenario(
                tmp_path / "scenario.yaml", [Setting(key, value, "", tmp_path) for key, value in values.items()]
            )
            runs = [Experiment(scenario.model_copy(update={"seed": seed}), tmp_path).outcome() for seed in (0, 1, 2)]
            if judge(None, runs, objectives).meets:
                feasible.append((gpus * replicas * usd, decoding["kind"]))
                break
    assert answer["met"]
    assert answer["best"]["usd_per_hour"] == pytest.approx(min(feasible)[0])
    assert answer["best"]["choices"]["decoding"]["kind"] == min(feasible)[1]
    for kind in ("two_tower", "autoregressive"):
        costs = [of["usd_per_hour"] for of in answer["candidates"] if of["choices"]["decoding"]["kind"] == kind]
        assert min(costs) == pytest.approx(min(cost for cost, of in feasible if of == kind))
    assert (
        answer["one_replica_fewer"] is None
        if answer["best"]["replicas"] == 1
        else not answer["one_replica_fewer"]["meets"]
    )


def test_a_choice_that_is_not_read_makes_no_candidate_of_its_own(tmp_path):
    answer = found(tmp_path, {"choices": {key: PLAN["choices"][key] for key in ("decoding", "deployment.placement")}})
    names = [of["candidate"] for of in answer["candidates"]] + list(answer["dearer"]) + list(answer["given_up"])
    assert sorted(name for name in names if "autoregressive" in name) == ["autoregressive"]
    assert not any("deployment.placement" in warning for warning in answer["warnings"])


def test_the_same_bytes_again_from_the_cache(tmp_path, monkeypatch):
    first = found(tmp_path, {})
    monkeypatch.setattr(Experiment, "outcome", lambda self: pytest.fail("simulated again"))
    assert found(tmp_path, {}) == first


def test_the_margin(tmp_path):
    answer = found(tmp_path, {"choices": {"decoding": [{"kind": "autoregressive"}]}, "margin": True, "replications": 1})
    load, best = answer["load"], answer["best"]
    assert 1 <= load["bears"] < load["breaks"] <= 1.02 * load["bears"]
    objectives = [Objective("request_latency.p90", 2500), Objective("good_request_fraction", 0.9, least=True)]
    for times, meets in ((load["bears"], True), (load["breaks"], False)):
        values = {
            "decoding": {"kind": "autoregressive"},
            "deployment.replicas": best["replicas"],
            "workload.arrivals.rate_rps": 90 * times,
        }
        scenario = load_scenario(
            tmp_path / "scenario.yaml", [Setting(key, value, "", tmp_path) for key, value in values.items()]
        )
        assert judge(None, [Experiment(scenario, tmp_path).outcome()], objectives).meets == meets


CLOSED = {"kind": "closed_loop", "requests": 400, "concurrency": 40, "input_tokens": LENGTH, "output_tokens": LENGTH}
STEPS = {"kind": "steps", "steps": [{"rate_rps": 30, "for_s": 2}, {"rate_rps": 60, "for_s": 2}]}


@pytest.mark.parametrize(
    ("workload", "heavier"),
    [
        (CLOSED, lambda times: {"workload.concurrency": round(40 * times)}),
        (
            SCENARIO["workload"] | {"arrivals": STEPS},
            lambda times: {
                "workload.arrivals.steps": [of | {"rate_rps": of["rate_rps"] * times} for of in STEPS["steps"]]
            },
        ),
    ],
    ids=["users", "steps"],
)
def test_the_margin_of_other_loads(tmp_path, workload, heavier):
    asked = {"choices": {"decoding": [{"kind": "autoregressive"}]}, "objectives": {"request_latency.p90": 2500}}
    answer = found(tmp_path, asked | {"margin": True, "replications": 1}, {"workload": workload})
    for times, meets in ((answer["load"]["bears"], True), (answer["load"]["breaks"], False)):
        values = {"decoding": {"kind": "autoregressive"}, "deployment.replicas": answer["best"]["replicas"]}
        settings = [Setting(key, value, "", tmp_path) for key, value in (values | heavier(times)).items()]
        scenario = load_scenario(tmp_path / "scenario.yaml", settings)
        runs = [Experiment(scenario, tmp_path).outcome()]
        assert judge(None, runs, [Objective("request_latency.p90", 2500)]).meets == meets


def test_nothing_meets_what_cannot_be(tmp_path):
    answer = found(tmp_path, {"objectives": {"request_latency.p90": 1}, "most_gpus": 4})
    assert not answer["met"]
    assert answer["answer"].startswith("No deployment of at most 4 GPUs meets this; closest is ")
    assert answer["best"] is None
    assert len(answer["given_up"]) == len({*answer["given_up"]}) > 1
    rows = list(csv.DictReader((tmp_path / "out" / "candidates.csv").open()))
    assert {row["candidate"] for row in rows} == answer["given_up"].keys()


def test_a_load_that_is_too_short_gives_no_answer(tmp_path):
    workload = SCENARIO["workload"] | {"requests": 40, "arrivals": {"kind": "poisson", "rate_rps": 200}}
    answer = found(tmp_path, {"margin": True}, {"workload": workload})
    assert answer["answer"].startswith("This load is too short to tell: 1 x (")
    assert not answer["met"]
    assert answer["closest"]["meets"]
    assert not answer["closest"]["settled"]
    assert answer["load"] is None
    assert any("too short a time to settle" in warning for warning in answer["warnings"])


def test_a_quality_floor_takes_only_what_is_known(tmp_path):
    decodings = [
        {"kind": "two_tower", "gamma": 0.8},
        {"kind": "two_tower", "gamma": 0.7},
        {"kind": "mock_ar"},
        {"kind": "autoregressive"},
    ]
    asked = {"choices": {"decoding": decodings}, "replications": 1}
    answer = found(tmp_path, asked | {"quality_floor": 0.98})
    assert answer["given_up"]["two_tower gamma 0.7"] == "its quality is not published; the floor is 98.0%"
    assert "its quality is not published" in answer["given_up"]["mock_ar"]
    answer = found(tmp_path, asked | {"quality_floor": 0.99})
    assert answer["given_up"]["two_tower gamma 0.8"] == "its quality is 98.7%; the floor is 99.0%"
    assert [of["candidate"] for of in answer["candidates"]] == ["autoregressive"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"objectives": {}}, "objectives: "),
        ({"objectives": {"ttft": 5}}, "objectives: found 'ttft'; expected one of time_to_first_token"),
        ({"objectives": {"request_latency.p12": 5}}, "found 'request_latency.p12'"),
        ({"objectives": {"request_latency.p90": -5}}, "request_latency.p90: found -5; expected more than 0"),
        ({"choices": {"deployment.replicas": [1, 2]}}, "deployment.replicas is found, not chosen"),
        ({"choices": {"decoding.gama": [0.8]}}, "no candidate can be run"),
        ({"choices": {"decoding": []}}, "choices"),
        ({"scenario": "nothing.yaml"}, "nothing.yaml is no file"),
        ({"most_gpu": 3}, "most_gpu: unknown key (did you mean most_gpus?)"),
        ({"replications": 0}, "replications"),
        ({"quality_floor": 2.0}, "quality_floor"),
        ({"choices": {"deployment.gpu": ["gb300"]}}, "no candidate can be run"),
    ],
)  # fmt: skip
def test_bad_plans_are_explained(tmp_path, asked, said):
    path = files(tmp_path, asked)
    with pytest.raises(InputError) as error:
        plan_and_report(path, [], tmp_path / "out", ResultCache(None), Workers(1), quiet=True)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_on_the_shipped_plan(tmp_path, monkeypatch, capsys):
    command = [
        "plan",
        str(ROOT / "scenarios" / "plans" / "azure_conversation.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--no-cache",
        "--jobs",
        "1",
    ]
    monkeypatch.setattr(
        "sys.argv", ["twotower-sim", *command, "--set", "workload.requests=300", "--set", "workload.rate_scale=1"]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "Answer      " in printed
    assert "meets all objectives at the least cost" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "candidates.csv",
        "plan.json",
        "run.json",
        "trials.csv",
    ]
