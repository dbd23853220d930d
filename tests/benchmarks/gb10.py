"""Two DGX Sparks, one tower on each, against what was observed on them, as a report; not part of CI.

.venv/bin/python tests/benchmarks/gb10.py GB10_BF16_JSON > reports/gb10.md
"""

import json
import sys
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np

from twotower_sim.admission import Fcfs
from twotower_sim.engine import FOREVER_NS, Engine
from twotower_sim.gpu import Gpu, load_gpu
from twotower_sim.latency import Latency
from twotower_sim.luck import OBSERVED
from twotower_sim.model import load_tower
from twotower_sim.profile import load_profile
from twotower_sim.records import Records
from twotower_sim.replica import Limits
from twotower_sim.roofline import Deployment, autoregressive_roofline, two_tower_roofline
from twotower_sim.routing import observed_routing
from twotower_sim.schedule import BlockSchedule, Schedule, Sequence, TokenSchedule

BLOCK, PROMPT = 16, 15  # tokens; prompts were of 5 to 25
LIMITS = Limits(1, 8192, 1 << 20, 16, 1)


def latencies(gpu: Gpu, link: str) -> tuple[Latency, Latency]:
    """Of eager two-tower rounds with a link between the towers, and of autoregressive rounds on one of the GPUs."""
    tower = load_tower("nemotron-twotower-30b-a3b", Path())
    figures = load_profile(OBSERVED).routing
    assert figures is not None
    routing = observed_routing(figures.model_dump())
    apart = Deployment(gpu, link=gpu.links[link], cuda_graphs=False)
    alone = Deployment(gpu, cuda_graphs=False)
    return (
        two_tower_roofline(tower, apart, routing, BLOCK, 1, 8192),
        autoregressive_roofline(tower, alone, routing, 1, 8192),
    )


def generate_s(latency: Latency, schedule: Schedule, tokens: int, plan: list[int] | None) -> float:
    """Seconds from the end of prefill to the last token of one request on an idle engine."""
    records = Records(1)
    engine = Engine(0, latency, schedule, LIMITS, Fcfs(), records, schedule.ticks(tokens))
    engine.submit(Sequence(0, PROMPT, tokens, plan), 0)
    engine.advance(FOREVER_NS)
    return (records.finish_ns[0] - records.prefilled_ns[0]) / 1e9


def plan_of(nfe: int, tokens: int) -> list[int]:
    """Ticks of the extend passes when ``nfe`` denoise passes spread evenly over the blocks."""
    blocks = -(-tokens // BLOCK)
    steps = [nfe * (b + 1) // blocks - nfe * b // blocks for b in range(blocks)]
    return [sum(steps[: b + 1]) + b for b in range(blocks)]


def two_tower_s(latency: Latency, row: dict) -> float:
    schedule = BlockSchedule(16, BLOCK, 64)
    return generate_s(latency, schedule, row["tokens"], plan_of(row["nfe"], row["tokens"]))


def autoregressive_s(latency: Latency, row: dict) -> float:
    return generate_s(latency, TokenSchedule(16), row["tokens"], None)


@cache
def sparks(gap_us: float) -> tuple[Latency, Latency]:
    """Latencies over the network, at all of the memory's bandwidth and with ``gap_us`` between two kernels."""
    gpu = load_gpu("gb10", Path())
    efficiency = {"memory": 1.0, "kernel_gap_us": gap_us, "kernel_launch_us": 0.0}
    return latencies(gpu.model_copy(update={"efficiency": gpu.reached.model_copy(update=efficiency)}), "network")


SHARE, GAP, START = range(3)


def parts_s(row: dict) -> np.ndarray:
    """What of a row scales with 1 / the SHARE of bandwidth reached, with the microseconds of GAP between two kernels, and
    with the seconds of START before an autoregressive row's first token (3,). At batch 1 every pass is bound by memory,
    so they add up."""

    def seconds(gap_us: float) -> float:
        two_tower, autoregressive = sparks(gap_us)
        return two_tower_s(two_tower, row) if "nfe" in row else autoregressive_s(autoregressive, row)

    bytes_s = seconds(0.0)
    return np.array([bytes_s, seconds(1.0) - bytes_s, "nfe" not in row])


def fit(rows: list[dict], *numbers: int) -> np.ndarray:
    """1 / share of bandwidth, us between kernels, seconds before the first token (3,): of these ``numbers`` those of
    least relative error (one alone: the median), the others 0."""
    relative = np.array([parts_s(row)[list(numbers)] / row["gen_s"] for row in rows])
    found = np.zeros(3)
    if len(numbers) == 1:
        found[numbers[0]] = 1 / median(relative[:, 0])
    else:
        found[list(numbers)] = np.linalg.lstsq(relative, np.ones(len(rows)), rcond=None)[0]
    return found


def read(path: Path) -> tuple[list[dict], list[dict]]:
    """Two-tower rows, and the autoregressive rows of the same tags; each list's first, a cold warm-up, is left out."""
    seen = json.loads(path.read_text())
    diffusion, baseline = (
        [row for row in seen[mode] if row["tag"] != "warmup"]
        for mode in ("two_tower_split", "autoregressive_context_tower")
    )
    assert [row["tag"] for row in diffusion] == [row["tag"] for row in baseline]
    return diffusion, baseline


def main() -> None:
    diffusion, baseline = read(Path(sys.argv[1]))
    one = fit(baseline, SHARE)
    print("# Two DGX Sparks (GB10), one tower on each: predicted beside observed\n")
    print(
        "Observed by github drowzeys/Keys-NVIDIA-Two-Tower-Diffusion--dual-dgx-spark: BF16, eager, batch 1, gamma 0.8, T 16, 200G\n"
        "between the nodes; the first row of each list, a cold warm-up, is left out. Predicted by the roofline on GB10 with the\n"
        "NFE of each row, in two ways:\n\n"
        f"- **A**: one number is fitted, to the autoregressive rows alone: that engine reaches {1 / one[0]:.0%} of the memory's\n"
        "  bandwidth (the preset assumes 92 %). All two-tower rows are predictions.\n"
        "- **B**: two numbers, that share and the time between two kernels, fitted to all other rows: each two-tower row is left\n"
        "  out of the fit that predicts it.\n\n"
        "`python tests/benchmarks/gb10.py GB10_BF16_JSON` made this page.\n"
    )
    print("| row | tokens | NFE | AR tok/s | A | two-tower tok/s | A | error | B | error | x AR | A | B |")
    print("|" + " --- |" * 13)
    errors: dict[str, list[float]] = {"AR, A": [], "two towers, A": [], "two towers, B": []}
    right = 0
    for two, ar in zip(diffusion, baseline, strict=True):
        others = baseline + [row for row in diffusion if row is not two]
        both = fit(others, SHARE, GAP)
        a, b = (two["tokens"] / (parts_s(two) @ numbers) for numbers in (one, both))
        alone, alone_b = (ar["tokens"] / (parts_s(ar) @ numbers) for numbers in (one, both))
        for name, error in zip(
            errors, (alone / ar["tok_s"] - 1, a / two["tok_s"] - 1, b / two["tok_s"] - 1), strict=True
        ):
            errors[name].append(abs(error))
        ratio = two["tok_s"] / ar["tok_s"]
        right += (a / alone > 1) == (b / alone_b > 1) == (ratio > 1)
        print(
            f"| {two['tag']} | {two['tokens']} | {two['nfe']} | {ar['tok_s']:.2f} | {alone:.2f} | {two['tok_s']:.2f} | {a:.2f} "
            f"| {a / two['tok_s'] - 1:+.1%} | {b:.2f} | {b / two['tok_s'] - 1:+.1%} | {ratio:.2f} | {a / alone:.2f} | {b / alone_b:.2f} |"
        )
    share, gap_us, _ = fit(baseline + diffusion, SHARE, GAP)
    told = ", ".join(f"{name} {median(values):.1%}" for name, values in errors.items())
    together = median(errors["AR, A"] + errors["two towers, A"])
    print(f"\nMedian absolute error: {told}; both modes together, A {together:.1%}.")
    print(f"Whether diffusion beats autoregressive decoding is right in {right} of {len(diffusion)} rows, both ways.")
    print(f"Fitted to all rows, B is {1 / share:.0%} of the bandwidth and {gap_us:.0f} us between kernels.")
    started = fit(baseline, SHARE, START)
    left = [abs(row["gen_s"] / (parts_s(row) @ started) - 1) for row in diffusion]
    prefill = [row["prefill_s"] for row in diffusion]
    print(
        f"\nThe autoregressive rows lie on {started[START]:.2f} s and a time for each token. Prefill takes {min(prefill):.2f} to {max(prefill):.2f} s in the\n"
        "two-tower rows, whose seconds exclude it; those of the autoregressive rows seem to hold it, and A counts it as decoding.\n"
        f"Fitted beside the share, which is then {1 / started[SHARE]:.0%}, it leaves the two-tower rows a median absolute error of {median(left):.1%}."
    )


if __name__ == "__main__":
    main()
