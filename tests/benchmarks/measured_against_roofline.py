"""Passes measured on a GPU beside what the roofline makes of them: python tests/benchmarks/measured_against_roofline.py PROFILE
GPU > reports/h200.md. The measured decoder is calibrate's own; the roofline was fitted to tuned kernels (AIConfigurator)."""

import sys
from pathlib import Path

from twotower_sim.profile import load_profile
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import prepare

ONE = {"kind": "constant", "value": 1}
LOAD = {
    "kind": "synthetic",
    "requests": 1,
    "arrivals": {"kind": "poisson", "rate_rps": 1},
    "input_tokens": ONE,
    "output_tokens": ONE,
}


def model(decoding: str, gpu: str, latency: dict):
    deployment = {"gpu": gpu} | ({"placement": {"kind": "colocated"}} if decoding == "two_tower" else {})
    sections = {"workload": LOAD, "decoding": {"kind": decoding}, "deployment": deployment, "latency": latency}
    return prepare(Scenario.model_validate(sections | {"scheduler": {"max_num_seqs": 64}})).latency


def passes(gpu: str, latency: dict) -> dict[tuple, float]:
    """Milliseconds by (pass, sequences or tokens, context)."""
    blocks, tokens = (model(kind, gpu, latency) for kind in ("two_tower", "autoregressive"))
    found, nothing = {}, (0, 0, 0, 0)
    for n in (1, 8, 32, 64):
        for context in (0, 2048, 16384):
            found["denoise", n, context] = blocks.round(n, n * context, 0, 0, nothing)[0]
            found["extend", n, context] = blocks.round(0, 0, n, n * context, nothing)[1]
            found["decode", n, context] = tokens.round(n, n * context + n, 0, 0, nothing)[1]
    for length in (128, 512, 2048, 8192):
        found["prefill", length, 0] = tokens.round(0, 0, 0, 0, (length, length * (length + 1) // 2, length, 1))[1]
    return {shape: 1e3 * seconds for shape, seconds in found.items()}


def main(path: str, gpu: str) -> None:
    profile = load_profile(path)
    print(f"# Passes of the 30B model on {profile.provenance.device}\n")
    print(
        f"Measured {profile.provenance.date} by `calibrate` ({profile.provenance.weights} weights, {profile.provenance.dtype}, both "
        f"towers on one GPU; {Path(path).name}), beside what the simulator's roofline makes of the same passes on `{gpu}`. Milliseconds; of a\n"
        "prefill the first column is tokens. Made by `python tests/benchmarks/measured_against_roofline.py PROFILE GPU`.\n"
    )
    print("| pass | sequences | context | measured | roofline | ratio |\n| --- | --- | --- | --- | --- | --- |")
    measured = passes(gpu, {"kind": "profile", "path": str(Path(path).resolve())})
    modelled = passes(gpu, {"kind": "roofline"})
    for (kind, n, context), ms in sorted(measured.items()):
        of = modelled[kind, n, context]
        print(f"| {kind} | {n:,} | {context:,} | {ms:.2f} | {of:.2f} | {ms / of:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
