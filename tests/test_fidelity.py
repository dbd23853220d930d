"""Errors of predictions, their parts and verdicts, and the passes behind them, on runs whose truth is known."""

import pytest
from conftest import synthetic
from profiles import measured_profile

from twotower_sim.fidelity import (
    HEADLINE,
    Error,
    RealRun,
    Validated,
    errors,
    pass_errors,
    predict,
    validated,
    verdict,
    with_recorded_rounds,
    worst,
)
from twotower_sim.plan import BlockPlans
from twotower_sim.profile import Profile
from twotower_sim.recorded import RecordedCommits, RoundLog
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import Run, prepare, simulate
from twotower_sim.validation_report import Report, as_json, markdown, panels

REAL = {
    "kind": "affine",
    "prefill": {"base_ms": 3, "per_new_token_ms": 0.02},
    "denoise": {"base_ms": 6, "per_seq_ms": 0.2},
    "extend": {"base_ms": 5, "per_seq_ms": 0.1},
    "decode": {"base_ms": 5, "per_seq_ms": 0.1},
}
WAYS = {
    "fdfo": {"decoding": {"kind": "two_tower"}},
    "lockstep": {"decoding": {"kind": "two_tower"}, "scheduler": {"policy": "lockstep", "max_num_seqs": 8}},
    "autoregressive": {"decoding": {"kind": "autoregressive"}},
}


def prepared(way: str, seed: int = 0, **more) -> Run:
    sections = {"workload": synthetic(60, 4.0), "latency": REAL, "scheduler": {"max_num_seqs": 8}} | WAYS[way] | more
    return prepare(Scenario.model_validate(sections | {"seed": seed}))


def pretended(way: str, slower: float = 1.0) -> RealRun:
    """A run of the simulator as if it had been real: its rounds as a log, every pass ``slower`` than the model says."""
    run = prepared(way, latency={
        name: {key: value * slower for key, value in cost.items()} if isinstance(cost, dict) else cost
        for name, cost in REAL.items()
    })  # fmt: skip
    run.may_be_fast = False
    model, log = run.latency, []

    class Logging:
        one_forward, side_by_side, extrapolated, host = False, False, model.extrapolated, model.host

        def round(self, *shape):
            return self.noted(shape, int(shape[0] > 0), model.round(*shape))

        def forwards(self, count, in_turn, *shape):
            return self.noted(shape[:5], count, model.forwards(count, in_turn, *shape))

        def noted(self, shape, forwards, cost):
            log.append(RoundLog(0, round(cost[2] * 1e9), *shape, forwards, *cost[:2]))
            return cost

    run.latency = Logging()
    found = predict(run)
    sizes = []
    if run.luck:
        steps = [run.luck.steps(request, 0) for request in range(len(run.requests))]
        sizes = [[[1] * (n - 1) + [17 - n] for n in blocks] for blocks in steps]
    return RealRun(found, log, sizes, run.records.units(), [], 1.0)


@pytest.mark.parametrize("way", WAYS)
def test_a_perfect_model_has_no_error(way):
    real = pretended(way)
    found = validated(lambda draw: prepared(way), [real, real], draws=2)
    assert found.strayed == 0
    assert verdict(found.recorded_errors, 0.0) == "confirmed"
    assert {error.middle for error in found.recorded_errors.values()} == {0.0}
    if way == "autoregressive":  # no luck
        assert found.expected_errors == found.beforehand_errors == found.recorded_errors
    assert all(error.predicted_s == pytest.approx(error.measured_s, abs=1e-6) for error in found.passes.values())
    assert sum(error.share for error in found.passes.values()) == pytest.approx(1)


@pytest.mark.parametrize("way", WAYS)
def test_a_slow_engine_is_an_error_of_the_latency_alone(way):
    """Passes that take a quarter longer than the model says: it is found in every kind of pass, and in no other part."""
    found = validated(lambda draw: prepared(way), [pretended(way, slower=1.25)], draws=1)
    assert found.strayed == 0
    assert found.passes.pop("host").measured_s == pytest.approx(0, abs=1e-6)  # rounds last whole nanoseconds
    for error in found.passes.values():
        assert error.predicted_s / error.measured_s == pytest.approx(0.8)
    parts = found.parts("request_latency.p50")
    assert parts["scheduling"] == parts["commits"] == 0
    assert parts["latency"] < -0.15
    assert verdict(found.recorded_errors, 0.1) == "refuted"


def test_a_machine_that_was_slow_is_an_error_of_the_machine_alone():
    """A run in which everything took a quarter longer, as its probes say."""
    real = pretended("fdfo", slower=1.25)._replace(probe_s=1.25).compared(1.0)
    assert real.slowness == 1.25
    found = validated(lambda draw: prepared("fdfo"), [real], draws=1)
    assert worst(found.recorded_errors) < 1e-6
    parts = found.parts("request_latency.p50")
    assert parts["machine"] < -0.15
    assert [parts[name] for name in ("scheduling", "latency", "commits")] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found.beforehand_errors["request_latency.p50"].middle == pytest.approx(parts["machine"])
    assert real.compared(None).slowness == 1


def test_other_commits_are_an_error_of_the_commits_alone():
    real = pretended("fdfo")

    def luckless(draw: int) -> Run:
        run = prepared("fdfo")
        law = run.luck.plans.law
        table = [[[1] * 16 for _ in range(0, tokens, 16)] for tokens in run.requests.output_tokens.tolist()]
        plans = BlockPlans(RecordedCommits(table, law.block_size), 0, run.requests.output_tokens)
        run.luck = type(run.luck)(run.luck.gammas, run.luck.base, [], plans, [plans])
        return run

    found = validated(luckless, [real], draws=3)
    parts = found.parts("request_latency.p50")
    assert parts["scheduling"] == parts["latency"] == 0
    assert parts["commits"] > 0.2
    assert found.luck["request_latency.p50"] == 0
    total = found.expected_errors["request_latency.p50"].middle
    assert sum(parts.values()) == pytest.approx(total)


def test_a_replay_of_other_rounds_strays():
    real = pretended("fdfo")
    run, rounds = with_recorded_rounds(prepared("fdfo", scheduler={"max_num_seqs": 2}), real)
    simulate(run)
    assert rounds.strayed > 0


def test_errors_are_relative_and_bounded_by_repetitions():
    measured = [{"a": 10.0, "b": 0.0}, {"a": 20.0, "b": 1.0}, {"a": 12.5, "b": 1.0}]
    assert errors([{"a": 15.0, "b": 1.0}] * 3, measured) == {"a": Error(pytest.approx(0.2), pytest.approx(-0.25), 0.5)}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Error(0.05, 0.01, 0.09), "confirmed"),
        (Error(0.05, 0.01, 0.12), "likely"),
        (Error(0.11, -0.01, 0.12), "doubtful"),
        (Error(0.15, 0.11, 0.2), "refuted"),
        (Error(-0.15, -0.2, -0.11), "refuted"),
        (Error(-0.15, -0.2, -0.05), "doubtful"),
    ],
)
def test_a_verdict_claims_no_more_than_the_repetitions_show(error, said):
    of = dict.fromkeys(HEADLINE, Error(0.0, 0.0, 0.0)) | {HEADLINE[1]: error}
    assert verdict(of, 0.1) == said
    assert worst(of) == abs(error.middle)


def test_shares_of_passes_sum_to_one():
    real = pretended("fdfo")
    found = pass_errors(prepared("fdfo").latency, [real], "two_tower", in_turn=False)
    assert set(found) == {"denoise", "extend", "prefill", "extend+prefill", "host"}
    assert sum(of.share for of in found.values()) == pytest.approx(1)
    assert sum(of.measured_s for of in found.values()) == pytest.approx(sum(log.end_ns for log in real.log) / 1e9)


def test_the_report_says_what_was_found(tmp_path):
    both = [validated(lambda draw, way=way: prepared(way), [pretended(way, 1.25)] * 2, draws=2) for way in WAYS]
    found = Report(
        both, Profile.model_validate(measured_profile()), "a machine", True, 0.12, "twotower-sim validate s.yaml"
    )
    text, data = markdown(found), as_json(found)
    assert "`twotower-sim validate s.yaml`" in text
    assert text.count("| refuted |") == len(both) + 2 * 2  # the autoregressive run draws nothing
    for scenario, plain in zip(both, data["scenarios"], strict=True):
        assert isinstance(scenario, Validated)
        assert plain["recorded_commits"]["worst"] == worst(scenario.recorded_errors)
        assert f"{scenario.recorded_errors['request_latency.p50']}" in text
    for (_, unit, measured, predicted), scenario in zip(panels(found), both, strict=True):
        assert unit == "ms"
        assert len(measured) == len(predicted) == len(scenario.run.requests)
        assert (measured > predicted).mean() > 0.9
