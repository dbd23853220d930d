"""Scenario files: defaults, errors that name the place, and that every option does something."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import AFFINE, ROOT, run_of, synthetic
from profiles import measured_profile
from pydantic import BaseModel

from twotower_sim.errors import InputError
from twotower_sim.result import summary
from twotower_sim.scenario import Scenario, load_scenario
from twotower_sim.simulation import prepare
from twotower_sim.yaml_file import _models

SHORTEST = """\
workload:
  kind: synthetic
  requests: 20
  arrivals: {kind: poisson, rate_rps: 4}
  input_tokens: {kind: constant, value: 100}
  output_tokens: {kind: constant, value: 40}
"""


def load(tmp_path, more: str = "", *overrides: str) -> Scenario:
    path = tmp_path / "case.yaml"
    path.write_text(SHORTEST + more)
    return load_scenario(path, list(overrides))


def test_the_shortest_scenario(tmp_path):
    scenario = load(tmp_path)
    assert scenario.name == "case"
    assert scenario.decoding.model_dump() == {
        "kind": "two_tower", "gamma": 0.8, "block_size": 16, "steps_per_block": 16,
        "gamma_by_class": {}, "gamma_policy": {"kind": "fixed"},
    }  # fmt: skip
    assert scenario.latency.kind == "roofline"
    with pytest.raises(ValueError, match="frozen"):
        scenario.seed = 1


def test_a_section_without_its_kind_is_of_the_default_kind(tmp_path):
    scenario = load(tmp_path, "decoding: {gamma: 0.9}\ndeployment: {placement: {link: pcie}}\n", "commits.class=math")
    assert (scenario.decoding.kind, scenario.decoding.gamma) == ("two_tower", 0.9)
    assert (scenario.deployment.placement.kind, scenario.deployment.placement.link) == ("split", "pcie")
    assert (scenario.commits.kind, scenario.commits.class_) == ("observed", "math")


def test_overrides(tmp_path):
    scenario = load(
        tmp_path,
        "scheduler: {max_num_seqs: 3}\n",
        "scheduler.max_num_seqs=64",
        "workload.input_tokens.value=7",
        "decoding.kind=autoregressive",
        "slo={request_latency_ms: 1e4}",
        "memory.kv_blocks=null",
    )
    assert scenario.scheduler.max_num_seqs == 64
    assert scenario.workload.input_tokens.value == 7
    assert scenario.decoding.kind == "autoregressive"
    assert scenario.slo.request_latency_ms == 10_000


def test_a_new_kind_starts_its_section_afresh(tmp_path):
    scenario = load(tmp_path, "decoding: {kind: two_tower, gamma: 0.9}\n", "decoding.kind=autoregressive")
    assert scenario.decoding.model_dump() == {"kind": "autoregressive"}
    same = load(tmp_path, "decoding: {kind: two_tower, gamma: 0.9}\n", "decoding.kind=two_tower")
    assert same.decoding.gamma == 0.9


@pytest.mark.parametrize(
    ("more", "overrides", "said"),
    [
        ("nam: x\n", [], "case.yaml:7: nam: unknown key (did you mean name?); allowed: name, seed, workload"),
        (
            "scheduler:\n  max_num_seq: 3\n",
            [],
            "case.yaml:8: scheduler.max_num_seq: unknown key (did you mean max_num_seqs?)",
        ),
        ("router: {kind: rnd}\n", [], "case.yaml:7: router.kind: found 'rnd'; allowed: round_robin, random,"),
        (
            "latency: {kind: rofline}\n",
            [],
            "latency.kind: found 'rofline'; allowed: roofline, affine, profile (did you mean roofline?)",
        ),
        ("decoding:\n  gama: .5\n", [], "case.yaml:8: decoding.gama: unknown key (did you mean gamma?)"),
        ("decoding: {gamma: 2}\n", [], "case.yaml:7: decoding.gamma: found 2; input should be less than 1"),
        ("decoding: {gamma: .nan}\n", [], "decoding.gamma: found nan"),
        ("decoding: 3\n", [], "case.yaml:7: decoding: found 3"),
        ("decoding:\n", [], "case.yaml:7: decoding: found None"),
        ("slo: {time_to_first_token: 3}\n", [], "(did you mean time_to_first_token_ms?)"),
        ("memory: {kv_blocks: 0}\n", [], "memory.kv_blocks: found 0; input should be greater than or equal to 1"),
        ("memory: {kv_blocks: 1.5}\n", [], "memory.kv_blocks: found 1.5"),
        ("seed: -1\n", [], "case.yaml:7: seed: found -1"),
        ("seed: 1\nseed: 2\n", [], "case.yaml:8: seed stands twice"),
        ("memory: [1\n", [], "case.yaml:8: not valid YAML"),
        ("name: a/b\n", [], "case.yaml:7: name: found 'a/b'"),
        (
            "scheduler: {max_num_seqs: 1000}\n",
            [],
            "max_num_batched_tokens is 8192; 1000 sequences (max_num_seqs) of 16",
        ),
        ("", ["workload.requests=abc"], "--set workload.requests=abc: workload.requests: found 'abc'"),
        (
            "",
            ["workload.arrivals.kind=pois"],
            "--set workload.arrivals.kind=pois: workload.arrivals.kind: found 'pois'",
        ),
        ("", ["workload.kind=trace"], "workload.path: is missing"),
        ("", ["workload=3"], "--set workload=3: workload: found 3"),
        ("", ["decoding.kind=speculative"], "decoding.acceptance: is missing"),
        (
            "",
            ["decoding.kind=speculative", "decoding.acceptance=1.5"],
            "decoding.acceptance: found 1.5; input should be less than or equal to 1",
        ),
        (
            "",
            ["decoding.kind=speculative", "decoding.acceptance=[0.5, 0.4]"],
            "acceptance: found 2 values; draft_tokens is 3",
        ),
        (
            "",
            ["decoding.kind=speculative", "decoding.acceptance=0.5", "decoding.drafter.kind=model"],
            "decoding.drafter.model: is missing",
        ),
        ("decoding: {gamma_by_class: {chat: 0.6}}\n", [], "decoding.gamma_by_class: found 'chat'; allowed: none"),
        ("", ["workload.classes={a: 0.5}"], "classes: the shares add up to 0.5; expected 1"),
        (
            "",
            ["decoding.gamma_policy={kind: by_queue, levels: [{waiting: 4, gamma: 0.5}, {waiting: 2, gamma: 0.4}]}"],
            "levels: expected rising waiting and falling gamma",
        ),
        (
            "scheduler: {policy: lockstep}\ndeployment: {placement: {kind: pools}}\n",
            [],
            "towers in tandem (placement asynchronous or pools) take policy fdfo",
        ),
        ("scheduler: {policy: lockstep, steps_per_round: 2}\n", [], "with policy lockstep a round lasts until"),
        (
            "",
            ["decoding.kind=mock_ar", "deployment.placement.kind=pools"],
            "mock_ar takes colocated, or split with mode",
        ),
        ("deployment: {tensor_parallel: {context: 3}}\n", [], "deployment.tensor_parallel.denoiser: is missing"),
        ("deployment: {tensor_parallel: x}\n", [], "case.yaml:7: deployment.tensor_parallel: found 'x'"),
        ("", ["seed"], "--set seed: expected section.key=value"),
        ("", ["=3"], "--set =3: expected section.key=value"),
        ("", ["name.x=3"], "--set name.x=3: name is no section"),
        ("", ["seed=[1"], "--set seed=[1: not valid YAML"),
        ("", ["workload.kind=trace", "workload.path=x", "workload.window_s=[3, 1]"], "window_s is [3.0, 1.0]"),
        ("", ["kind=x"], "--set kind=x: kind: unknown key"),
        ("seed: 2024-13-45\n", [], "case.yaml:7: seed: found '2024-13-45'"),
        ("seed: 0x_\n", [], "seed: found '0x_'"),
        ("seed: 010\n", [], "seed: found '010'"),
        ("seed: 1:30\n", [], "seed: found '1:30'"),
        ("seed: yes\n", [], "seed: found 'yes'"),
        ("seed: true\n", [], "seed: found True"),
        ("seed: '5'\n", [], "seed: found '5'"),
        ("seed: " + "9" * 5000 + "\n", [], "seed: found '9999"),
        ("seed: !!int 0x" + "f" * 5000 + "\n", [], "case.yaml:7: not valid YAML: '0xfff"),
        ("seed: !!int ''\n", [], "case.yaml:7: not valid YAML: '' is no int"),
        ("seed: !!bool maybe\n", [], "case.yaml:7: not valid YAML: 'maybe' is no bool"),
        ("seed: !!timestamp x\n", [], "case.yaml:7: not valid YAML: 'x' is no timestamp"),
        ("scheduler: {chunked_prefill: 'off'}\n", [], "scheduler.chunked_prefill: found 'off'"),
        ("deployment: {replicas: true}\n", [], "deployment.replicas: found True"),
        ("slo: &a [*a]\n", [], "case.yaml:7: not valid YAML: the alias *a is not supported"),
        ("slo: &a {}\nrouter: *a\n", [], "case.yaml:8: not valid YAML: the alias *a is not supported"),
        ("slo: " + "[" * 5000 + "\n", [], "not valid YAML"),
        ("slo: " + "[" * 900 + "]" * 900 + "\n", [], "case.yaml:"),
        ("commits: {class_: math}\n", [], "commits.class_: unknown key (did you mean class?)"),
        ("", ["name=\udcff"], "not valid YAML"),
        ("", ["seed=!!int ''"], "--set seed=!!int '': not valid YAML: '' is no int"),
        ("", ["slo={request_latency_ms: 1, request_latency_ms: 2}"], "slo.request_latency_ms stands twice"),
        ("", ["workload.kind=closed_loop"], "--set workload.kind=closed_loop: workload.concurrency: is missing"),
        ("", ["workload.arrivals={kind: gamma, rate_rps: 1, cv: 1e-300}"], "workload.arrivals.cv: found 1e-300"),
    ],
)
def test_errors_name_the_place_the_find_and_what_is_allowed(tmp_path, more, overrides, said):
    if "name" in overrides[0] if overrides else False:
        more = "name: x\n"
    with pytest.raises(InputError) as error:
        load(tmp_path, more, *overrides)
    assert said in str(error.value)
    assert "pydantic" not in str(error.value)


def test_every_mistake_is_reported_at_once(tmp_path):
    with pytest.raises(InputError) as error:
        load(tmp_path, "seed: x\nfoo: 1\ndecoding: {gamma: 7}\n")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["", "- 1\n", "x", "\t", "a: !!python/object:os.system x", "1: 2\n"])
def test_files_that_are_no_scenario(tmp_path, text):
    path = tmp_path / "case.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="case.yaml"):
        load_scenario(path)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "case.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_scenario(path)


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    """PyYAML reads 1e-5 as text; users write it."""
    latency = "latency: {kind: affine, prefill: {base_ms: 1e1}, decode: {per_context_token_ms: 1e-5}}\n"
    scenario = load(tmp_path, latency, "decoding.kind=autoregressive")
    assert (scenario.latency.prefill.base_ms, scenario.latency.decode.per_context_token_ms) == (10, 1e-5)


def test_the_schema_describes_the_file(tmp_path):
    schema = Scenario.model_json_schema()
    assert json.dumps(schema)
    assert schema["required"] == ["workload"]
    assert "class" in schema["$defs"]["ObservedCommits"]["properties"]
    assert "kind" not in schema["$defs"]["TwoTower"].get("required", [])
    assert "kind" in schema["$defs"]["Autoregressive"]["required"]


def test_the_resolved_scenario_reads_back_as_itself(tmp_path):
    scenario = load(tmp_path, "commits: {class: code}\n")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(scenario.model_dump(by_alias=True)))
    assert load_scenario(tmp_path / "again.yaml") == scenario


def test_paths_are_relative_to_the_file_or_if_set_to_the_working_directory(tmp_path, monkeypatch):
    folder = tmp_path / "sub"
    folder.mkdir()
    trace = (ROOT / "traces" / "examples" / "azure.csv").read_text()
    (tmp_path / "beside.csv").write_text(trace)
    (folder / "case.yaml").write_text("workload: {kind: trace, path: ../beside.csv}\n")
    assert len(prepare(load_scenario(folder / "case.yaml"), folder).requests) == 3
    monkeypatch.chdir(tmp_path)
    for given in ("beside.csv", "../beside.csv", str(tmp_path / "beside.csv")):
        scenario = load_scenario(Path("sub/case.yaml"), [f"workload.path={given}"])
        assert len(prepare(scenario, Path("sub")).requests) == 3
        if not given.startswith("/"):
            assert not Path(scenario.workload.path).is_absolute()


def test_a_file_given_with_set_may_have_any_name_in_any_folder(tmp_path, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "case.yaml").write_text(SHORTEST)
    (tmp_path / "deep" / "er" / "case.yaml").write_text(SHORTEST)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    name = "a: b #c.csv"
    (tmp_path / name).write_text((ROOT / "traces" / "examples" / "azure.csv").read_text())
    monkeypatch.chdir(tmp_path)
    for folder in (".", "link"):
        scenario = load_scenario(Path(folder) / "case.yaml", ["workload.kind=trace", f"workload.path={name}"])
        assert len(prepare(scenario, Path(folder)).requests) == 3


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("(1).yaml", "1-"),
        ("-dash.yaml", "dash"),
        (".yaml", "yaml"),
        ("...yaml", "scenario"),
        ("n" * 200 + ".yaml", "n" * 100),
    ],
)
def test_any_file_gives_a_name(tmp_path, file, name):
    (tmp_path / file).write_text(SHORTEST)
    assert load_scenario(tmp_path / file).name == name


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"decoding": {"kind": "autoregressive"}}, None),
        ({"decoding": {"kind": "autoregressive"}, "commits": {"kind": "observed"}}, "commits"),
        (
            {"decoding": {"kind": "autoregressive"}, "deployment": {"placement": {"kind": "split"}}, "latency": AFFINE},
            "deployment.placement, latency.denoise, latency.extend",
        ),
        ({"deployment": {"placement": {"kind": "split", "link": "pcie"}}}, None),
        (
            {"deployment": {"placement": {"kind": "split", "link": "pcie"}}, "latency": AFFINE},
            "deployment.placement.link, latency.decode",
        ),
        ({"decoding": {"kind": "mock_ar"}, "scheduler": {"policy": "lockstep"}}, "scheduler.policy"),
        ({"deployment": {"expert_parallel": True}}, "deployment.expert_parallel"),
        (
            {"decoding": {"kind": "autoregressive"}, "deployment": {"tensor_parallel": {"context": 1, "denoiser": 2}}},
            "deployment.tensor_parallel.denoiser",
        ),
        ({"deployment": {"placement": {"kind": "split", "transfer": "blocking"}}}, "deployment.placement.transfer"),
        (
            {
                "decoding": {"kind": "speculative", "acceptance": 0.5},
                "latency": AFFINE,
                "commits": {"kind": "observed"},
            },
            "commits, latency.denoise, latency.extend",
        ),
    ],
)
def test_what_is_set_without_effect_is_named(sections, named):
    run = prepare(Scenario.model_validate({"workload": synthetic()} | sections))
    found = [warning.rpartition(": ")[2] for warning in run.warnings if warning.startswith("set, but without effect")]
    assert found == ([named] if named else [])


# ---------------------------------------------------------------------- every option does something

TRACE = {"kind": "trace", "path": str(ROOT / "traces" / "examples" / "mooncake.jsonl")}
COLUMNS = {
    "arrival": "arrival_s",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "session": "session",
}
TABLE = {"kind": "trace", "path": str(ROOT / "traces" / "examples" / "columns.csv"), "columns": COLUMNS}
BUSY = synthetic(requests=60, rate_rps=50)
GAMMA = BUSY | {"arrivals": {"kind": "gamma", "rate_rps": 50, "cv": 2}}
EVEN = BUSY | {"arrivals": {"kind": "constant", "rate_rps": 50}}
MARKOV = BUSY | {
    "arrivals": {"kind": "markov", "states": [{"rate_rps": 9, "mean_s": 1}, {"rate_rps": 90, "mean_s": 0.3}]}
}
DIURNAL = BUSY | {"arrivals": {"kind": "diurnal", "rate_rps": 50, "peak_to_mean": 1.9, "period_s": 1}}
RAMP = BUSY | {"arrivals": {"kind": "ramp", "from_rps": 0, "to_rps": 50, "over_s": 1}}
STEPS = BUSY | {"arrivals": {"kind": "steps", "steps": [{"rate_rps": 50, "for_s": 1}, {"rate_rps": 5}]}}
DRAWN = {"kind": "fingerprint", "fingerprint": "azure-conversation-2023", "requests": 60}
FIXED = BUSY | {"input_tokens": {"kind": "constant", "value": 90}, "output_tokens": {"kind": "constant", "value": 90}}
LOOP = {
    "kind": "closed_loop", "requests": 30, "concurrency": 4,
    "input_tokens": {"kind": "constant", "value": 90}, "output_tokens": {"kind": "constant", "value": 90},
}  # fmt: skip
PASS = {"base_ms": 5, "per_seq_ms": 1, "per_context_token_ms": 0.001}
COSTS = {
    "kind": "affine", "prefill": {"base_ms": 5, "per_new_token_ms": 0.1}, "decode": PASS, "denoise": PASS, "extend": PASS,
    "draft": PASS, "transfer": PASS,
}  # fmt: skip
MIX = {"kind": "mix", "parts": {"chat": {"workload": BUSY}, "batch": {"workload": FIXED}}}
SHARED = {"kind": "trace", "path": "shared.jsonl"}
WEKA = {"kind": "trace", "path": str(next((ROOT / "traces" / "examples").glob("weka.*")))}
TIGHT = {"kv_blocks": 120, "state_slots": 16}
LONG = {"kv_blocks": 20, "state_slots": 16, "oversized": "reject"}
AR = {"kind": "autoregressive"}
MOCK = {"kind": "mock_ar"}
DIFFUSION = {"decoding": {"kind": "block_diffusion", "block_size": 16}, "model": "nemotron-3-nano-30b-a3b"}
SPECULATIVE = {"kind": "speculative", "draft_tokens": 2, "acceptance": 0.7}
KINDS = {
    "decode": AR,
    "denoise": {"kind": "two_tower"},
    "extend": {"kind": "two_tower"},
    "draft": SPECULATIVE,
    "transfer": MOCK,
}
CLASSES = {"chat": 0.6, "batch": 0.4}
QUEUE = {"kind": "by_queue", "levels": [{"waiting": 1, "gamma": 0.6}]}
SHORTER_QUEUE = [{"waiting": 9, "gamma": 0.6}]
FEW = {"max_num_seqs": 4}


def of_pools(**more):
    """A lightly loaded replica of two context and two denoiser servers."""
    return {"deployment": {"placement": {"kind": "pools", "context": 2, "denoiser": 2} | more}}


PROFILE = str(ROOT / "twotower_sim" / "presets" / "profiles" / "observed-h100.json")

OPTIONS: dict[str, tuple[dict, Any]] = {
    # option: (a scenario in which it matters, another value)
    "name": ({}, "other"),
    "seed": ({}, 1),
    "model": ({"deployment": {"tensor_parallel": 8}}, "../nemotron.json"),
    "workload.TraceWorkload.path": ({"workload": TRACE}, str(ROOT / "traces" / "examples" / "azure.csv")),
    "workload.TraceWorkload.format": ({"workload": TRACE}, "azure"),
    "workload.TraceWorkload.columns.arrival": ({"workload": TABLE}, "id"),
    "workload.TraceWorkload.columns.input_tokens": ({"workload": TABLE}, "output_tokens"),
    "workload.TraceWorkload.columns.output_tokens": ({"workload": TABLE}, "input_tokens"),
    "workload.TraceWorkload.columns.session": ({"workload": TABLE}, "input_tokens"),
    "workload.TraceWorkload.columns.finish": ({"workload": TABLE}, "finish_s"),
    "workload.TraceWorkload.time_unit": ({"workload": TABLE}, "ms"),
    "workload.TraceWorkload.on_error": ({"workload": {"kind": "trace", "path": "damaged.jsonl"}}, "skip"),
    "workload.TraceWorkload.sessions": ({"workload": {"kind": "trace", "path": "turns.jsonl"}}, "open"),
    "workload.TraceWorkload.session_starts.PoissonArrivals.rate_rps": ({"workload": WEKA | {"session_starts": {"kind": "poisson", "rate_rps": 1.0}}}, 0.1),
    "workload.TraceWorkload.limit": ({"workload": TRACE}, 2),
    "workload.TraceWorkload.window_s": ({"workload": TRACE}, [1, 9]),
    "workload.TraceWorkload.rate_scale": ({"workload": TRACE}, 2.0),
    "workload.TraceWorkload.spread_quantised": ({"workload": TRACE}, False),
    "workload.FingerprintWorkload.fingerprint": ({"workload": DRAWN}, "mooncake-conversation"),
    "workload.FingerprintWorkload.requests": ({"workload": DRAWN}, 50),
    "workload.FingerprintWorkload.rate_scale": ({"workload": DRAWN}, 2.0),
    "workload.SyntheticWorkload.requests": ({}, 50),
    "workload.SyntheticWorkload.arrivals.PoissonArrivals.rate_rps": ({}, 9),
    "workload.SyntheticWorkload.arrivals.GammaArrivals.rate_rps": ({"workload": GAMMA}, 9),
    "workload.SyntheticWorkload.arrivals.GammaArrivals.cv": ({"workload": GAMMA}, 1),
    "workload.SyntheticWorkload.arrivals.ConstantArrivals.rate_rps": ({"workload": EVEN}, 9),
    "workload.SyntheticWorkload.arrivals.MarkovArrivals.states": ({"workload": MARKOV}, [{"rate_rps": 9, "mean_s": 1}, {"rate_rps": 90, "mean_s": 1}]),
    "workload.SyntheticWorkload.arrivals.DiurnalArrivals.rate_rps": ({"workload": DIURNAL}, 9),
    "workload.SyntheticWorkload.arrivals.DiurnalArrivals.peak_to_mean": ({"workload": DIURNAL}, 1),
    "workload.SyntheticWorkload.arrivals.DiurnalArrivals.period_s": ({"workload": DIURNAL}, 2),
    "workload.SyntheticWorkload.arrivals.DiurnalArrivals.peak_at_s": ({"workload": DIURNAL}, 0.5),
    "workload.SyntheticWorkload.arrivals.RampArrivals.from_rps": ({"workload": RAMP}, 9),
    "workload.SyntheticWorkload.arrivals.RampArrivals.to_rps": ({"workload": RAMP}, 9),
    "workload.SyntheticWorkload.arrivals.RampArrivals.over_s": ({"workload": RAMP}, 2),
    "workload.SyntheticWorkload.arrivals.StepArrivals.steps": ({"workload": STEPS}, [{"rate_rps": 50, "for_s": 1}]),
    "workload.SyntheticWorkload.input_tokens.ConstantLength.value": ({"workload": FIXED}, 91),
    "workload.SyntheticWorkload.input_tokens.LognormalLength.mean": ({}, 900),
    "workload.SyntheticWorkload.input_tokens.LognormalLength.cv": ({}, 2),
    "workload.SyntheticWorkload.input_tokens.LognormalLength.max": ({}, 200),
    "workload.SyntheticWorkload.output_tokens.ConstantLength.value": ({"workload": FIXED}, 91),
    "workload.SyntheticWorkload.output_tokens.LognormalLength.mean": ({}, 900),
    "workload.SyntheticWorkload.output_tokens.LognormalLength.cv": ({}, 2),
    "workload.SyntheticWorkload.output_tokens.LognormalLength.max": ({}, 50),
    "workload.ClosedLoopWorkload.requests": ({"workload": LOOP}, 20),
    "workload.ClosedLoopWorkload.concurrency": ({"workload": LOOP}, 5),
    "workload.ClosedLoopWorkload.think_time_s": ({"workload": LOOP}, 1),
    "workload.ClosedLoopWorkload.input_tokens.ConstantLength.value": ({"workload": LOOP}, 91),
    "workload.ClosedLoopWorkload.output_tokens.ConstantLength.value": ({"workload": LOOP}, 91),
    "workload.MixWorkload.parts": ({"workload": MIX}, {"chat": {"workload": BUSY}, "batch": {"workload": EVEN}}),
    "workload.MixWorkload.rate_rps": ({"workload": MIX}, 10),
    "workload.MixWorkload.requests": ({"workload": MIX}, 40),
    "decoding.TwoTower.gamma": ({}, 0.6),
    "decoding.TwoTower.block_size": ({"commits": {"kind": "constant", "tokens_per_step": 4}}, 8),
    "decoding.TwoTower.steps_per_block": ({}, 8),
    "deployment.gpu": ({}, "b200"),
    "deployment.replicas": ({}, 2),
    "deployment.placement.Split.link": ({}, "pcie"),
    "workload.FingerprintWorkload.classes": ({"workload": DRAWN | {"classes": CLASSES}}, {"chat": 1.0}),
    "workload.SyntheticWorkload.classes": ({"workload": BUSY | {"classes": CLASSES}}, {"chat": 1.0}),
    "workload.TraceWorkload.classes": ({"workload": TRACE | {"classes": CLASSES}}, {"chat": 1.0}),
    "workload.ClosedLoopWorkload.classes": ({"workload": LOOP | {"classes": CLASSES}}, {"chat": 1.0}),
    "decoding.TwoTower.gamma_by_class": ({"workload": BUSY | {"classes": CLASSES}}, {"batch": 0.6}),
    "decoding.TwoTower.gamma_policy.GammaByQueue.levels": ({"scheduler": FEW, "decoding": {"kind": "two_tower", "gamma_policy": QUEUE}}, SHORTER_QUEUE),
    "decoding.BlockDiffusion.gamma": (DIFFUSION, 0.6),
    "decoding.BlockDiffusion.gamma_by_class": (DIFFUSION | {"workload": BUSY | {"classes": CLASSES}}, {"batch": 0.6}),
    "decoding.BlockDiffusion.gamma_policy.GammaByQueue.levels": (DIFFUSION | {"scheduler": FEW, "decoding": DIFFUSION["decoding"] | {"gamma_policy": QUEUE}}, SHORTER_QUEUE),
    "decoding.BlockDiffusion.block_size": (DIFFUSION | {"commits": {"kind": "constant", "tokens_per_step": 4}}, 32),
    "decoding.BlockDiffusion.steps_per_block": (DIFFUSION, 8),
    "decoding.Speculative.draft_tokens": ({"decoding": SPECULATIVE}, 3),
    "decoding.Speculative.acceptance": ({"decoding": SPECULATIVE}, [0.9, 0.5]),
    "decoding.Speculative.drafter.NgramDrafter.ms_per_round": ({"decoding": SPECULATIVE | {"drafter": {"kind": "ngram"}}}, 3),
    "decoding.Speculative.drafter.ModelDrafter.model": ({"decoding": SPECULATIVE | {"drafter": {"kind": "model", "model": "tiny.json"}}}, "other.json"),
    "deployment.placement.Split.mode": ({}, "asynchronous"),
    "deployment.placement.Split.transfer": ({"deployment": {"placement": {"kind": "split", "mode": "asynchronous", "link": "network"}}}, "blocking"),
    "deployment.placement.Pools.context": (of_pools(), 1),
    "deployment.placement.Pools.denoiser": (of_pools(), 1),
    "deployment.placement.Pools.link": (of_pools(), "network"),
    "deployment.placement.Pools.transfer": (of_pools(link="network"), "blocking"),
    "deployment.placement.Pools.assignment": (of_pools(), "free"),
    "deployment.tensor_parallel": ({}, 2),
    "deployment.tensor_parallel.context": ({"deployment": {"tensor_parallel": {"context": 1, "denoiser": 2}}}, 2),
    "deployment.tensor_parallel.denoiser": ({"deployment": {"tensor_parallel": {"context": 1, "denoiser": 2}}}, 4),
    "deployment.expert_parallel": ({"deployment": {"tensor_parallel": 4}}, True),
    "scheduler.policy": ({}, "lockstep"),
    "scheduler.steps_per_round": ({}, 3),
    "scheduler.max_extends_per_round": ({}, 1),
    "scheduler.overlap": ({"scheduler": {"host_overhead_ms": 4}}, "hidden"),
    "memory.prefix_cache.HybridPrefixCache.state_checkpoint_every": ({"workload": SHARED, "memory": {"prefix_cache": {"kind": "hybrid", "state_checkpoint_every": 512}}}, 2048),
    "scheduler.max_num_seqs": ({}, 4),
    "scheduler.max_num_batched_tokens": ({"scheduler": {"max_num_seqs": 8}}, 128),
    "scheduler.chunked_prefill": ({"workload": synthetic(requests=60, rate_rps=900, input_tokens=700), "scheduler": {"max_num_batched_tokens": 4096}}, False),
    "scheduler.prefill": ({}, "first"),
    "scheduler.admission": ({"scheduler": {"max_num_seqs": 2}}, "shortest_prompt"),
    "scheduler.host_overhead_ms": ({}, 4),
    "memory.gpu_memory_utilization": ({}, 0.95),
    "memory.kv_block_tokens": ({}, 32),
    "memory.kv_blocks": ({"memory": TIGHT}, 150),
    "memory.state_slots": ({"memory": TIGHT}, 3),
    "memory.state_dtype": ({}, "bfloat16"),
    "memory.oversized": ({"memory": LONG}, "fail"),
    "router.kind": ({"deployment": {"replicas": 2}}, "random"),
    "latency.RooflineLatency.moe_routing": ({}, "independent"),
    "latency.RooflineLatency.cuda_graphs": ({}, False),
    "latency.AffineLatency.prefill.base_ms": ({"latency": COSTS}, 6),
    "latency.AffineLatency.prefill.per_new_token_ms": ({"latency": COSTS}, 0.2),
    "latency.AffineLatency.compose": ({"latency": COSTS}, "max"),
    "latency.ProfileLatency.path": ({"latency": {"kind": "profile", "path": "measured.json"}}, "slower.json"),
    "latency.ProfileLatency.extrapolate": ({"latency": {"kind": "profile", "path": "narrow.json"}}, True),
    "commits.ObservedCommits.class": ({}, "math"),
    "commits.ObservedCommits.extrapolate": ({"decoding": {"kind": "two_tower", "gamma": 0.4}}, True),
    "commits.ProfileCommits.path": ({"commits": {"kind": "profile", "path": PROFILE}}, "other.json"),
    "commits.ProfileCommits.class": ({"commits": {"kind": "profile", "path": PROFILE}}, "code"),
    "commits.ProfileCommits.extrapolate": (
        {"commits": {"kind": "profile", "path": PROFILE}, "decoding": {"kind": "two_tower", "gamma": 0.4}}, True,
    ),
    "commits.ConstantCommits.tokens_per_step": ({"commits": {"kind": "constant", "tokens_per_step": 4}}, 2),
    "measurement.warm_up_s": ({}, 0.5),
    "measurement.for_s": ({}, 0.5),
    "slo.time_to_first_token_ms": ({}, 100),
    "slo.time_to_second_token_ms": ({}, 100),
    "slo.inter_token_latency_ms": ({}, 5),
    "slo.request_latency_ms": ({}, 1000),
    "cost.price_usd_per_hour": ({}, 0),
    "cost.power_w": ({}, 300),
    "cost.idle_power_w": ({}, 0),
} | {
    f"latency.AffineLatency.{pass_}.{cost}": ({"latency": COSTS, "decoding": KINDS[pass_]}, 7)
    for pass_ in KINDS
    for cost in ("base_ms", "per_seq_ms", "per_context_token_ms")
}  # fmt: skip


def options(model: type[BaseModel], prefix: str = ""):
    """Every leaf of the scenario's models but the kinds themselves."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        members = _models(field.rebuild_annotation())
        if (not members and name != "kind") or key == "router.kind":
            yield key
        for member in members:
            yield from options(member, f"{key}." + (f"{member.__name__}." if len(members) > 1 else ""))


def test_every_option_is_listed():
    same = ("workload.ClosedLoopWorkload", "LognormalLength")  # drawn as for synthetic load
    found = {key for key in options(Scenario) if not all(part in key for part in same)}
    found -= {
        key for key in found if "session_starts" in key and "PoissonArrivals" not in key
    }  # drawn as for synthetic load
    assert found | {"deployment.tensor_parallel"} == set(OPTIONS)  # a number, or one a tower


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_every_option_does_something(option, tmp_path):
    for name, changes in {"measured": {}, "slower": {"factor": 2}, "narrow": {"most": 4}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(measured_profile(**changes)))
    nano = json.loads((ROOT / "twotower_sim" / "presets" / "models" / "nemotron-3-nano-30b-a3b.json").read_text())
    for name, pattern in {"tiny": "M*-M*-", "other": "M*-M*-M*-M*-"}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(nano | {"hybrid_override_pattern": pattern}))
    (tmp_path / "shared.jsonl").write_text("".join(
        json.dumps({"timestamp": 900 * i, "input_length": 3000, "output_length": 20, "hash_ids": [1, 2, 3, 4, 5, i + 9]}) + "\n"
        for i in range(9)
    ))  # fmt: skip
    (tmp_path / "turns.jsonl").write_text("".join(
        json.dumps({"timestamp": 9 * i, "input_length": 300, "output_length": 20, "session_id": "a"}) + "\n" for i in range(9)
    ))  # fmt: skip
    (tmp_path / "damaged.jsonl").write_text(2 * '{"timestamp": 9, "input_length": 300, "output_length": 20}\n' + "{\n")
    sections, value = OPTIONS[option]
    sections = {"workload": BUSY} | sections
    if value == "../nemotron.json":
        value = "nemotron-3-super-120b-a12b"
        sections |= {"decoding": AR}
    assert outcome(sections, tmp_path) != outcome(changed(sections, option, value), tmp_path)


def outcome(sections: dict, base: Path) -> str:
    """All that a run gives and warns of, but not what it says of its scenario; or its error."""
    try:
        run, results = run_of(base, **sections)
    except InputError as error:
        return str(error)
    figures = summary(run, results)
    del figures["scenario"], figures["provenance"]
    return json.dumps(figures, default=float)


def changed(sections: dict, option: str, value: Any) -> dict:
    keys = [key for key in option.split(".") if not re.match("[A-Z]", key)]
    sections = json.loads(json.dumps(sections))
    defaults = Scenario.model_validate(sections).model_dump(by_alias=True)
    at, default = sections, defaults
    for key in keys[:-1]:
        default = default[key]
        at = at.setdefault(key, {})
        if "kind" in default:
            at.setdefault("kind", default["kind"])
    at[keys[-1]] = value
    return sections


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": "nemotron-3-nano-30b-a3b", "decoding": {"kind": "mock_ar"}}, "has one tower; decoding.kind mock_ar needs two"),
        ({"decoding": {"kind": "block_diffusion"}}, "decoding.block_size: found 32; commits were measured at 16"),
        (
            {"memory": {"prefix_cache": {"kind": "hybrid", "state_checkpoint_every": 1000}}},
            "memory.prefix_cache.state_checkpoint_every: found 1000; expected a multiple of memory.kv_block_tokens, 16",
        ),
        ({"workload": SHARED, "memory": {"kv_block_tokens": 48, "prefix_cache": {"kind": "attention"}}}, "of which it has to be a divisor"),
        (
            {"deployment": {"placement": {"kind": "colocated"}, "tensor_parallel": {"context": 1, "denoiser": 2}}},
            "deployment.tensor_parallel: found context 1, denoiser 2; colocated towers share their GPUs",
        ),
        ({"deployment": {"tensor_parallel": {"context": 1, "denoiser": 3}}}, "deployment.tensor_parallel: found 3; num_attention_heads"),
        ({"deployment": {"placement": {"kind": "pools", "link": "foo"}}}, "deployment.placement.link: found 'foo'; h100-sxm has nvlink"),
        (
            {"decoding": SPECULATIVE | {"drafter": {"kind": "model", "model": "nope"}}},
            "model 'nope' is neither a preset",
        ),
        (
            {"latency": {"kind": "affine", "prefill": {}, "decode": {}}, "decoding": MOCK},
            "latency.denoise: is missing; decoding.kind mock_ar needs it",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_explained(sections, said, tmp_path):
    (tmp_path / "shared.jsonl").write_text(
        json.dumps({"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}) + "\n"
    )
    with pytest.raises(InputError, match=re.escape(said)):
        prepare(Scenario.model_validate({"workload": synthetic()} | sections), tmp_path)
