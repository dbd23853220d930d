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


# ---------------------------------------------------------------------- policies


def test_lockstep(tmp_path):
    """
    0   prefill A
    10  A denoise 1 and 2                -> A's first block visible at 18 (B arrives at 12)
    18  A extend, prefill B, then A denoise 1 and 2 -> A's second block visible at 38
    38  B denoise 1 and 2                -> B's block visible at 46
    """
    results = replay(tmp_path, A_THEN_B, scheduler={"policy": "lockstep"})
    first, finish = times(results.columns, "first", "finish")
    assert (first, finish) == ([18, 46], [38, 46])
    assert results.counts["rounds"] == 4


def test_two_steps_a_round(tmp_path):
    """
    0   prefill A
    10  A denoise 1 and 2                -> A's first block visible at 18 (B arrives at 12)
    18  A extend, prefill B
    30  A and B denoise 1 and 2          -> both visible at 38
    """
    results = replay(tmp_path, A_THEN_B, scheduler={"steps_per_round": 2})
    first, finish = times(results.columns, "first", "finish")
    assert (first, finish) == ([18, 38], [38, 38])


def test_a_block_that_is_done_keeps_its_place_to_the_end_of_the_round(tmp_path):
    """
    0   prefill A
    10  A denoise 1 and 2, prefill B
    28  A denoise 3, B denoise 1, both once more  -> A's block visible at 36, not 32
    36  B denoise 3: nobody needs a second pass   -> B's block visible at 40
    """
    three_steps = {"kind": "constant", "tokens_per_step": 6}
    rows = [(0, 5, 16), (1, 5, 16)]
    results = replay(tmp_path, rows, scheduler={"steps_per_round": 2}, commits=three_steps)
    (finish,) = times(results.columns, "finish")
    assert finish == [36, 40]
    assert results.columns.nfe.tolist() == [3, 3]
    assert results.blocks["idle_forwards"] == 1


def test_prompts_last(tmp_path):
    """B waits until A has left at 28, is prefilled to 38, and takes its two steps."""
    results = replay(tmp_path, A_THEN_B, scheduler={"prefill": "last"})
    admit, first, finish = times(results.columns, "admit", "first", "finish")
    assert (admit, first, finish) == ([0, 28], [18, 46], [28, 46])


def test_one_extend_a_round(tmp_path):
    """
    0   prefill A, B; 10 both denoise 1, 14 both 2   -> first blocks visible at 18
    18  A extend (B waits); 20 A denoise 1, B extend; 26 A 2, B 1 -> A done at 30; 30 B 2 -> B done at 34
    """
    results = replay(tmp_path, [(0, 5, 32), (0, 5, 32)], scheduler={"max_extends_per_round": 1})
    (finish,) = times(results.columns, "finish")
    assert finish == [30, 34]


def test_host_work_behind_the_passes_or_before_them(tmp_path):
    """Prefill 10 ms, then two steps of 4 ms, with 5 ms of host work a round."""
    for overlap, end in (("none", 33), ("hidden", 20)):
        host = {"host_overhead_ms": 5, "overlap": overlap}
        (finish,) = times(replay(tmp_path, [(0, 5, 16)], scheduler=host).columns, "finish")
        assert finish == [end]


# ---------------------------------------------------------------------- ways to decode


def test_mock_ar(tmp_path):
    """Prefill to 10, then rounds of a denoiser and a context pass, 4 + 3 ms; the prefill gives no token."""
    results = replay(tmp_path, [(0, 5, 3)], decoding={"kind": "mock_ar"})
    first, second, finish = times(results.columns, "first", "second", "finish")
    assert (first, second, finish) == ([17], [24], [31])
    assert results.columns.nfe.tolist() == [3]
    assert (results.metrics["commit_gap"]["count"], results.metrics["commit_gap"]["avg"]) == (2, 7)


def test_speculative(tmp_path):
    """Draft 1 ms, verify 3 ms, prefill 10 ms: the round that ends the prefill verifies too. Two drafts, always accepted:
    three tokens at 14 and 18, the seventh at 22."""
    decoding = {"kind": "speculative", "draft_tokens": 2, "acceptance": 1.0, "drafter": {"kind": "ngram"}}
    results = replay(tmp_path, [(0, 5, 7)], decoding=decoding, latency=COSTS | {"draft": {"base_ms": 1}})
    first, second, finish = times(results.columns, "first", "second", "finish")
    assert (first, second, finish) == ([14], [18], [22])
    assert results.metrics["acceptance_length"]["avg"] == 7 / 3
    results = replay(tmp_path, [(0, 5, 7)], decoding=decoding | {"acceptance": 0.0})
    assert times(results.columns, "finish") == [[13 + 6 * 3]]
    assert results.metrics["acceptance_length"]["avg"] == 1


def test_block_diffusion_in_one_tower(tmp_path):
    """As two towers whose passes share a forward: A's second denoise, B's prefill, A's extend and so on add up here."""
    results = replay(
        tmp_path, A_THEN_B, decoding={"kind": "block_diffusion", "block_size": 16}, model="nemotron-3-nano-30b-a3b"
    )
    first, finish = times(results.columns, "first", "finish")
    assert (first, finish) == ([28, 38], [42, 38])
    share = results.utilisation["share_of_time"]["gpus"]
    assert round(share["decode"] * 42, 6) == 4 + 6 + 4 + 4  # without prompts
    assert round(share["decode+prefill"] * 42, 6) == 14


# ---------------------------------------------------------------------- towers in tandem


def tandem(transfer: str = "overlapped", **placement) -> dict:
    return {"placement": {"kind": "pools", "context": 1, "denoiser": 1, "transfer": transfer} | placement}


SENT = COSTS | {"transfer": {"base_ms": 3}}


def test_tandem(tmp_path):
    """Context server (C), its link (L) and denoiser server (D), each working for itself:

    0   C prefill A; 10 L A; 13 D A 1; 17 D A 2         -> A's first block visible at 21
    12  C prefill B; 22 L B; 22 C extend A; 25 L A (the link was busy)
    25  D B 1 (A arrives at 28); 29 D A 1, B 2          -> B's block visible at 33
    33  D A 2                                           -> A's second block visible at 37
    """
    for deployment in (tandem(), {"placement": {"kind": "split", "mode": "asynchronous"}}):
        results = replay(tmp_path, A_THEN_B, deployment=deployment, latency=SENT)
        admit, first, finish = times(results.columns, "admit", "first", "finish")
        assert (admit, first, finish) == ([0, 12], [21, 33], [37, 33])
        assert results.columns.nfe.tolist() == [4, 2]
        assert results.counts["rounds"] == 3 + 5
    share = results.utilisation["share_of_time"]
    assert {name: round(value * 37, 6) for name, value in share["denoiser"].items()} == {
        "denoise": 20, "host": 0, "idle": 17,
    }  # fmt: skip
    assert round(share["context"]["prefill"] * 37, 6) == 20


def test_tandem_with_blocking_transfers(tmp_path):
    """
    0   C prefill A; 10 L A, C waits; 13 D A 1; 17 D A 2 -> A's first block visible at 21
    13  C prefill B; 23 L B, C waits; 26 D B 1; 30 D B 2 -> B's block visible at 34
    26  C extend A; 28 L A; 34 D A 1; 38 D A 2           -> A's second block visible at 42
    """
    results = replay(tmp_path, A_THEN_B, deployment=tandem("blocking"), latency=SENT)
    first, finish = times(results.columns, "first", "finish")
    assert (first, finish) == ([21, 34], [42, 34])
    assert round(results.utilisation["share_of_time"]["context"]["host and transfer"] * 42, 6) == 9


def test_pools_with_a_denoiser_for_each(tmp_path):
    """B goes to the second denoiser server, which A does not share: 25 B 1, 29 B 2; A's second block from 28 on."""
    results = replay(tmp_path, A_THEN_B, deployment=tandem(denoiser=2), latency=SENT)
    first, finish = times(results.columns, "first", "finish")
    assert (first, finish) == ([21, 33], [36, 33])


def test_free_assignment_takes_its_whole_context_along(tmp_path):
    """A blocks' state costs nothing to send and a token 1 ms: A's 16 + 16 tokens go along when it moves.

    0   C prefill A (16 tokens), 10 L A to D0, 26 A 1, 30 A 2 -> visible at 34; 34 C extend A; 36 L A
    sticky: 16 tokens more, D0 from 52 on. free: D0 and D1 are both empty: A stays where it is, and sends as much.
    """
    token = COSTS | {"transfer": {"per_context_token_ms": 1}}
    rows = [(0, 16, 32)]
    for assignment in ("sticky", "free"):
        results = replay(tmp_path, rows, deployment=tandem(denoiser=2, assignment=assignment), latency=token)
        assert times(results.columns, "first", "finish") == [[34], [60]]


# ---------------------------------------------------------------------- prefixes


def shared_prompts(tmp_path, cache: dict, **sections):
    """Three prompts of 2,048 tokens, the second and third as the first, at 0.01 ms a token; a second apart."""
    trace = tmp_path / "trace.jsonl"
    row = {"input_length": 2048, "output_length": 1, "hash_ids": [1, 2, 3, 4]}
    trace.write_text("".join(json.dumps({"timestamp": 1000 * i} | row) + "\n" for i in range(3)))
    run, results = run_of(
        workload={"kind": "trace", "path": str(trace)},
        decoding={"kind": "autoregressive"},
        model="nemotron-3-nano-30b-a3b",
        latency={"kind": "affine", "prefill": {"per_new_token_ms": 0.01}, "decode": {"base_ms": 3}},
        memory={"kv_block_tokens": 256, "kv_blocks": 100, "state_slots": 8, "prefix_cache": cache} | sections,
    )
    check(run, results)
    return results


def test_a_prompt_resumes_after_the_longest_resident_prefix(tmp_path):
    """Seven of eight blocks of 256 tokens hit: the last token has to be computed."""
    results = shared_prompts(tmp_path, {"kind": "attention"})
    assert results.metrics["time_to_first_token"]["max"] == 20.48
    assert results.metrics["time_to_first_token"]["min"] == 2.56
    cache = results.memory["prefix_cache"]
    assert (cache["blocks_hit"], cache["blocks_looked_up"], cache["tokens_reused"]) == (14, 21, 3584)


def test_a_hybrid_prompt_resumes_where_its_state_was_kept(tmp_path):
    """States are kept after 1,024 and 2,048 tokens: the first of them is inside the seven blocks."""
    results = shared_prompts(tmp_path, {"kind": "hybrid", "state_checkpoint_every": 1024})
    assert results.metrics["time_to_first_token"]["min"] == 10.24
    assert results.memory["prefix_cache"]["tokens_reused"] == 2048


def test_without_a_free_state_slot_nothing_is_resumed(tmp_path):
    results = shared_prompts(tmp_path, {"kind": "hybrid", "state_checkpoint_every": 1024}, state_slots=1)
    assert results.metrics["time_to_first_token"]["min"] == 20.48


# ---------------------------------------------------------------------- thresholds


def test_a_class_has_its_own_threshold_and_its_quality_stands_beside(tmp_path):
    rows = [(100 * i, 50, 64) for i in range(200)]
    trace = tmp_path / "trace.jsonl"
    keys = ("timestamp", "input_length", "output_length")
    trace.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    run, results = run_of(
        workload={"kind": "trace", "path": str(trace), "classes": {"chat": 0.5, "batch": 0.5}},
        decoding={"kind": "two_tower", "gamma_by_class": {"batch": 0.6}},
    )
    check(run, results)
    assert {gamma: of["retained"] for gamma, of in results.quality.items()} == {"0.6": None, "0.8": 0.987}
    classes = results.classes
    assert classes["chat"]["requests"] + classes["batch"]["requests"] == 200
    assert classes["batch"]["request_latency"]["avg"] < classes["chat"]["request_latency"]["avg"]
    assert results.quality["0.6"]["share_of_blocks"] == classes["batch"]["requests"] / 200


def test_the_threshold_falls_while_requests_wait(tmp_path):
    """One seat: while B waits, A's blocks get gamma 0.5; B's, whom nobody follows, 0.8. Luck stays what it is."""
    rows = [(0, 5, 160), (0, 5, 160)]
    levels = [{"waiting": 1, "gamma": 0.5}]
    one_seat = {"max_num_seqs": 1}
    observed = {"commits": {"kind": "observed"}, "scheduler": one_seat}
    falling = replay(
        tmp_path,
        rows,
        decoding={"kind": "two_tower", "gamma_policy": {"kind": "by_queue", "levels": levels}},
        **observed,
    )
    assert {gamma: of["share_of_blocks"] for gamma, of in falling.quality.items()} == {"0.5": 0.5, "0.8": 0.5}
    low, high = (replay(tmp_path, rows, decoding={"kind": "two_tower", "gamma": g}, **observed) for g in (0.5, 0.8))
    assert falling.columns.nfe.tolist() == [low.columns.nfe[0], high.columns.nfe[1]]
