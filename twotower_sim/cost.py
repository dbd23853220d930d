"""What the GPUs of a run did with their time, and what that cost: money and energy.

From the first arrival to the last finish the time of all GPUs has three parts, which add up to it:

- computing: they run a pass, all GPUs of a tower together;
- waiting: their replica has requests, and they run none: for the other tower, for a transfer, or for the host (which
  also looks up drafts in the text so far);
- idle: their replica has no requests, or the host wakes.

Energy is modelled, and of GPUs alone: ``power_w``, their rated power, while they compute, and ``idle_power_w``
otherwise. Decode, which memory bounds, draws less than the former, so that this is an upper bound: an H200 was measured
to decode at 137 to 300 of its 700 W (arXiv 2605.11999).
"""

from typing import NamedTuple

from twotower_sim.gpu import Gpu
from twotower_sim.scenario import NgramDrafter, Speculative
from twotower_sim.simulation import Run

HOUR_NS = 3600 * 10**9


class GpuTime(NamedTuple):
    """Nanoseconds, of all GPUs together."""

    computing: int
    waiting: int
    idle: int


def gpu_time(run: Run, duration_ns: int) -> GpuTime:
    present_ns = run.gpus // len(run.engines) * sum(engine.busy_ns for engine in run.engines)
    computing_ns = min(_computing_ns(run), present_ns)  # rounds last whole nanoseconds, their passes may not
    return GpuTime(computing_ns, present_ns - computing_ns, run.gpus * duration_ns - present_ns)


def _computing_ns(run: Run) -> int:
    scenario, engines, host = run.scenario, run.engines, run.latency.host
    context, denoiser = scenario.deployment.degrees
    context_s, other_s = sum(sum(of.context_s) for of in engines), sum(of.denoiser_s for of in engines)
    if scenario.split:
        return round((context * context_s + denoiser * other_s) * 1e9)
    if run.latency.side_by_side and other_s:  # at once on the same GPUs: hidden host work is not told apart
        host_s = 0.0 if host.hidden else host.seconds
        return context * sum(of.busy_ns - round(of.rounds * host_s * 1e9) for of in engines)
    decoding = scenario.decoding
    on_host = isinstance(decoding, Speculative) and isinstance(decoding.drafter, NgramDrafter)
    return round(context * (context_s + (not on_host) * other_s) * 1e9)


def cost_of(gpu: Gpu, time: GpuTime, output_tokens: int) -> dict[str, float | None]:
    """At the GPU's price and power; None where these are not known."""
    computing, waiting, idle = (ns / HOUR_NS for ns in time)
    hours, millions = computing + waiting + idle, output_tokens / 1e6
    usd = None if gpu.price_usd_per_hour is None else hours * gpu.price_usd_per_hour
    kwh = None
    if gpu.power_w is not None and gpu.idle_power_w is not None:
        kwh = (computing * gpu.power_w + (waiting + idle) * gpu.idle_power_w) / 1e3
    return {
        "gpu_hours": hours,
        "gpu_hours_computing": computing,
        "gpu_hours_waiting": waiting,
        "gpu_hours_idle": idle,
        "usd": usd,
        "usd_per_million_output_tokens": None if usd is None else usd / millions,
        "energy_kwh": kwh,
        "kwh_per_million_output_tokens": None if kwh is None else kwh / millions,
    }
