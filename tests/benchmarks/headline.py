"""Where the published 2.42 x of one user lies, and what an engine needs to reach it, as a report; not part of CI.

.venv/bin/python tests/benchmarks/headline.py OBSERVED_NFE_CSV > reports/headline.md
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import yaml

from twotower_sim.gpu import load_gpu
from twotower_sim.metrics import evaluate
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import Run, prepare, simulate

PUBLISHED, BLOCK = 2.42, 16
LAUNCH_US = (None, 5, 10, 20, 40, 80)
CLASSES = ("mixed", "math", "code")
LENGTHS = {"input_tokens": {"kind": "constant", "value": 256}, "output_tokens": {"kind": "constant", "value": 256}}
CONTEXT = 384


@dataclass(frozen=True)
class Costs:
    """Seconds of each kind of pass of one sequence."""

    decode: float
    denoise: float
    extend: float
    sent: float

    def steps_for(self, speedup: float) -> float:
        """Denoise steps a block at which two towers are ``speedup`` times as fast: a block takes steps x denoise + extend
        (and what it sends), its tokens BLOCK x decode."""
        return (BLOCK * self.decode / speedup - self.extend - self.sent) / self.denoise

    def speedup(self, steps: float) -> float:
        """At so many denoise steps a block."""
        return BLOCK * self.decode / (steps * self.denoise + self.extend + self.sent)


def finished(kind: str, launch_us: float | None, class_: str = "mixed", gpus: int = 1) -> tuple[Run, dict]:
    """A run of one user; an eager engine takes ``launch_us`` a launch, None: CUDA graphs."""
    figures = load_gpu("h100-sxm", Path()).model_dump()
    figures["efficiency"]["kernel_launch_us"] = launch_us or 0
    with TemporaryDirectory() as folder:
        (Path(folder) / "gpu.yaml").write_text(yaml.safe_dump(figures))
        sections: dict = {
            "workload": {"kind": "closed_loop", "requests": 60, "concurrency": 1, **LENGTHS},
            "decoding": {"kind": kind},
            "deployment": {"gpu": "gpu.yaml", "tensor_parallel": gpus},
            "latency": {"kind": "roofline", "cuda_graphs": launch_us is None},
        }
        if kind == "two_tower":
            sections["commits"] = {"kind": "observed", "class": class_}
        run = prepare(Scenario.model_validate(sections), Path(folder))
    return simulate(run), evaluate(run).metrics


@dataclass(frozen=True)
class Engine:
    """What one engine makes of the passes: their costs, the autoregressive step on both GPUs, and speed-ups by class."""

    costs: Costs
    on_both_s: float
    speedups: list[float]


def engine(launch_us: float | None) -> Engine:
    baseline, ar = finished("autoregressive", launch_us)
    both, _ = finished("autoregressive", launch_us, gpus=2)
    speedups = []
    for class_ in CLASSES:
        run, metrics = finished("two_tower", launch_us, class_)
        speedups.append(ar["request_latency"]["avg"] / metrics["request_latency"]["avg"])
    costs = Costs(
        baseline.latency.decode(1, CONTEXT, 0, 0)[1],
        run.latency.decode(1, CONTEXT, 0, 0)[0],
        run.latency.decode(0, 0, 1, CONTEXT)[1],
        run.latency.transfer(1, BLOCK),
    )
    return Engine(costs, both.latency.decode(1, CONTEXT, 0, 0)[1], speedups)


def engine_row(launch_us: float | None) -> str:
    of = engine(launch_us)
    name = "CUDA graphs (bandwidth-bound)" if launch_us is None else f"eager, {launch_us} us a launch"
    seconds = of.costs.decode, of.on_both_s, of.costs.denoise, of.costs.extend
    passes = " | ".join(f"{1e3 * s:.2f}" for s in seconds)
    needed = of.costs.steps_for(PUBLISHED)
    shown = " | ".join(f"{speed:.2f} x" for speed in of.speedups)
    return f"| {name} | {passes} | {shown} | {needed:.1f} | {BLOCK / needed:.1f} |"


def fitted(ar: pd.DataFrame, diffusion: pd.DataFrame) -> Costs:
    """Of wall seconds: the median a token, and by least squares what denoise passes and blocks take."""
    passes = np.stack((diffusion.nfe, blocks_of(diffusion)), axis=1)
    denoise_s, extend_s = np.linalg.lstsq(passes, diffusion.wall_s, rcond=None)[0]
    return Costs((ar.wall_s / ar.new_tokens).median(), denoise_s, extend_s, 0.0)


def blocks_of(diffusion: pd.DataFrame) -> pd.Series:
    return np.ceil(diffusion.new_tokens / diffusion.block_size)


def observed(path: str) -> list[str]:
    """The eager reference code on 2 x H100: seconds of a pass by least squares, and its speed-ups."""
    rows = pd.read_csv(path)
    diffusion = rows[rows["mode"] == "diff"]
    costs, blocks = fitted(rows[rows["mode"] == "ar"], diffusion), blocks_of(diffusion)
    lines = [
        f"The reference code (eager, experts in a Python loop) was observed to take {1e3 * costs.decode:.0f} ms a token, "
        f"{1e3 * costs.denoise:.0f} ms a denoise pass and {1e3 * costs.extend:.0f} ms an extend pass on 2 x H100: neither equal "
        "passes nor the roofline's ratio.\n",
        "| prompts, gamma 0.8, T 16 | steps a block | tokens/s, AR | tokens/s, two towers | speed-up observed | from these three costs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    default = diffusion[(diffusion.gamma == 0.8) & (diffusion.steps_per_block == 16)]
    for name, group in default.groupby("set"):
        per_block = group.nfe.sum() / blocks[group.index].sum()
        two, one = group.new_tokens.sum() / group.wall_s.sum(), 1 / costs.decode
        lines.append(
            f"| {name} | {per_block:.1f} | {one:.2f} | {two:.2f} | {two / one:.2f} x | {costs.speedup(per_block):.2f} x |"
        )
    return lines


def main() -> None:
    print("# Where the published 2.42 x lies\n")
    print(
        "One user, 256 + 256 tokens, gamma 0.8, blocks of 16; two towers on 2 x H100, autoregressive decoding on one\n"
        "of them, to which the speed-ups compare (the step that tensor parallelism over both would take stands beside). Passes\n"
        "are modelled (roofline), commits observed. An eager engine launches kernel by kernel and no pass is shorter than its\n"
        "launches; CUDA graphs leave the memory's bandwidth as the bound.\n"
        "`python tests/benchmarks/headline.py OBSERVED_NFE_CSV` made this page.\n"
    )
    print(
        "| engine | AR step ms | on both GPUs (TP 2) | denoise ms | extend ms | "
        + " | ".join(CLASSES)
        + " | steps a block for 2.42 x | tokens a step |"
    )
    print("|" + " --- |" * 10)
    for launch_us in LAUNCH_US:
        print(engine_row(launch_us))
    mean = {c: finished("two_tower", None, c)[1]["nfe_per_block"]["avg"] for c in CLASSES}
    print(f"\nSteps a block drawn here: {', '.join(f'{name} {steps:.1f}' for name, steps in mean.items())}.\n")
    print("\n".join(observed(sys.argv[1])))


if __name__ == "__main__":
    main()
