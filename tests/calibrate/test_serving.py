"""The real engine: the tokens of plain generation whatever the scheduling, and rounds that the simulator replays."""

import pytest
from small_model import CONFIG, prompt, small_model

from calibrate.generate import autoregressive, two_tower
from calibrate.serving import Clock, Slots
from calibrate.validation import serve_run
from twotower_sim.fidelity import predict, with_recorded_rounds
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import prepare

REQUESTS, GAMMA = 9, 0.02  # random weights are never sure
FREE = {
    "kind": "affine",
    "prefill": {"base_ms": 1},
    "denoise": {"base_ms": 1},
    "extend": {"base_ms": 1},
    "decode": {"base_ms": 1},
}
WAYS = {
    "fdfo": {},
    "three steps a round": {"scheduler": {"steps_per_round": 3}},
    "lockstep": {"scheduler": {"policy": "lockstep"}},
    "one extend a round": {"scheduler": {"max_extends_per_round": 1}},
    "prompts first": {"scheduler": {"prefill": "first"}},
    "prompts last": {"scheduler": {"prefill": "last"}},
    "whole prompts, shortest first": {"scheduler": {"chunked_prefill": False, "admission": "shortest_prompt", "max_num_batched_tokens": 192}},
    "little memory": {"memory": {"kv_blocks": 12}},
    "little memory, lockstep": {"memory": {"kv_blocks": 12}, "scheduler": {"policy": "lockstep"}},
    "closed loop": {"workload": {"kind": "closed_loop", "concurrency": 3, "think_time_s": 0.002}},
    "autoregressive": {"decoding": {"kind": "autoregressive"}},
    "autoregressive, prompts first": {"decoding": {"kind": "autoregressive"}, "scheduler": {"prefill": "first"}},
    "autoregressive, little memory": {"decoding": {"kind": "autoregressive"}, "memory": {"kv_blocks": 11}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return small_model({"eos_token_id": None})


def scenario(tmp_path, change: dict) -> Scenario:
    config = tmp_path / "config.json"
    config.write_text(str(CONFIG | {"towers": 2, "chunk_size": 16, "max_position_embeddings": 4096}).replace("'", '"'))
    lengths = {
        name: {"kind": "lognormal", "mean": mean, "cv": 0.6, "max": 100}
        for name, mean in (("input_tokens", 40), ("output_tokens", 50))
    }
    arrivals = {} if change.get("workload") else {"arrivals": {"kind": "poisson", "rate_rps": 50}}
    sections = {
        "workload": {"kind": "synthetic", "requests": REQUESTS, **lengths, **arrivals} | change.get("workload", {}),
        "model": str(config),
        "decoding": change.get("decoding", {"kind": "two_tower", "gamma": GAMMA}),
        "deployment": {"placement": {"kind": "colocated"}},
        "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 80} | change.get("scheduler", {}),
        "memory": change.get("memory", {}),
        "latency": FREE,
        "commits": {"kind": "constant", "tokens_per_step": 4},
    }  # fmt: skip
    return Scenario.model_validate(sections)


@pytest.fixture(params=WAYS, ids=lambda name: name.replace(" ", "-"))
def served(request, tmp_path, model):
    """A way, its scenario's preparation, its prompts, and the real run of it."""
    asked = scenario(tmp_path, WAYS[request.param])
    run = prepare(asked)
    prompts = [prompt(int(length), seed) for seed, length in enumerate(run.requests.input_tokens)]
    finished: list[int] = []
    real = serve_run(run, model, prompts, finished.append)
    assert sorted(finished) == list(range(REQUESTS))
    return request.param, lambda: prepare(asked), prompts, real


def test_every_request_gets_what_it_would_get_alone(served, model):
    way, again, prompts, real = served
    outputs = again().requests.output_tokens.tolist()
    for request, (ids, tokens) in enumerate(zip(prompts, outputs, strict=True)):
        if "autoregressive" in way:
            assert real.text[request] == autoregressive(model, [ids], tokens)[0].tokens
        else:
            alone = two_tower(model, [ids], tokens, GAMMA, 16)[0]
            assert real.text[request] == alone.tokens
            assert real.sizes[request] == alone.blocks


def test_the_simulator_replays_its_rounds_exactly(served):
    """Recorded commits and durations leave nothing to differ: one scheduler, and one way to measure."""
    _, again, _, real = served
    run, rounds = with_recorded_rounds(again(), real)
    replayed = predict(run)
    assert rounds.strayed == 0
    assert rounds.asked == len(real.log)
    assert replayed.figures == real.outcome.figures
    for mine, theirs in zip(vars(replayed.columns).values(), vars(real.outcome.columns).values(), strict=True):
        assert (mine == theirs).all()


def test_preemption_was_tried(tmp_path, model):
    for way in ("little memory", "autoregressive, little memory", "little memory, lockstep"):
        run = prepare(scenario(tmp_path, WAYS[way]))
        serve_run(run, model, [prompt(int(length)) for length in run.requests.input_tokens], lambda request: None)
        assert run.engines[0].preemptions, way


def test_a_replay_of_something_else_strays(tmp_path, model):
    run = prepare(scenario(tmp_path, {}))
    real = serve_run(run, model, [prompt(int(n)) for n in run.requests.input_tokens], lambda request: None)
    blocks = [[[1] * sum(block) for block in request] for request in real.sizes]  # a token a step
    other, rounds = with_recorded_rounds(prepare(scenario(tmp_path, {})), real._replace(sizes=blocks))
    predict(other)
    assert rounds.strayed > 0


def test_gammas_by_class(tmp_path, model):
    """Every request has its own threshold in one batch."""
    change = {"decoding": {"kind": "two_tower", "gamma": GAMMA, "gamma_by_class": {"sure": 0.9}}}
    change["workload"] = {"classes": {"sure": 0.5, "bold": 0.5}, "arrivals": {"kind": "poisson", "rate_rps": 50}}
    run = prepare(scenario(tmp_path, change))
    prompts = [prompt(int(length)) for length in run.requests.input_tokens]
    real = serve_run(run, model, prompts, lambda request: None)
    for request, level in enumerate(run.luck.base.tolist()):
        alone = two_tower(
            model, [prompts[request]], int(run.requests.output_tokens[request]), run.luck.gammas[level], 16
        )
        assert real.sizes[request] == alone[0].blocks
    assert {GAMMA, 0.9} == set(run.luck.gammas)


def test_slots_are_given_and_taken():
    slots = Slots(100, 16, 2)
    assert slots.admit(7, 10) == slots.admit(8, 10) == 0
    slots.grow(7, 20)
    assert slots.of[7] != slots.of[8]
    taken = slots.of[7]
    slots.release(7)
    assert slots.used == 0
    slots.admit(9, 10)
    assert slots.of == {8: slots.of[8], 9: taken}


def test_a_clock_waits():
    clock = Clock()
    clock.wait_until(3_000_000)
    assert clock.now_ns >= 3_000_000
    clock.wait_until(0)
