"""Routers: where requests go, and what routers may see."""

from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import AFFINE, run_of, synthetic
from invariants import check

from twotower_sim.router import ROUTERS


def replicas(*load):
    return [SimpleNamespace(outstanding_requests=r, outstanding_tokens=t) for r, t in load]


def chosen(router, fleet, requests=1, seed=0):
    return [ROUTERS[router](request, request, fleet, seed) for request in range(requests)]


def test_round_robin_takes_turns():
    assert chosen("round_robin", replicas((9, 9), (0, 0), (5, 5)), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_random_is_even_and_keyed():
    fleet = replicas(*[(0, 0)] * 4)
    picks = chosen("random", fleet, 8000)
    assert all(abs(count - 2000) < 4 * (8000 * 3 / 16) ** 0.5 for count in Counter(picks).values())
    assert picks == chosen("random", fleet, 8000)
    assert picks != chosen("random", fleet, 8000, seed=1)


def test_least_outstanding_takes_the_first_of_equals():
    assert chosen("least_outstanding_requests", replicas((3, 0), (2, 9), (2, 1))) == [1]
    assert chosen("least_outstanding_tokens", replicas((3, 5), (2, 9), (2, 5))) == [0]


def test_power_of_two_compares_two_different_replicas():
    fleet = replicas((0, 0), (1, 0), (2, 0))
    picks = Counter(chosen("power_of_two", fleet, 3000))
    assert picks[2] == 0  # it always meets a less loaded one
    assert picks[0] == pytest.approx(2000, abs=150)
    assert chosen("power_of_two", replicas((7, 0)), 3) == [0, 0, 0]


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_a_fleet_under_each_router(router):
    run, results = run_of(
        workload=synthetic(requests=300, rate_rps=30),
        deployment={"replicas": 3},
        router={"kind": router},
        latency=AFFINE,
    )
    check(run, results)
    shares = [replica["requests"] for replica in results.utilisation["replicas"]]
    assert sum(shares) == 300
    assert min(shares) > 50


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_routers_see_no_future(router):
    """Invariant 7: longer answers after a moment change no decision before it."""

    def routed(output_tokens):
        run, _ = run_of(
            workload=synthetic(requests=60, rate_rps=1000)
            | {"output_tokens": {"kind": "constant", "value": output_tokens}},
            deployment={"replicas": 3},
            router={"kind": router},
            commits={"kind": "constant", "tokens_per_step": 1},
            latency=AFFINE,
        )
        return run.records.replica.tolist()

    assert routed(16) == routed(4000)  # all arrive before the first answer ends


def test_looking_at_the_load_beats_chance():
    def wait(router):
        workload = synthetic(requests=5000, rate_rps=30, output_tokens=120)
        _, results = run_of(
            workload=workload, deployment={"replicas": 4}, router={"kind": router}, latency=AFFINE,
            scheduler={"max_num_seqs": 8},
        )  # fmt: skip
        return results.metrics["queue_time"]["avg"]

    assert wait("least_outstanding_requests") < wait("power_of_two") < wait("random")
