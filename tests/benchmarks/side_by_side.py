"""The scenarios under two-tower and autoregressive decoding on the same number of GPUs, as a table; not part of CI.

.venv/bin/python tests/benchmarks/side_by_side.py MOONCAKE_TRACE AZURE_TRACE > reports/side_by_side.md
"""

import sys
from pathlib import Path

from twotower_sim.metrics import evaluate
from twotower_sim.scenario import load_scenario
from twotower_sim.simulation import prepare, simulate

SCENARIOS = Path(__file__).parents[2] / "scenarios"
COLUMNS = (
    ("TTFT p50", "time_to_first_token", "p50"),
    ("TTFT p99", "time_to_first_token", "p99"),
    ("ITL p50", "inter_token_latency", "p50"),
    ("ITL p99", "inter_token_latency", "p99"),
    ("E2E p50", "request_latency", "p50"),
    ("E2E p99", "request_latency", "p99"),
    ("good requests", "good_request_fraction", "avg"),
)


def row(name: str, trace: str | None, kind: str) -> str:
    """One run; autoregressive replicas take one GPU each, split two-tower replicas two."""
    path = SCENARIOS / f"{name}.yaml"
    overrides = [f"decoding.kind={kind}"] + ([f"workload.path={trace}"] if trace else [])
    scenario = load_scenario(path, overrides)
    if kind == "autoregressive":
        scenario = load_scenario(path, [*overrides, f"deployment.replicas={2 * scenario.deployment.replicas}"])
    run = simulate(prepare(scenario, path.parent))
    results = evaluate(run)
    figures = [f"{results.metrics[metric][statistic]:,.1f}" for _, metric, statistic in COLUMNS[:-1]]
    good = f"{results.metrics['good_request_fraction']['avg']:.1%}"
    return " | ".join(["", name, kind, f"{run.gpus} x {run.gpu.name}", *figures, good, ""]).strip()


def main() -> None:
    traces = {"quickstart": None, "mooncake_conversation": sys.argv[1], "azure_conversation": sys.argv[2]}
    print("# Two towers and their autoregressive baseline on the same GPUs\n")
    print("Latency is modelled (roofline on H100), commits and expert routing are observed; milliseconds. A model of a")
    print(
        "well-fused engine: weights and experts bound a step, not kernel launches, and a denoise step of 16 positions"
    )
    print(
        "touches some 34 experts where a token touches 6. `python tests/benchmarks/side_by_side.py` made this table.\n"
    )
    header = ["scenario", "decoding", "GPUs", *(title for title, _, _ in COLUMNS)]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for name, trace in traces.items():
        for kind in ("two_tower", "autoregressive"):
            print(row(name, trace, kind))


if __name__ == "__main__":
    main()
