"""Small runs, sweeps, comparisons and plans, and the pages that are made of them."""

import json
from pathlib import Path

import yaml
from conftest import AFFINE, synthetic
from typer.testing import CliRunner

from twotower_sim.cli import app

SLO = {"time_to_first_token_ms": 500, "request_latency_ms": 4000}
LOADED = {"workload": synthetic(requests=300, rate_rps=4), "slo": SLO}
MIX = {
    "kind": "mix",
    "parts": {
        "chat": {"share": 0.7, "workload": synthetic(requests=200)},
        "batch-work": {"share": 0.3, "slo": {"request_latency_ms": 9000}, "workload": synthetic(requests=100)},
    },
    "rate_rps": 5,
}
CLOSED = {"kind": "closed_loop", "requests": 40, "concurrency": 8} | {
    of: {"kind": "constant", "value": 64} for of in ("input_tokens", "output_tokens")
}
RUNS = {
    "two towers": LOADED,
    "overloaded": LOADED | {"workload": synthetic(requests=300, rate_rps=40), "scheduler": {"max_num_seqs": 8}},
    "classes": {"workload": MIX, "measurement": {"warm_up_s": 10}, "slo": SLO, "decoding": {"gamma_by_class": {"chat": 0.6}}},
    "autoregressive": {"workload": CLOSED, "decoding": {"kind": "autoregressive"}, "memory": {"prefix_cache": {"kind": "hybrid"}}},
    "pools": LOADED | {"deployment": {"placement": {"kind": "pools", "context": 1, "denoiser": 2}}},
    "one request": {"workload": synthetic(requests=1)},
}  # fmt: skip
QUICK = {"workload": synthetic(requests=120, rate_rps=4), "slo": SLO}
STUDY = {
    "scenario": "asked.yaml",
    "design": {"kind": "grid", "axes": {
        "scheduler.max_num_seqs": [2, 16, 64],
        "decoding": [{"kind": "two_tower", "gamma": 0.8}, {"kind": "two_tower", "gamma": 0.6}, {"kind": "autoregressive"}],
    }},
    "replications": 2,
    "metrics": ["time_to_first_token.p90", "request_latency.p90", "cost.usd_per_million_output_tokens", "good_request_fraction"],
}  # fmt: skip
SWEEPS = {
    "grid": STUDY,
    "one that fails": STUDY | {"set": {"latency": AFFINE}, "replications": 1, "design": {"kind": "list", "points": [
        {"deployment.gpu": "h300"}, {"scheduler.max_num_seqs": 8}, {"scheduler.max_num_seqs": 16, "decoding.gamma": 0.6},
    ]}},
    "nothing bears its load": STUDY | {
        "set": {"latency": AFFINE, "scheduler.max_num_seqs": 1, "workload.requests": 300},
        "design": {"kind": "random", "points": 20, "axes": {"workload.arrivals.rate_rps": {"low": 50, "high": 500, "log": True}}},
        "replications": 1,
    },
}  # fmt: skip


SIDES = {
    "two towers and one": [QUICK, QUICK | {"decoding": {"kind": "autoregressive"}}],
    "one that falls behind": [QUICK | {"latency": AFFINE}, QUICK | {"latency": AFFINE, "scheduler": {"max_num_seqs": 1}}, QUICK],
}  # fmt: skip

PLAN = {
    "scenario": "asked.yaml",
    "set": {"latency": AFFINE, "workload": synthetic(requests=700, rate_rps=60), "scheduler.max_num_seqs": 16},
    "objectives": {"request_latency.p90": 2500, "good_request_fraction": 0.9},
    "choices": {
        "decoding": [{"kind": "two_tower"}, {"kind": "two_tower", "gamma": 0.6}, {"kind": "autoregressive"}],
        "deployment.gpu": ["h100-sxm", "a100-80gb"],
        "deployment.placement": [{"kind": "split"}, {"kind": "pools", "context": 1, "denoiser": 2}],
    },
    "most_gpus": 24,
    "replications": 2,
}
PLANS = {
    "met": PLAN,
    "too short": PLAN | {"set": PLAN["set"] | {"workload": synthetic(requests=60, rate_rps=200)}, "replications": 1},
    "missed": PLAN | {"objectives": {"request_latency.p90": 1}, "most_gpus": 4, "quality_floor": 0.98, "replications": 1},
    "out of reach": PLAN | {"most_gpus": 1, "choices": {"decoding": [{"kind": "two_tower"}]}, "margin": False},
}  # fmt: skip


def write_run(sections: dict, folder: Path) -> tuple[Path, dict]:
    return _write(folder, ["run", _file(folder, "asked", sections)], "summary.json")


def write_sweep(study: dict, folder: Path) -> tuple[Path, dict]:
    _file(folder, "asked", QUICK)
    return _write(folder, ["sweep", _file(folder, "study", study), *_workers(folder)], "sweep.json")


def write_compare(sides: list[dict], folder: Path) -> tuple[Path, dict]:
    files = [_file(folder, f"side-{letter}", side) for letter, side in zip("abc", sides, strict=False)]
    return _write(folder, ["compare", *files, "--replications", "3", *_workers(folder)], "compare.json")


def write_plan(plan: dict, folder: Path) -> tuple[Path, dict]:
    _file(folder, "asked", QUICK)
    return _write(folder, ["plan", _file(folder, "plan", plan), *_workers(folder)], "plan.json")


def _workers(folder: Path) -> list[str]:
    return ["--jobs", "1", "--cache", str(folder / "cache")]


def _file(folder: Path, name: str, content: dict) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def _write(folder: Path, command: list[str], truth: str) -> tuple[Path, dict]:
    """The page that a command writes, and what it is a view of."""
    page = folder / "page.html"
    done = CliRunner().invoke(app, [*command, "--out", str(folder), "--html", str(page), "-q"])
    assert done.exit_code == 0, done.output or done.exception
    return page, json.loads((folder / truth).read_text())


KINDS = {
    "run": (write_run, RUNS),
    "sweep": (write_sweep, SWEEPS),
    "compare": (write_compare, SIDES),
    "plan": (write_plan, PLANS),
}
PAGES = [(kind, name) for kind, (_, cases) in KINDS.items() for name in cases]


def write(kind: str, name: str, folder: Path) -> tuple[Path, dict]:
    write_it, cases = KINDS[kind]
    return write_it(cases[name], folder)
