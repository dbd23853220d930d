"""NVIDIA's DynoSim as an external oracle: per-request results of its engine on the Mooncake conversation trace."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import run_of
from invariants import check

from twotower_sim.kv_cache import infinite_hits
from twotower_sim.readers import read_trace

KEY = ["arrival_ms", "input_tokens", "output_tokens"]
FIXED = {"prefill": {"base_ms": 20}, "decode": {"base_ms": 8}}
AFFINE = {
    "prefill": {"base_ms": 20, "per_new_token_ms": 0.05},
    "decode": {"base_ms": 5, "per_context_token_ms": 1e-5},
}


def replay(data, replicas: int, costs: dict, **more):
    """Its engine of these cases, as a scenario: one pool of 4,000 blocks of 512 tokens, 64 sequences, 8,192 tokens."""
    trace = data / "traces" / "mooncake_conversation_trace.jsonl.gz"
    return run_of(
        workload={"kind": "trace", "path": str(trace), "spread_quantised": False},
        model="nemotron-3-nano-30b-a3b",
        decoding=more.get("decoding", {"kind": "autoregressive"}),
        deployment={"replicas": replicas},
        scheduler={"max_num_seqs": 64, "max_num_batched_tokens": 8192},
        memory={"kv_block_tokens": 512, "kv_blocks": 4000, "state_slots": 64} | more.get("memory", {}),
        latency={"kind": "affine", "compose": "sum"} | costs,
    )


def pair(columns, data, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ours and theirs, matched by arrival and lengths (their rows have no id)."""
    ours = pd.DataFrame(
        {
            "arrival_ms": columns.arrival_ns / 1e6,
            "input_tokens": columns.input_tokens,
            "output_tokens": columns.output_tokens,
            "ttft_ms": (columns.first_ns - columns.arrival_ns) / 1e6,
            "e2e_ms": (columns.finish_ns - columns.arrival_ns) / 1e6,
        }
    )
    theirs = pd.read_csv(data / "oracle" / f"{name}.csv.gz")
    ours, theirs = (frame.sort_values([*KEY, "e2e_ms"], ignore_index=True) for frame in (ours, theirs))
    assert (ours[KEY] == theirs[KEY]).all(axis=None)
    return ours, theirs


def test_fixed_times_two_workers_every_request(data):
    run, results = replay(data, 2, FIXED)
    check(run, results)
    ours, theirs = pair(results.columns, data, "fix_w2_nocache")
    assert len(ours) == 12031
    for column in ("ttft_ms", "e2e_ms"):
        assert (ours[column] - theirs[column]).abs().max() < 0.01


@pytest.mark.parametrize("column", ["ttft_ms", "e2e_ms"])
def test_affine_times_four_workers(data, column):
    """Its costs take integer means over a round's prompts, a quirk that ours does not copy."""
    _, results = replay(data, 4, AFFINE)
    ours, theirs = pair(results.columns, data, "affine_w4_nocache")
    error = (ours[column] / theirs[column] - 1).abs()
    assert np.median(error) < 0.001
    assert np.quantile(error, 0.99) < 0.01


CACHED = {"prefix_cache": {"kind": "attention"}}
FOUR_TOKENS = {"kind": "speculative", "draft_tokens": 3, "acceptance": 1.0, "drafter": {"kind": "ngram"}}


@pytest.mark.parametrize(
    ("name", "replicas", "decoding"),
    [("fix_w1", 1, {"kind": "autoregressive"}), ("fix_w4_4tok", 4, FOUR_TOKENS)],
)
def test_prefix_cache_and_speculative_rounds_every_request(data, name, replicas, decoding):
    run, results = replay(data, replicas, FIXED, decoding=decoding, memory=CACHED)
    check(run, results)
    ours, theirs = pair(results.columns, data, name)
    assert len(ours) == 12031
    for column in ("ttft_ms", "e2e_ms"):
        assert (ours[column] - theirs[column]).abs().max() < 0.01
    reused = {}
    for engine in run.engines:
        reused |= engine.cache.reused_tokens
        engine.cache.check()
    assert sum(reused.values()) == theirs.reused_input_tokens.sum()
    told = json.loads((data / "oracle" / f"{name}.json").read_text())["summary"]
    assert results.memory["prefix_cache"]["reused_input_ratio"] == pytest.approx(told["prefix_cache_reused_ratio"])


def test_a_cache_without_bounds_hits_the_known_share_of_blocks(data):
    requests = read_trace(data / "traces" / "mooncake_conversation_trace.jsonl.gz").requests
    hits, blocks = infinite_hits(requests)
    assert (blocks, round(hits / blocks, 3)) == (288_500, 0.366)
    _, results = replay(data, 1, FIXED, memory=CACHED | {"kv_blocks": 400_000})
    cache = results.memory["prefix_cache"]
    assert cache["blocks_evicted"] == 0
    full = int((requests.input_tokens - 1).sum() - ((requests.input_tokens - 1) % 512).sum()) // 512
    assert cache["blocks_looked_up"] == full
    assert cache["block_hit_ratio"] == pytest.approx(hits / blocks, abs=0.02)  # without partial blocks, and in time
