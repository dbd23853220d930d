"""Small profiles made by hand: times in round figures on small grids, as a dictionary to be changed and written."""

import json
from itertools import product
from pathlib import Path

from twotower_sim.profile import AXES

SEQUENCES, CONTEXT, TOKENS = [1, 4, 16, 64, 256], [0, 256, 4096, 32768], [1, 64, 1024, 16384]
COSTS = {"denoise": (6, 0.2), "extend": (4, 0.1), "decode": (5, 0.1)}  # ms: base, per sequence


def milliseconds(name: str, at: dict[str, int]) -> float:
    """What a pass costs; not linear in any axis, so that interpolation has something to do."""
    n, context, tokens = at["sequences"], at.get("context", 0), at.get("tokens", 0)
    if name in COSTS:
        base, each = COSTS[name]
        return base + each * n**1.1 + 1e-6 * n * context**1.2
    if name == "prefill":
        return 2 + 0.01 * (n * tokens) ** 1.1 + 1e-6 * n * tokens * context**0.5
    if name == "transfer":
        return 0.1 + 0.02 * n + 1e-4 * n * tokens
    shared, prompt = {"sequences": n}, {"sequences": 1, "tokens": tokens}
    parts = milliseconds(name.split("+")[0], shared), milliseconds("prefill", prompt)
    return max(parts) + 0.5 * min(parts)


def grid(name: str, points: dict[str, list[int]], factor: float = 1.0) -> dict:
    axes = {axis: points[axis] for axis in AXES[name]}
    seconds = [
        factor * 1e-3 * milliseconds(name, dict(zip(axes, at, strict=True))) for at in product(*axes.values())
    ]  # fmt: skip
    quantiles = {"p20_s": [s * 0.99 for s in seconds], "p80_s": [s * 1.02 for s in seconds]}
    mix = {"at_context": 0} if "+" in name else {}
    return {"axes": axes, "median_s": seconds, **quantiles, **mix}


def measured_profile(factor: float = 1.0, most: int = 256, block_size: int = 16, split: bool = True) -> dict:
    """Every pass, the transfer too where ``split``; ``most``: the largest batch measured."""
    sequences = [n for n in SEQUENCES if n <= most]
    points = {"block_size": [block_size], "sequences": sequences, "context": CONTEXT, "tokens": TOKENS}
    grids = {name: grid(name, points, factor) for name in AXES}
    transfer = {"transfer": grids.pop("transfer")}
    return {
        "format": "twotower-sim profile",
        "version": 1,
        "provenance": {
            "kind": "measured",
            "source": "made by hand",
            "device": "2 x Handmade 96 GB",
            "model": "nemotron-twotower-30b-a3b",
            "date": "2026-11-25",
            "environment": {"torch": "2.13.0", "commit": "abc123", "dirty": False},
            "placement": "split" if split else "colocated",
            "weights": "checkpoint",
        },
        "device": {
            "name": "Handmade 96 GB",
            "count": 2,
            "memory_mib": 98304,
            "memory_bandwidth_gb_per_s": 3000,
            "bf16_tflops": 700,
        },
        "latency": {"passes": grids, **(transfer if split else {})},
    }


def write(profile: dict, path: Path) -> str:
    path.write_text(json.dumps(profile))
    return str(path)
