"""Fits to logs whose costs are known: what is found, what is said not to be, and a scenario that is wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import AFFINE, run_of, synthetic

from twotower_sim.errors import InputError
from twotower_sim.log_fit import HEADLINE, LogValidation, validate
from twotower_sim.log_replay import PASSES, Coefficients, Replay
from twotower_sim.log_report import PLAIN, validate_log
from twotower_sim.measurements import Measurements
from twotower_sim.pairs_plot import MOST_POINTS, SUFFIXES, check_plot, plot_pairs
from twotower_sim.readers.log import read_log
from twotower_sim.result import write_requests
from twotower_sim.scenario import AffineLatency, Scenario, load_scenario

TRUE = {
    "kind": "affine",
    "prefill": {"base_ms": 4, "per_new_token_ms": 0.03},
    "decode": {"base_ms": 8, "per_seq_ms": 0.15, "per_context_token_ms": 1e-4},
}
TOWERS = {
    "kind": "affine",
    "prefill": {"base_ms": 4, "per_new_token_ms": 0.03},
    "denoise": {"base_ms": 6, "per_seq_ms": 0.3, "per_context_token_ms": 2e-5},
    "extend": {"base_ms": 9, "per_seq_ms": 0.45, "per_context_token_ms": 3e-5},
}
IDLE, BUSY, NEARLY_SATURATED, TOO_MANY = 2.0, 6.0, 15.0, 40.0  # requests a second


def sections(rate_rps: float, kind="autoregressive", latency=TRUE, requests=200, **more) -> dict:
    load = synthetic(requests=requests, rate_rps=rate_rps, input_tokens=500, output_tokens=100)
    scheduler = {"scheduler": {"max_num_seqs": 256} | more.pop("scheduler", {})}
    return {"workload": load, "decoding": {"kind": kind}, "latency": latency} | scheduler | more


def log_of(tmp_path, **sections) -> Measurements:
    """Written and read as a log."""
    path = tmp_path / "requests.csv.gz"
    write_requests(path, run_of(**sections)[1].columns)
    return read_log(path).measurements


def noisy(log: Measurements, size: float) -> Measurements:
    """Times with independent relative errors."""
    waits, decodes = np.exp(np.random.default_rng(1).normal(0, size, (2, len(log))))
    first_ns = log.arrival_ns + np.rint((log.first_ns - log.arrival_ns) * waits).astype(np.int64)
    return replace(
        log, first_ns=first_ns, finish_ns=first_ns + np.rint((log.finish_ns - log.first_ns) * decodes).astype(int)
    )


def errors(found: LogValidation, latency: dict) -> dict[str, tuple[float, float]]:
    """By coefficient, the error of its logarithm and the standard error that is claimed."""
    fit, out = found.fit, {}
    for name, x, claimed in zip(fit.coefficients.names, fit.x, fit.standard_errors, strict=True):
        pass_, _, cost = name.partition(".")
        true = latency[pass_][cost] if cost else 1.5
        out[name] = float(x - np.log(true)), float(claimed)
    return out


@pytest.mark.parametrize("rate_rps", [IDLE, BUSY, NEARLY_SATURATED])
def test_costs_are_found_and_the_rest_is_predicted(tmp_path, rate_rps):
    asked = sections(rate_rps)
    found = validate(log_of(tmp_path, **asked), Scenario.model_validate(asked))
    assert found.cut == 100
    for name in HEADLINE:
        assert abs(found.held_out[name].error) < 0.03, name
    assert found.verdict.startswith(("confirmed", "likely"))
    assert not found.fit.failures
    sure = 0
    for name, (error, claimed) in errors(found, TRUE).items():
        assert abs(error) < max(0.1, 4 * claimed), name
        if claimed < 0.025:
            assert abs(error) < 0.1, name
            sure += 1
        assert (claimed > 0.3) == (name in found.fit.unidentified)
    assert sure >= (4 if rate_rps == IDLE else 1)


def test_two_towers(tmp_path):
    asked = sections(BUSY, "two_tower", TOWERS)
    found = validate(log_of(tmp_path, **asked), Scenario.model_validate(asked))
    for name in HEADLINE:
        assert abs(found.held_out[name].error) < 0.03, name
    for name, (error, claimed) in errors(found, TOWERS).items():
        assert abs(error) < max(0.1, 4 * claimed) or name in found.fit.unidentified, name
    assert abs(errors(found, TOWERS)["denoise.base_ms"][0]) < 0.1


def test_noise_widens_what_is_claimed(tmp_path):
    asked = sections(BUSY)
    log = noisy(log_of(tmp_path, **asked), 0.2)
    found = validate(log, Scenario.model_validate(asked))
    for name, (error, claimed) in errors(found, TRUE).items():
        assert abs(error) < 4 * claimed or name in found.fit.unidentified, name
    assert 0.15 < found.fit.rms["time from the first token to the last"] < 0.25
    assert "decode.per_context_token_ms" in found.fit.unidentified
    of = found.held_out["time_to_first_token.avg"]
    low, high = of.interval
    assert low < of.error < high
    assert high - low > 0.02


def test_a_wrong_scenario_is_refuted(tmp_path):
    """The engine had 64 seats, all taken; the scenario says 16."""
    asked = sections(TOO_MANY, scheduler={"max_num_seqs": 64})
    log = log_of(tmp_path, **asked)
    wrong = Scenario.model_validate(sections(TOO_MANY, scheduler={"max_num_seqs": 16}))
    found = validate(log, wrong)
    assert abs(found.held_out[found.worst].error) > 0.3
    assert found.verdict.startswith("refuted")
    right = validate(log, Scenario.model_validate(asked))
    assert abs(right.held_out[right.worst].error) < 0.1


def test_times_that_have_nothing_to_do_with_the_load_are_not_explained(tmp_path):
    log = log_of(tmp_path, **sections(BUSY, requests=100))
    times_ns = np.random.default_rng(0).lognormal(20, 1.5, (2, len(log))).astype(np.int64)
    log = replace(log, first_ns=log.arrival_ns + times_ns[0], finish_ns=log.arrival_ns + times_ns.sum(axis=0))
    found = validate(log, Scenario.model_validate(sections(BUSY)))
    assert any("the fit explains" in failure or "did not converge" in failure for failure in found.fit.failures)
    assert all(failure in found.verdict and failure in found.warnings for failure in found.fit.failures)
    assert not found.verdict.startswith("confirmed")


def test_a_log_without_first_tokens_is_fitted_to_latencies(tmp_path):
    asked = sections(BUSY)
    log = log_of(tmp_path, **asked)
    found = validate(replace(log, first_ns=np.full(len(log), -1)), Scenario.model_validate(asked))
    assert "time_to_first_token.avg" not in found.held_out
    assert abs(found.held_out[found.worst].error) < 0.03
    assert any(warning.startswith("200 requests do not say when their first token came") for warning in found.warnings)


def test_the_same_log_gives_the_same_fit(tmp_path):
    asked = sections(NEARLY_SATURATED, requests=80)
    log = log_of(tmp_path, **asked)
    first, second = (validate(log, Scenario.model_validate(asked)) for _ in range(2))
    assert first.fit.x.tolist() == second.fit.x.tolist()
    assert first.held_out == second.held_out


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_too_few_requests(tmp_path, share):
    log = log_of(tmp_path, **sections(BUSY, requests=100))
    with pytest.raises(InputError, match="found 100 requests, of which .* to fit; expected at least 20 to fit and 20"):
        validate(log, Scenario.model_validate(sections(BUSY)), share=share)


# ---------------------------------------------------------------------- replay


@pytest.mark.parametrize("kind", PASSES)
def test_a_replay_is_the_run_that_was_logged(tmp_path, kind):
    costs = AFFINE | {"draft": {"base_ms": 1, "per_seq_ms": 0.1, "per_context_token_ms": 1e-5}}
    decoding = {"kind": kind} | ({"acceptance": 0.6} if kind == "speculative" else {})
    decoding |= {"block_size": 16} if kind == "block_diffusion" else {}
    asked = {"workload": synthetic(requests=60), "decoding": decoding, "latency": costs}
    log = log_of(tmp_path, **asked)
    replay, of = Replay(log, Scenario.model_validate(asked), Path()), Coefficients(PASSES[kind], "free")
    parts = [value for name in ("prefill", *PASSES[kind]) for value in costs[name].values()]
    predicted = replay.predict(of, np.log(parts))
    assert np.abs(predicted.finish_ns - predicted.arrival_ns - (log.finish_ns - log.arrival_ns)).max() < 1e6
    slopes = replay.slopes(of, np.log(parts))
    busy = slopes[2].sum(axis=1)  # seconds of passes within each request's time
    assert (busy <= predicted.latency_s + 1e-6).all()
    assert np.allclose(slopes[0] + slopes[1], slopes[2])
    assert busy.sum() > 0.9 * predicted.latency_s.sum()


def test_slopes_are_those_of_simulations_where_requests_do_not_meet():
    """One at a time, no batch changes, and differences of simulations are smooth."""
    at_ns = np.arange(30) * 10**11
    log = Measurements(at_ns, at_ns + 10**8, at_ns + 10**9, np.arange(30) * 20 + 50, np.arange(30) * 3 + 40)
    for kind, latency in (("autoregressive", TRUE), ("two_tower", TOWERS)):
        replay = Replay(log, Scenario.model_validate(sections(1, kind, latency)), Path())
        of = Coefficients(PASSES[kind], "factor" if kind == "two_tower" else "equal")
        x, step = np.log([4, 0.03, 8, 0.15, 1e-4, 1.5][: len(of.names)]), 1e-3
        slopes = replay.slopes(of, x)
        for index, move in enumerate(step * np.eye(len(x))):
            above, below = replay.predict(of, x + move), replay.predict(of, x - move)
            for row, name in enumerate(("ttft_s", "decode_s", "latency_s")):
                assert slopes[row, :, index] == pytest.approx(
                    (getattr(above, name) - getattr(below, name)) / (2 * step), rel=0.01, abs=3e-5
                )


def test_costs_of_a_second_pass():
    factor, free, equal = (Coefficients(("denoise", "extend"), second) for second in ("factor", "free", "equal"))
    x = np.log([4, 0.03, 6, 0.3, 2e-5, 1.5])
    for of, of_x in ((factor, x), (free, factor.parts @ x)):
        assert len(of.names) == len(of_x) == of.bounds.shape[1]
        told = of.latency(of_x, None).model_dump()
        assert {name: told[name] for name in TOWERS} == TOWERS | {
            name: pytest.approx(TOWERS[name]) for name in ("prefill", "denoise", "extend")
        }
    assert equal.latency(x[:5], None).extend == equal.latency(x[:5], None).denoise
    given = AffineLatency.model_validate(TOWERS | {"compose": "max", "transfer": {"base_ms": 1}})
    kept = factor.latency(x, given)
    assert (kept.compose, kept.transfer) == ("max", given.transfer)


def test_requests_that_do_not_fit_are_left_out_where_the_scenario_says_so(tmp_path):
    asked = sections(BUSY, requests=80)
    log = log_of(tmp_path, **asked)
    log.input_tokens[3] = 50_000
    small = {"memory": {"kv_blocks": 1000, "oversized": "fail"}}
    with pytest.raises(InputError, match=r"request 3 \(50000 input"):
        validate(log, Scenario.model_validate(asked | small))
    small["memory"]["oversized"] = "reject"
    found = validate(log, Scenario.model_validate(asked | small))
    assert len(found.measured) == 79
    assert any("1 requests can never fit" in warning for warning in found.warnings)


# ---------------------------------------------------------------------- report


def test_report(tmp_path, capsys):
    log_of(tmp_path, **sections(BUSY, requests=80))
    validate_log(
        tmp_path / "requests.csv.gz",
        None,
        ["scheduler.max_num_seqs=128"],
        tmp_path / "out",
        0.6,
        0.05,
        tmp_path / "p.svg",
    )
    told = json.loads((tmp_path / "out" / "log_validation.json").read_text())
    assert told["requests"] == {"fitted": 48, "predicted": 32}
    assert told["scenario"]["scheduler"]["max_num_seqs"] == 128
    assert len(told["pairs"]["rows"]) == 80
    assert set(HEADLINE) <= told["figures"]["predicted"].keys()
    shown = capsys.readouterr().out
    assert f"Verdict     {told['verdict']}" in shown
    assert "columns, 48 requests fitted, 32 predicted" in shown
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_a_log_that_cannot_be_used_leaves_nothing(tmp_path):
    (tmp_path / "log").write_text("hello")
    with pytest.raises(InputError, match="not a known trace format"):
        validate_log(tmp_path / "log", None, [], tmp_path / "out", 0.5, 0.05, None)
    assert not (tmp_path / "out").exists()


def test_the_plain_scenario_is_autoregressive_with_usual_limits():
    plain = load_scenario(PLAIN)
    assert (plain.decoding.kind, plain.deployment.replicas) == ("autoregressive", 1)
    assert (plain.scheduler.max_num_seqs, plain.scheduler.max_num_batched_tokens) == (256, 8192)


def test_reading_a_log_needs_no_scipy():
    code = "import sys, twotower_sim.log_report; print('scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------------- plot


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_plot_of_pairs(tmp_path, suffix):
    measured = np.append(np.linspace(1, 1000, 3 * MOST_POINTS), [0.0, np.nan])
    path = tmp_path / "staged"
    plot_pairs(
        [("title of it", "ms", measured, measured * 1.1), ("empty", "s", measured[:0], measured[:0])], path, suffix
    )
    raw = path.read_bytes()
    if suffix == ".png":
        assert raw.startswith(b"\x89PNG")
        return
    text = raw.decode()
    assert "title of it" in text
    assert "2 are 0 or unknown" in text
    assert f"{MOST_POINTS:,} of {len(measured):,} requests" in text
    assert "<script src=" not in text  # offline


def test_plot_says_what_it_needs(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"found suffix '.pdf'; allowed: .html, .png, .svg"):
        check_plot(tmp_path / "picture.pdf")
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(InputError, match=r"--plot needs altair: pip install 'twotower-sim\[plot\]'"):
        check_plot(tmp_path / "picture.png")
