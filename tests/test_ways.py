"""Every way of serving: invariants under tight memory, the same luck, the same bytes, and what must agree with what."""

import json

import numpy as np
import pytest
from conftest import AFFINE, run_of, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check

from twotower_sim.metrics import evaluate
from twotower_sim.plan import Bursts
from twotower_sim.result import summary
from twotower_sim.simulation import prepare, simulate

COSTS = AFFINE | {"draft": {"base_ms": 1}, "transfer": {"per_seq_ms": 0.5, "per_context_token_ms": 1e-3}}
TIGHT = {"kv_block_tokens": 16, "kv_blocks": 200, "state_slots": 12, "oversized": "reject"}
BY_QUEUE = {"kind": "by_queue", "levels": [{"waiting": 2, "gamma": 0.6}]}


def pools(context: int, denoiser: int, **more) -> dict:
    return {"deployment": {"placement": {"kind": "pools", "context": context, "denoiser": denoiser} | more}}


BLOCKS = {
    "fdfo": {},
    "colocated": {"deployment": {"placement": {"kind": "colocated"}, "tensor_parallel": 2}},
    "steps_per_round": {"scheduler": {"steps_per_round": 3}},
    "lockstep": {"scheduler": {"policy": "lockstep"}},
    "capped": {"scheduler": {"max_extends_per_round": 1}},
    "prefill first": {"scheduler": {"prefill": "first"}},
    "prefill last": {"scheduler": {"prefill": "last"}},
    "asynchronous": {"deployment": {"placement": {"kind": "split", "mode": "asynchronous"}}},
    "pools": pools(1, 2),
    "pools, free and blocking": pools(2, 3, assignment="free", transfer="blocking"),
    "prefix cache": {"memory": {"prefix_cache": {"kind": "hybrid", "state_checkpoint_every": 64}}},
}
OTHERS = {
    "by queue": {"decoding": {"kind": "two_tower", "gamma_policy": BY_QUEUE}},
    "by queue in pools": pools(1, 2) | {"decoding": {"kind": "two_tower", "gamma_policy": BY_QUEUE}},
    "autoregressive": {"decoding": {"kind": "autoregressive"}},
    "mock_ar": {"decoding": {"kind": "mock_ar"}},
    "speculative": {"decoding": {"kind": "speculative", "acceptance": [0.8, 0.6, 0.5]}},
    "block_diffusion": {"decoding": {"kind": "block_diffusion", "block_size": 16}},
    "block_diffusion of 256": {
        "decoding": {"kind": "block_diffusion", "block_size": 256},
        "commits": {"kind": "constant", "tokens_per_step": 16},
        "scheduler": {"max_num_seqs": 16},
    },
    "block_diffusion, lockstep": {
        "decoding": {"kind": "block_diffusion", "block_size": 16},
        "scheduler": {"policy": "lockstep"},
    },
}
WAYS = BLOCKS | OTHERS


def run_way(name: str, tight: bool = False, **more):
    sections = {"workload": synthetic(requests=80, rate_rps=30), "latency": COSTS} | WAYS[name] | more
    if tight:
        sections["memory"] = TIGHT | sections.get("memory", {})
    return run_of(**sections)


@pytest.mark.parametrize("name", sorted(WAYS))
def test_invariants_hold_under_tight_memory(name):
    run, results = run_way(name, tight=True)
    check(run, results)
    assert results.counts["completed"] > 60
    if name not in ("prefill last", "pools, free and blocking", "block_diffusion of 256"):  # where few sequences meet
        assert results.counts["preemptions"] > 0


@pytest.mark.parametrize("name", sorted(WAYS))
def test_the_same_scenario_gives_the_same_bytes(name):
    first, second = (json.dumps(summary(*run_way(name, tight=True)), sort_keys=True, default=float) for _ in range(2))
    assert first == second


def test_luck_does_not_depend_on_how_it_is_served():
    nfe = {name: run_way(name)[1].columns.nfe.tolist() for name in BLOCKS}
    assert all(counts == nfe["fdfo"] for counts in nfe.values())


@pytest.mark.parametrize("router", ["round_robin", "least_outstanding_tokens"])
@pytest.mark.parametrize("name", sorted(WAYS))
def test_replicas_share_the_load_in_open_and_closed_loops(name, router):
    length = {"kind": "lognormal", "mean": 100, "cv": 0.7}
    loop = {"kind": "closed_loop", "requests": 60, "concurrency": 9, "input_tokens": length, "output_tokens": length}
    deployment = {"deployment": {"replicas": 3} | WAYS[name].get("deployment", {}), "router": {"kind": router}}
    for load in (loop, synthetic(requests=60, rate_rps=40)):
        run, results = run_way(name, workload=load, **deployment)
        check(run, results)
        assert all(replica["requests"] > 0 for replica in results.utilisation["replicas"])


def test_one_user_does_not_notice_whether_towers_wait_for_each_other():
    """In tandem and in rounds, the passes of a lone sequence follow each other (a round is a whole number of ns)."""
    length = {"kind": "constant", "value": 100}
    loop = {"kind": "closed_loop", "requests": 20, "concurrency": 1, "input_tokens": length, "output_tokens": length}
    rounds, tandem = (
        run_of(workload=loop, deployment={"placement": {"kind": "split", "mode": mode}})[1].columns
        for mode in ("synchronous", "asynchronous")
    )
    assert np.abs(rounds.finish_ns - tandem.finish_ns).max() < 10 * len(rounds.finish_ns) * 7


def test_a_second_denoiser_doubles_what_denoisers_bound():
    length = {"kind": "constant", "value": 64}
    loop = {"kind": "closed_loop", "requests": 400, "concurrency": 32, "input_tokens": length, "output_tokens": length}
    costs = {
        "kind": "affine",
        "prefill": {"base_ms": 0.1},
        "denoise": {"base_ms": 1, "per_seq_ms": 5},
        "extend": {"base_ms": 0.1},
    }
    one, two = (
        run_of(workload=loop, latency=costs, **pools(1, n))[1].metrics["output_token_throughput"]["avg"] for n in (1, 2)
    )
    assert 1.8 < two / one < 2.1


def test_hidden_host_work_is_free_until_it_is_longer_than_the_passes():
    base, hidden, paid = (
        run_way("fdfo", scheduler=scheduler)[1].metrics["request_latency"]["avg"]
        for scheduler in ({}, {"host_overhead_ms": 1, "overlap": "hidden"}, {"host_overhead_ms": 1})
    )
    assert base == hidden < paid


def test_bursts_have_the_length_that_acceptance_gives():
    bursts = Bursts([0.8, 0.5], seed=3, output_tokens=np.full(40, 1000))
    tokens = np.concatenate([bursts.of(request) for request in range(40)])
    assert set(tokens) == {1, 2, 3}
    assert tokens.mean() == pytest.approx(1 + 0.8 + 0.8 * 0.5, abs=4 * tokens.std() / 200)
    again = Bursts([0.8, 0.5], seed=3, output_tokens=np.full(40, 1000))
    assert again.of(7) == bursts.of(7) != bursts.of(8)


def test_the_engine_of_rounds_gives_the_same_summary_where_the_fast_one_applies():
    for name in ("fdfo", "colocated", "prefill first", "prefill last", "autoregressive", "block_diffusion"):
        fast, _ = run_way(name)
        assert fast.fast
        slow = prepare(fast.scenario)
        slow.may_be_fast = False
        figures = [evaluate(simulate(run)) for run in (prepare(fast.scenario), slow)]
        for one, other in zip(*(vars(of.columns).values() for of in figures), strict=True):
            assert (one == other).all()
        mine, theirs = figures
        assert (mine.metrics, mine.blocks, mine.quality) == (theirs.metrics, theirs.blocks, theirs.quality)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(WAYS)),
    seed=st.integers(0, 10**6),
    rate=st.sampled_from([0.5, 8, 200]),
    seats=st.sampled_from([1, 3, 40]),
    blocks=st.sampled_from([150, 220, 4000]),
    admission=st.sampled_from(["fcfs", "shortest_prompt"]),
    chunked=st.booleans(),
)
def test_invariants_hold_for_any_load(name, seed, rate, seats, blocks, admission, chunked):
    scheduler = {"max_num_seqs": seats, "admission": admission, "chunked_prefill": chunked}
    sections = WAYS[name] | {
        "seed": seed,
        "workload": synthetic(requests=40, rate_rps=rate, input_tokens=200),
        "latency": COSTS,
        "scheduler": scheduler | WAYS[name].get("scheduler", {}),
        "memory": {"kv_blocks": blocks, "state_slots": 40, "oversized": "reject"} | WAYS[name].get("memory", {}),
    }
    run, results = run_of(**sections)
    check(run, results)
