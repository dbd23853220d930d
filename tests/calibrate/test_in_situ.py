"""Engine figures: whatever an engine adds to its passes is found again, at whatever speed the machine was."""

import numpy as np
import pytest
from profiles import measured_profile
from small_model import prompt, small_model

from calibrate.in_situ import PAUSE_NS, PAUSES, Loop, engine_figures, loops
from calibrate.serving import Clock, Probe
from calibrate.shapes import Point, Shapes, contexts_of
from twotower_sim.latency import Host, Latency
from twotower_sim.measured import Hull, autoregressive_measured, two_tower_measured
from twotower_sim.profile import MeasuredLatency, Profile
from twotower_sim.recorded import RoundLog

ALONE: MeasuredLatency = Profile.model_validate(measured_profile(split=False)).latency
BATCHES = ALONE.passes["denoise"].axes["sequences"]
HOST_S, WAKE_S = 2e-4, 3e-3
LONGER = {"denoise": 1.1, "extend": 1.3, "prefill": 1.2, "decode": 1.05}
MIXED = 1.15  # a forward of both, over what its parts take inside the engine


def model(kind: str) -> Latency:
    make = two_tower_measured if kind == "two_tower" else autoregressive_measured
    block = (16, False) if kind == "two_tower" else ()
    return make(ALONE, Hull("grid", extrapolate=True), *block, Host(), 256, True)


def shapes(kind: str):
    """Rounds of every kind at every batch."""
    prompt = (64, 64 * 65 // 2, 64, 1)
    for n in BATCHES:
        for prefill in ((0, 0, 0, 0), prompt):
            if kind == "two_tower":
                yield from ((n, 100 * n, 0, 0, prefill), (0, 0, n, 100 * n, prefill), (n, 100 * n, n, 90 * n, prefill))
            else:
                yield n, 100 * n, 0, 0, prefill
    yield 0, 0, 0, 0, prompt


def engine_s(kind: str, shape) -> tuple[float, float]:
    """Seconds of a round's passes inside an engine that takes longer by LONGER and MIXED."""
    n, context, n_extend, extend_context, prefill = shape
    of, none = model(kind), (0, 0, 0, 0)
    denoiser_s = of.round(n, context, 0, 0, none)[0] * LONGER["denoise"] if kind == "two_tower" else 0.0
    shared = (0, 0, n_extend, extend_context) if kind == "two_tower" else (n, context, 0, 0)
    name = "extend" if kind == "two_tower" else "decode"
    alone_s = of.round(*shared, none)[1] if shared[0] + shared[2] else 0.0
    prompts_s = of.round(0, 0, 0, 0, prefill)[1] if prefill[0] else 0.0
    parts = alone_s * LONGER[name], prompts_s * LONGER["prefill"]
    if not all(parts):
        return denoiser_s, sum(parts)
    rho = (of.round(*shared, prefill)[1] - max(alone_s, prompts_s)) / min(alone_s, prompts_s)
    return denoiser_s, MIXED * (max(parts) + rho * min(parts))


def loop_of(kind: str, slow: float, idle: bool = False) -> Loop:
    """A loop on a machine that is slower than when the grids were measured; ``idle``: before every round."""
    log, end_ns = [RoundLog(0, 1, 1, 0, 0, 0, (0, 0, 0, 0), 1, 1e-9, 0.0)], 1
    for shape in list(shapes(kind)) * 10:
        denoiser_s, context_s = (slow * s for s in engine_s(kind, shape))
        start_ns = end_ns + (10**6 if idle else 0)
        round_s = denoiser_s + context_s + slow * (HOST_S + (WAKE_S if idle else 0))
        end_ns = start_ns + round(round_s * 1e9)
        log.append(RoundLog(start_ns, end_ns, *shape, 1, denoiser_s, context_s))
    return Loop(kind, log, slow * 6e-3)


@pytest.mark.parametrize("slow", [1.0, 1.3])
def test_what_an_engine_adds_is_found(slow):
    """Also where some loops were slower: probes tell."""
    kinds = ("two_tower", "autoregressive")
    busy = [loop_of(kind, speed) for kind in kinds for speed in (slow, 1.0)]
    found = engine_figures(ALONE, [*busy, *(loop_of(kind, 1.0, idle=True) for kind in kinds)], 16)
    for name, ratio in LONGER.items():
        assert found.ratios[name] == pytest.approx([ratio] * len(ALONE.grids[name].axes["sequences"]), rel=1e-5), name
    for name in ("extend+prefill", "decode+prefill"):
        assert found.ratios[name] == pytest.approx([MIXED] * len(BATCHES), rel=1e-5), name
    assert found.probe_s == 6e-3
    assert found.host_s == pytest.approx(HOST_S, rel=1e-3)
    assert found.wake_s == pytest.approx(WAKE_S, rel=1e-3)


def test_the_simulator_meets_the_engine_with_its_figures():
    kinds = ("two_tower", "autoregressive")
    figures = engine_figures(ALONE, [loop_of(kind, 1.0) for kind in kinds], 16)
    inside = ALONE.model_copy(update={"engine": figures})
    of = two_tower_measured(inside, Hull("grid", extrapolate=True), 16, False, Host(), 256, True)
    for shape in shapes("two_tower"):
        assert of.round(*shape)[:2] == pytest.approx(engine_s("two_tower", shape), rel=1e-5)


def test_loops_of_a_model():
    """Both ways to decode at every batch, and pauses that idle."""
    small = small_model({"eos_token_id": None})
    found = loops(small, Shapes([1, 3], [0, 32], [16, 32], [16]), 0.02, [prompt(50)], graphs=True)
    assert [(loop.kind, max(log.n + log.n_extend for log in loop.log)) for loop in found] == [
        (kind, users) for kind in ("two_tower", "autoregressive") for users in (1, 3, 1)
    ]
    for loop in found[2::3]:
        idle = [b.start_ns - a.end_ns for a, b in zip(loop.log, loop.log[1:], strict=False) if b.start_ns > a.end_ns]
        assert idle == [PAUSE_NS] * (PAUSES - 1)
    assert all(log.end_ns > log.start_ns and log.denoiser_s >= 0 for loop in found for log in loop.log)


def test_a_probe_takes_none_of_the_clock():
    probe, clock = Probe(small_model(), every_ns=0), Clock()
    for _ in range(5):
        probe.take(clock)
    assert len(probe.seconds) == 5
    assert clock.now_ns < sum(probe.seconds) * 1e9
    assert probe.mean_s == pytest.approx(np.mean(probe.seconds))
    late = Probe(small_model(), every_ns=10**12)
    late.take(clock)
    late.take(clock)
    assert len(late.seconds) == 1


def test_contexts_of_a_point_are_spread_around_their_mean():
    for n in (1, 2, 5, 16):
        of = contexts_of(Point("decode", (n, 160)), 0)
        assert len(of) == n
        assert np.mean(of) == pytest.approx(160, abs=1)
        assert n == 1 or (of[0] < 160 < of[-1] < 320)
    assert contexts_of(Point("extend+prefill", (2, 16)), 90) == [45, 135]
