"""Real runs of the tiny model on this machine against their predictions; not part of CI, half an hour.

.venv/bin/python tests/benchmarks/fidelity.py REPETITIONS reports/fidelity

writes reports/fidelity.md and fidelity.svg, and fidelity.json, which holds every figure.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console

from calibrate.validation import Validation, ask_for
from twotower_sim.pairs_plot import plot_pairs
from twotower_sim.result import write_json
from twotower_sim.validation_report import Report, as_json, markdown, panels

ROOT = Path(__file__).parent.parent.parent
RATE, REQUESTS, SEATS = "workload.arrivals.rate_rps", "workload.requests", "scheduler.max_num_seqs"
RUNS: dict[str, dict[str, object]] = {
    "idle-fdfo-4": {RATE: 1.5, REQUESTS: 40, SEATS: 4},
    "busy-fdfo-8": {RATE: 5, REQUESTS: 100, SEATS: 8},
    "full-fdfo-16-gamma-0.6": {RATE: 40, REQUESTS: 150, SEATS: 16, "decoding.gamma": 0.6},
    "full-fdfo-32": {RATE: 40, REQUESTS: 150, SEATS: 32},
    "busy-code-fdfo-8-gamma-0.6": {RATE: 2.5, REQUESTS: 60, SEATS: 8, "decoding.gamma": 0.6, "commits.class": "code"},
    "busy-lockstep-8": {RATE: 4, REQUESTS: 80, SEATS: 8, "scheduler.policy": "lockstep"},
    "full-lockstep-16-gamma-0.6": {
        RATE: 40, REQUESTS: 120, SEATS: 16, "decoding.gamma": 0.6, "scheduler.policy": "lockstep"
    },
    "idle-autoregressive-4": {RATE: 1, REQUESTS: 25, SEATS: 4, "decoding.kind": "autoregressive"},
    "busy-autoregressive-16": {RATE: 8, REQUESTS: 150, SEATS: 16, "decoding.kind": "autoregressive"},
    "full-autoregressive-32": {RATE: 60, REQUESTS: 150, SEATS: 32, "decoding.kind": "autoregressive"},
}  # fmt: skip


def main() -> None:
    repetitions, out = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    scenario = ROOT / "scenarios" / "validate_tiny.yaml"
    questions = [
        ask_for(scenario, [f"name={name}", f"seed={seed}", *(f"{key}={value}" for key, value in changes.items())])
        for seed, (name, changes) in enumerate(RUNS.items())
    ]
    validation = Validation(questions, repetitions, None, None, None, None)
    scenarios = validation.run(Console(stderr=True))
    command = f"python tests/benchmarks/fidelity.py {repetitions} reports/fidelity"
    found = Report(scenarios, validation.read(), validation.where, True, 0.12, command)
    write_json(out.with_suffix(".json"), as_json(found))
    out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    plot_pairs(panels(found), out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
