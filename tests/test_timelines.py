"""Examples small enough for paper, with their exact timelines in milliseconds."""

import json

from conftest import run_of
from invariants import check

from twotower_sim.metrics import Columns

COSTS = {
    "kind": "affine",
    "prefill": {"base_ms": 10},
    "decode": {"base_ms": 3},
    "denoise": {"base_ms": 4},
    "extend": {"base_ms": 2},
}
TWO_STEPS_A_BLOCK = {"kind": "constant", "tokens_per_step": 8}


def replay(tmp_path, rows, **sections):
    """Run (arrival_ms, input, output) rows."""
    trace = tmp_path / "trace.jsonl"
    keys = ("timestamp", "input_length", "output_length")
    trace.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    workload = {"kind": "trace", "path": str(trace), "spread_quantised": False}
    sections = {"latency": COSTS, "commits": TWO_STEPS_A_BLOCK} | sections
    run, results = run_of(workload=workload, **sections)
    check(run, results)
    return results


def times(columns: Columns, *names: str) -> list[list[float]]:
    return [[ns / 1e6 for ns in getattr(columns, f"{name}_ns").tolist()] for name in names]


A_THEN_B = [(0, 5, 32), (12, 5, 16)]  # two blocks; one block


def test_two_towers_mixed_rounds(tmp_path):
    """
    0   prefill A
    10  A denoise 1                      (B arrives at 12)
    14  A denoise 2, prefill B           -> A's first block visible at 28
    28  A extend, B denoise 1
    34  A denoise 1, B denoise 2         -> B's block visible at 38
    38  A denoise 2                      -> A's second block visible at 42
    """
    results = replay(tmp_path, A_THEN_B)
    admit, first, second, finish = times(results.columns, "admit", "first", "second", "finish")
    assert (admit, first, finish) == ([0, 14], [28, 38], [42, 38])
    assert second == [42, -1e-6]
    assert results.columns.nfe.tolist() == [4, 2]
    assert results.counts["rounds"] == 6
    latency, gap = (results.metrics[name] for name in ("block_latency", "commit_gap"))
    assert (latency["min"], latency["avg"], latency["max"]) == (8, 12, 18)  # A 18 and 8, B 10
    assert (gap["count"], gap["avg"]) == (1, 14)
    assert results.blocks == {"completed": 3, "by_steps": {"2": 3}, "idle_forwards": 0}
    share = results.utilisation["share_of_time"]["gpus"]
    expected = {"denoise": 20, "extend": 2, "prefill": 20, "extend+prefill": 0, "host": 0, "idle": 0}
    assert {name: round(value * 42, 6) for name, value in share.items()} == expected


def test_two_towers_prefill_first(tmp_path):
    """
    0   prefill A
    10  A denoise 1                      (B arrives at 12)
    14  prefill B
    24  A denoise 2, B denoise 1         -> A's first block visible at 28
    28  A extend, B denoise 2            -> B's block visible at 34
    34  A denoise 1
    38  A denoise 2                      -> A's second block visible at 42
    """
    results = replay(tmp_path, A_THEN_B, scheduler={"prefill": "first"})
    admit, first, finish = times(results.columns, "admit", "first", "finish")
    assert (admit, first, finish) == ([0, 14], [28, 34], [42, 34])
    assert results.counts["rounds"] == 7


def test_two_towers_side_by_side(tmp_path):
    """With ``compose: max`` a round takes its longest pass: prefill B hides A's second denoise pass, and so on."""
    results = replay(tmp_path, A_THEN_B, latency=COSTS | {"compose": "max"})
    first, finish = times(results.columns, "first", "finish")
    # 0 prefill A | 10 A 1 | 14 A 2 + prefill B | 24 A extend + B 1 | 28 A 1 + B 2 | 32 A 2
    assert (first, finish) == ([24, 32], [36, 32])


def test_two_towers_chunked_prefill(tmp_path):
    """A prompt of 40 tokens in chunks of 32 tokens less the 16 that the decoding sequence takes."""
    budget = {"max_num_seqs": 2, "max_num_batched_tokens": 32}
    results = replay(tmp_path, [(0, 5, 32), (12, 40, 16)], scheduler=budget)
    # 0 prefill A | 10 A 1 | 14 A 2 + B 16 | 28 A extend + B 16 | 40 A 1 + B 8 | 54 A 2 + B 1 | 58 B 2
    admit, first, finish = times(results.columns, "admit", "first", "finish")
    assert (admit, first, finish) == ([0, 14], [28, 62], [58, 62])


def test_autoregressive(tmp_path):
    """
    0   prefill A                        -> A's first token at 10 (B arrives at 11)
    10  A decode                         -> second at 13
    13  A decode, prefill B              -> A's third, B's first at 26
    26  B decode                         -> B's second at 29
    """
    results = replay(tmp_path, [(0, 5, 3), (11, 5, 2)], decoding={"kind": "autoregressive"})
    first, second, finish = times(results.columns, "first", "second", "finish")
    assert (first, second, finish) == ([10, 26], [13, 29], [26, 29])
    gap = results.metrics["commit_gap"]
    assert (gap["count"], gap["min"], gap["avg"], gap["max"]) == (3, 3, (3 + 13 + 3) / 3, 13)
    itl = results.metrics["inter_token_latency"]
    assert (itl["min"], itl["max"]) == (3, 8)  # B; A (26 - 10) / 2
    assert results.metrics["block_latency"]["count"] == 0


def test_autoregressive_preemption_by_recomputation(tmp_path):
    """Three KV blocks of four tokens for two prompts of four tokens.

    0   prefill A, B: a block each       -> first tokens at 10
    10  both need a second block: B, the latest, is sent back; A decodes alone until its sixth token at 25
    25  B's four prompt tokens and its first output are recomputed -> its second and last token at 35
    """
    results = replay(
        tmp_path,
        [(0, 4, 6), (0, 4, 2)],
        decoding={"kind": "autoregressive"},
        memory={"kv_block_tokens": 4, "kv_blocks": 3},
    )
    first, second, finish = times(results.columns, "first", "second", "finish")
    assert (first, second, finish) == ([10, 10], [13, 35], [25, 35])
    assert results.columns.preemptions.tolist() == [0, 1]
    assert results.memory["kv_blocks_peak"] == 3


def test_two_tower_preemption_keeps_committed_blocks(tmp_path):
    """Two prompts of a block each in a cache of three blocks; the first extend passes need two more.

    0   prefill A, B
    10  A 1, B 1
    14  A 2, B 2                         -> both first blocks visible at 18
    18  both extend passes need a KV block: B is sent back; A extends, 20 A 1, 24 A 2, done at 28
    28  B's prompt and its first block (32 tokens) are prefilled, 38 B 1, 42 B 2, done at 46
    """
    rows = [(0, 16, 32), (0, 16, 32)]
    results = replay(tmp_path, rows, memory={"kv_block_tokens": 16, "kv_blocks": 3})
    first, second, finish = times(results.columns, "first", "second", "finish")
    assert (first, second, finish) == ([18, 18], [28, 46], [28, 46])
    assert results.columns.nfe.tolist() == [4, 4]  # no denoise step was lost
    assert results.columns.preemptions.tolist() == [0, 1]


def test_shortest_prompt_goes_first(tmp_path):
    rows = [(0, 9, 16), (1, 8, 16), (2, 7, 16)]
    one = {"max_num_seqs": 1, "admission": "shortest_prompt"}
    admit, finish = times(replay(tmp_path, rows, scheduler=one).columns, "admit", "finish")
    assert (admit, finish) == ([0, 36, 18], [18, 54, 36])


def test_a_closed_loop_sends_the_next_request_when_the_last_is_answered():
    """Two users, four requests of one block: 10 + 4 + 4 ms together, then a second's thought."""
    constant = {"kind": "constant", "value": 16}
    _, results = run_of(
        workload={
            "kind": "closed_loop",
            "requests": 4,
            "concurrency": 2,
            "think_time_s": 1,
            "input_tokens": constant,
            "output_tokens": constant,
        },
        latency=COSTS,
        commits=TWO_STEPS_A_BLOCK,
    )
    arrival, finish = times(results.columns, "arrival", "finish")
    assert (arrival, finish) == ([0, 0, 1018, 1018], [18, 18, 1036, 1036])
