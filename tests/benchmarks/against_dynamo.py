"""Whole-process time beside NVIDIA's DynoSim on the same trace, engine and latency, interleaved; not part of CI.

    python3 -m venv /tmp/dynamo && /tmp/dynamo/bin/pip install ai-dynamo==1.4.2
    .venv/bin/python tests/benchmarks/against_dynamo.py TRACE.jsonl /tmp/dynamo/bin/python

TRACE.jsonl is the Mooncake conversation trace, unpacked. Both replay it on eight round-robin replicas in autoregressive mode
without prefix caching, with prefill 20 ms + 0.05 ms a new token and decode 5 ms + 1e-5 ms a context token.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPLICAS = 8
SCENARIO = f"""\
workload: {{kind: trace, path: TRACE, spread_quantised: false}}
decoding: {{kind: autoregressive}}
deployment: {{replicas: {REPLICAS}}}
scheduler: {{max_num_seqs: 64, max_num_batched_tokens: 8192}}
memory: {{kv_block_tokens: 512, kv_blocks: 4000, state_slots: 64}}
latency: {{kind: affine, prefill: {{base_ms: 20, per_new_token_ms: 0.05}}, decode: {{base_ms: 5, per_context_token_ms: 1e-5}}}}
"""


def write_profile(path: Path) -> None:
    """The same latency in DynoSim's format: grids, which it interpolates linearly."""
    tokens, kv, context = np.array([1.0, 8192, 200_000]), np.array([0.0, 1e6, 4e6]), np.array([0.0, 1e5, 1e6])
    np.savez(
        path,
        prefill_isl=tokens,
        prefill_ttft_ms=20 + 0.05 * tokens,
        decode_active_kv_tokens=kv,
        decode_context_length=context,
        decode_itl=np.repeat((5 + 1e-5 * kv)[:, None], 3, axis=1),
    )


def seconds(command: list[str], folder: Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("dynamo", help="python of an environment with ai-dynamo")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trace = str(options.trace.absolute())
        (folder / "bench.yaml").write_text(SCENARIO.replace("TRACE", trace))
        write_profile(folder / "affine.npz")
        engine = {
            "block_size": 512, "num_gpu_blocks": 4000, "max_num_seqs": 64, "max_num_batched_tokens": 8192,
            "enable_prefix_caching": False, "planner_profile_data": str(folder / "affine.npz"),
        }  # fmt: skip
        ours = [sys.executable, "-m", "twotower_sim", "run", "bench.yaml", "--out", "ours"]
        theirs = [
            options.dynamo, "-m", "dynamo.replay", trace, "--trace-format", "mooncake", "--trace-block-size", "512",
            "--num-workers", str(REPLICAS), "--router-mode", "round_robin", "--replay-mode", "offline",
            "--extra-engine-args", json.dumps(engine), "--report-json", "theirs.json",
        ]  # fmt: skip
        seconds(ours, folder), seconds(theirs, folder)  # warm up
        pairs = [(seconds(ours, folder), seconds(theirs, folder)) for _ in range(options.runs)]
        report(pairs, folder)


def report(pairs: list[tuple[float, float]], folder: Path) -> None:
    for name, column in zip(("twotower-sim", "DynoSim"), zip(*pairs, strict=True), strict=True):
        print(f"{name:13} median {statistics.median(column):.2f} s, {min(column):.2f} to {max(column):.2f}")
    ratios = [ours / theirs for ours, theirs in pairs]
    print(f"ratio         median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    ours = json.loads((folder / "ours" / "summary.json").read_text())["metrics"]
    theirs = json.loads((folder / "theirs.json").read_text())
    for name, key in (("time_to_first_token", "ttft"), ("request_latency", "e2e_latency")):
        print(f"{name}: mean {ours[name]['avg']:.1f} ms here, {theirs[f'mean_{key}_ms']:.1f} ms there")


if __name__ == "__main__":
    main()
