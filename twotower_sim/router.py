"""Routers: which replica gets a request. A policy is one function and one entry.

A router sees what each replica has outstanding when the request arrives, and nothing of its future.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from twotower_sim.draws import uniform_one


class Replica(Protocol):
    """What a router may look at."""

    @property
    def outstanding_requests(self) -> int: ...
    @property
    def outstanding_tokens(self) -> int: ...


Router = Callable[[int, int, Sequence[Replica], int], int]
"""(request id, how many were routed before it, replicas, seed) to the index of a replica. Ties go to the first."""


def round_robin(request: int, turn: int, replicas: Sequence[Replica], seed: int) -> int:
    return turn % len(replicas)


def random(request: int, turn: int, replicas: Sequence[Replica], seed: int) -> int:
    return int(uniform_one(seed, "router", request, 0) * len(replicas))


def least_outstanding_requests(request: int, turn: int, replicas: Sequence[Replica], seed: int) -> int:
    return min(range(len(replicas)), key=lambda i: replicas[i].outstanding_requests)


def least_outstanding_tokens(request: int, turn: int, replicas: Sequence[Replica], seed: int) -> int:
    return min(range(len(replicas)), key=lambda i: replicas[i].outstanding_tokens)


def power_of_two(request: int, turn: int, replicas: Sequence[Replica], seed: int) -> int:
    """The less loaded of two replicas drawn at random (Mitzenmacher, 2001)."""
    first = random(request, turn, replicas, seed)
    if len(replicas) == 1:
        return first
    second = int(uniform_one(seed, "router", request, 1) * (len(replicas) - 1))
    second += second >= first
    return min((first, second), key=lambda i: replicas[i].outstanding_requests)


ROUTERS: dict[str, Router] = {
    "round_robin": round_robin,
    "random": random,
    "least_outstanding_requests": least_outstanding_requests,
    "least_outstanding_tokens": least_outstanding_tokens,
    "power_of_two": power_of_two,
}
LOAD_BLIND = {"round_robin", "random"}
"""Routers that look at no replica, so that replicas need not be brought up to date for them."""
