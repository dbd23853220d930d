"""Throughput per GPU and time per token over batch size, placement and way to decode; a report and its picture; not part of CI.

.venv/bin/python tests/benchmarks/crossover.py reports/crossover
"""

import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import mkdtemp

import altair as alt
import yaml

from twotower_sim.errors import InputError
from twotower_sim.gpu import load_gpu
from twotower_sim.metrics import evaluate
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import prepare, simulate

GPUS = ("h100-sxm", "h200", "b200", "h100-sxm, eager")
LAUNCH_US = 20  # of an eager launch, host included, on the last of these
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATIOS = ((1, 1), (1, 2), (1, 3), (2, 3))
TARGETS_MS = (8, 12, 20, 40)
ACCEPTANCE = [0.8, 0.7, 0.6]
TWO_TOWER = {"decoding": {"kind": "two_tower"}}
MODES = {
    "autoregressive": {"decoding": {"kind": "autoregressive"}},
    "speculative": {"decoding": {"kind": "speculative", "draft_tokens": 3, "acceptance": ACCEPTANCE}},
    "colocated": TWO_TOWER | {"deployment": {"placement": {"kind": "colocated"}}},
    "split": TWO_TOWER | {"deployment": {"placement": {"kind": "split"}}},
} | {
    f"pools {m}:{n}": TWO_TOWER | {"deployment": {"placement": {"kind": "pools", "context": m, "denoiser": n}}}
    for m, n in RATIOS
}


FOLDER, EAGER = Path(mkdtemp()), "eager.yaml"


@dataclass(frozen=True)
class Point:
    gpu: str
    mode: str
    gpus: int
    batch: int  # sequences in flight on each server that decodes
    tpot_ms: float
    tokens_per_s_gpu: float


def measured(gpu: str, mode: str, batch: int) -> Point | None:
    """One closed loop at a batch size; None where memory does not hold it."""
    sections = MODES[mode]
    placement = sections.get("deployment", {}).get("placement", {})
    in_flight = batch * placement.get("denoiser", 1)
    gpu_file, graphs = (EAGER, False) if gpu.endswith("eager") else (gpu, True)
    for tensor_parallel in (1, 2) if mode == "colocated" else (1,):
        deployment = {"gpu": gpu_file, "tensor_parallel": tensor_parallel} | sections.get("deployment", {})
        scenario = Scenario.model_validate(
            {
                "workload": {
                    "kind": "closed_loop",
                    "requests": max(6 * in_flight, 40),
                    "concurrency": in_flight,
                    "input_tokens": {"kind": "lognormal", "mean": 1024, "cv": 1, "max": 8192},
                    "output_tokens": {"kind": "lognormal", "mean": 256, "cv": 0.5, "max": 1024},
                },
                "scheduler": {"max_num_seqs": batch, "max_num_batched_tokens": 8192},
                "latency": {"kind": "roofline", "cuda_graphs": graphs},
                **sections,
                "deployment": deployment,
            }
        )
        try:
            run = prepare(scenario, FOLDER)
        except InputError:
            continue
        if run.memory.state_slots < batch:
            continue
        metrics = evaluate(simulate(run)).metrics
        throughput = metrics["output_token_throughput_per_gpu"]["avg"]
        return Point(gpu, mode, run.gpus, batch, metrics["inter_token_latency"]["avg"], throughput)
    return None


def best_pools(points: list[Point]) -> list[Point]:
    """Of the ratios of pools, at every batch size the one with the most throughput per GPU."""
    others = [point for point in points if not point.mode.startswith("pools")]
    pools = [point for point in points if point.mode.startswith("pools")]
    keys = sorted({(point.gpu, point.batch) for point in pools})
    best = [
        max((p for p in pools if (p.gpu, p.batch) == key), key=lambda p: (p.tokens_per_s_gpu, p.mode)) for key in keys
    ]
    return others + best


def family(point: Point) -> str:
    return "pools" if point.mode.startswith("pools") else point.mode


FAMILIES = ("autoregressive", "speculative", "colocated", "split", "pools")


def by_batch(points: list[Point], gpu: str) -> list[str]:
    lines = ["| batch | " + " | ".join(FAMILIES) + " |", "|" + " --- |" * (len(FAMILIES) + 1)]
    for batch in BATCHES:
        cells = []
        for name in FAMILIES:
            found = [p for p in points if (p.gpu, p.batch, family(p)) == (gpu, batch, name)]
            ratio = f" ({found[0].mode.removeprefix('pools ')})" if found and name == "pools" else ""
            cells.append(f"{found[0].tokens_per_s_gpu:,.0f} at {found[0].tpot_ms:.1f} ms{ratio}" if found else "")
        if any(cells):
            lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return lines


def at_targets(points: list[Point], gpu: str) -> list[str]:
    lines = ["| TPOT at most | " + " | ".join(FAMILIES) + " | best |", "|" + " --- |" * (len(FAMILIES) + 2)]
    for target in TARGETS_MS:
        best = {}
        for name in FAMILIES:
            meets = [p for p in points if p.gpu == gpu and family(p) == name and p.tpot_ms <= target]
            if meets:
                best[name] = max(meets, key=lambda p: p.tokens_per_s_gpu)
        cells = [f"{best[n].tokens_per_s_gpu:,.0f} (batch {best[n].batch})" if n in best else "no" for n in FAMILIES]
        winner = max(best, key=lambda n: best[n].tokens_per_s_gpu) if best else "none"
        lines.append(f"| {target} ms | " + " | ".join(cells) + f" | {winner} |")
    return lines


def crossovers(points: list[Point], gpu: str) -> list[str]:
    """Of each pair of ways: which gives more tokens a GPU, and from which batch size on."""
    lines = []
    for one, other in combinations(FAMILIES, 2):
        wins: list[tuple[int, str]] = []  # (batch, who wins from it on)
        for batch in BATCHES:
            pair = [[p for p in points if (p.gpu, p.batch, family(p)) == (gpu, batch, of)] for of in (one, other)]
            if not all(pair):
                continue
            winner = max(pair[0] + pair[1], key=lambda p: p.tokens_per_s_gpu)
            if not wins or wins[-1][1] != family(winner):
                wins.append((batch, family(winner)))
        if wins:
            told = ", ".join(f"{name} from batch {batch}" for batch, name in wins)
            lines.append(f"- {one} or {other}: {told if len(wins) > 1 else f'{wins[0][1]} at every batch'}")
    return lines


def picture(points: list[Point]) -> alt.Chart:
    rows = [
        {"GPU": p.gpu, "way": family(p), "batch": p.batch, "tpot": p.tpot_ms, "tokens": p.tokens_per_s_gpu}
        for p in points
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("tokens:Q", title="output tokens/s per GPU").scale(type="log"),
        color=alt.Color("way:N", title=None, sort=FAMILIES),
        tooltip=["way:N", "batch:Q", "tpot:Q", "tokens:Q"],
        order="batch:Q",
    )
    line = base.mark_line(point=True)
    over_batch = line.encode(x=alt.X("batch:Q", title="sequences on each decoding server").scale(type="log", base=2))
    over_time = line.encode(x=alt.X("tpot:Q", title="time per output token, ms").scale(type="log"))
    size = {"width": 330, "height": 260}
    return alt.vconcat(
        *(
            (over_batch.properties(title=gpu, **size) | over_time.properties(title=gpu, **size)).transform_filter(
                gpu == alt.datum.GPU
            )
            for gpu in GPUS
        )
    )


def main() -> None:
    figures = load_gpu("h100-sxm", FOLDER).model_dump()
    figures["efficiency"]["kernel_launch_us"] = LAUNCH_US
    (FOLDER / EAGER).write_text(yaml.safe_dump(figures))
    found = [measured(gpu, mode, batch) for gpu in GPUS for mode in MODES for batch in BATCHES]
    points = best_pools([point for point in found if point])
    out = Path(sys.argv[1])
    picture(points).save(out.with_suffix(".svg"))
    page = [
        "# Throughput per GPU, by batch size, placement and way to decode\n",
        "Closed loop, 1,024 input and 256 output tokens on average; gamma 0.8, commits of class mixed (observed), latency modelled",
        "(roofline, CUDA graphs), speculative decoding with an MTP head, three drafts and assumed acceptance 0.8, 0.7, 0.6. Batch:",
        "sequences on each server that decodes. Colocated towers take tensor parallelism 2 where one GPU does not hold both. Pools:",
        f"the best of {', '.join(f'{m}:{n}' for m, n in RATIOS)} context to denoiser GPUs. Empty: memory does not hold that batch.",
        f"The last engine has no CUDA graphs and takes {LAUNCH_US} us for each launch, host included: there a step of 16 tokens costs",
        "what one of a single token does until the batch is large.",
        f"`python tests/benchmarks/crossover.py reports/crossover` made this page.\n\n![crossover]({out.name}.svg)",
    ]
    for gpu in GPUS:
        page += [
            f"\n## {gpu}\n\nOutput tokens/s per GPU, at time per output token (mean ITL).\n",
            *by_batch(points, gpu),
        ]
        page += [
            "\nThe most tokens/s per GPU that meet a target:\n",
            *at_targets(points, gpu),
            "",
            *crossovers(points, gpu),
        ]
    out.with_suffix(".md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
