"""What the tests share: the data beside the checkout, and a run in one call."""

import os
from pathlib import Path

import pytest
import torch

from twotower_sim.metrics import evaluate
from twotower_sim.scenario import Scenario
from twotower_sim.simulation import prepare, simulate

if not torch.cuda.is_available():  # Triton's kernels run interpreted, which must be said before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """Public traces and measurements; not part of the project."""
    if not DATA.is_dir():
        pytest.skip("no data beside the checkout")
    return DATA


def run_of(base: Path = ROOT, **sections):
    """(run, results) of a scenario given as sections."""
    run = simulate(prepare(Scenario.model_validate(sections), base))
    return run, evaluate(run)


def synthetic(requests=200, rate_rps=5.0, input_tokens=300, output_tokens=80, **more):
    """A drawn workload of lognormal lengths."""

    def length(mean):
        return {"kind": "lognormal", "mean": mean, "cv": 0.8}

    return {
        "kind": "synthetic",
        "requests": requests,
        "arrivals": {"kind": "poisson", "rate_rps": rate_rps},
        "input_tokens": length(input_tokens),
        "output_tokens": length(output_tokens),
    } | more


AFFINE = {
    "kind": "affine",
    "prefill": {"base_ms": 2, "per_new_token_ms": 0.01},
    "decode": {"base_ms": 5, "per_seq_ms": 0.1, "per_context_token_ms": 1e-5},
    "denoise": {"base_ms": 6, "per_seq_ms": 0.2, "per_context_token_ms": 1e-5},
    "extend": {"base_ms": 4, "per_seq_ms": 0.1, "per_context_token_ms": 1e-5},
}
