"""Scheduling policies, placements and ways to decode on the Azure conversation trace: latency, throughput, and the
simulator's own speed; a report; not part of CI.

.venv/bin/python tests/benchmarks/policies.py AZURE_TRACE > reports/policies.md
"""

import sys
from time import process_time

from twotower_sim.metrics import Results, evaluate
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import Run, prepare, simulate

HOST = {"host_overhead_ms": 4}
POOLS = {"kind": "pools", "context": 1, "denoiser": 3}
POLICIES: dict[str, dict] = {
    "fdfo": {"scheduler": HOST},
    "steps_per_round 2": {"scheduler": HOST | {"steps_per_round": 2}},
    "steps_per_round 4": {"scheduler": HOST | {"steps_per_round": 4}},
    "steps_per_round 8": {"scheduler": HOST | {"steps_per_round": 8}},
    "lockstep": {"scheduler": HOST | {"policy": "lockstep"}},
    "fdfo, host hidden": {"scheduler": HOST | {"overlap": "hidden"}},
    "fdfo, prefill first": {"scheduler": HOST | {"prefill": "first"}},
    "fdfo, prefill last": {"scheduler": HOST | {"prefill": "last"}},
    "fdfo, one extend a round": {"scheduler": HOST | {"max_extends_per_round": 1}},
    "fdfo, gamma by queue": {
        "scheduler": HOST,
        "decoding": {
            "kind": "two_tower",
            "gamma_policy": {"kind": "by_queue", "levels": [{"waiting": 4, "gamma": 0.6}]},
        },
    },
}
OTHERS: dict[str, dict] = {
    "two towers colocated, TP 2": {"deployment": {"placement": {"kind": "colocated"}, "tensor_parallel": 2}},
    "two towers split": {},
    "two towers split, asynchronous": {"deployment": {"placement": {"kind": "split", "mode": "asynchronous"}}},
    "pools 1:3": {"deployment": {"placement": POOLS, "replicas": 2}},
    "pools 1:3, free": {"deployment": {"placement": POOLS | {"assignment": "free"}, "replicas": 2}},
    "autoregressive": {"decoding": {"kind": "autoregressive"}, "deployment": {"replicas": 8}},
    "autoregressive, prefix cache (nothing to hit)": {
        "decoding": {"kind": "autoregressive"},
        "deployment": {"replicas": 8},
        "memory": {"prefix_cache": {"kind": "hybrid"}},
    },
    "mock-AR": {"decoding": {"kind": "mock_ar"}},
    "speculative, MTP, 3 drafts at 0.8 0.7 0.6": {
        "decoding": {"kind": "speculative", "draft_tokens": 3, "acceptance": [0.8, 0.7, 0.6]},
        "deployment": {"replicas": 8},
    },
    "one tower, block diffusion": {
        "decoding": {"kind": "block_diffusion", "block_size": 16},
        "model": "nemotron-3-nano-30b-a3b",
        "deployment": {"replicas": 8},
    },
}


SATURATED = 12.0  # times the trace's rate


def finished(sections: dict, trace: str, rate_scale: float = 1.0) -> tuple[Run, Results]:
    deployment = {"gpu": "h100-sxm", "replicas": 4} | sections.get("deployment", {})
    workload = {"kind": "trace", "path": trace, "rate_scale": rate_scale}
    run = simulate(prepare(Scenario.model_validate(sections | {"workload": workload, "deployment": deployment})))
    return run, evaluate(run)


def row(name: str, sections: dict, trace: str) -> str:
    start = process_time()
    run, results = finished(sections, trace)
    seconds = process_time() - start
    metrics, rounds = results.metrics, results.counts["rounds"]
    figures = [
        f"{metrics[metric][at]:,.0f}"
        for metric, at in (
            ("time_to_first_token", "p50"),
            ("time_to_first_token", "p99"),
            ("commit_gap", "p50"),
            ("request_latency", "p50"),
            ("request_latency", "p99"),
        )
    ]
    most = finished(sections, trace, SATURATED)[1].metrics["output_token_throughput"]["avg"]
    idle = results.blocks["idle_forwards"]
    cells = [
        name,
        str(run.gpus),
        *figures,
        f"{most:,.0f}",
        f"{idle:,}",
        f"{rounds:,}",
        f"{seconds:.1f}",
        f"{rounds / seconds:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    heads = ("TTFT p50", "TTFT p99", "commit gap p50", "E2E p50", "E2E p99", "tokens/s saturated", "idle forwards")
    header = ["", "GPUs", *heads, "rounds", "CPU seconds", "rounds/s"]
    line = "| " + " | ".join(header) + " |\n|" + " --- |" * len(header)
    print("# Every policy on the Azure conversation trace\n")
    print(
        "19,366 requests in 58 minutes on 8 x H100; latencies in ms. Saturated: at 12 times the rate, until the last has finished. Modelled latency (roofline, CUDA graphs), observed commits\n"
        "(class mixed, gamma 0.8). Idle forwards: denoise passes in which a sequence whose block was done kept its place. The\n"
        "last three columns are the simulator's own speed on one core (CPU time), workload and metrics included.\n"
        "`python tests/benchmarks/policies.py AZURE_TRACE` made this page.\n\n"
        "## Scheduling, four split two-tower replicas, 4 ms of host work a round\n"
    )
    print(line)
    for name, sections in POLICIES.items():
        print(row(name, sections, sys.argv[1]))
    print("\n## Placements and ways to decode, no host work\n")
    print(line)
    for name, sections in OTHERS.items():
        print(row(name, sections, sys.argv[1]))


if __name__ == "__main__":
    main()
