"""What the decoding sequences of a round do: a policy is one function and one entry.

A policy gives the denoise passes of a round; the engine asks it at the round's start and knows no more than that
blocks are open. ``in_turn``: the round starts with the extends, and whoever extends denoises in the same round.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple


def fdfo(left: Iterable[int], steps_per_round: int) -> int:
    """First done, first out (SGLang): ``steps_per_round`` passes, fewer once every block is done."""
    return 1 if steps_per_round == 1 else min(steps_per_round, max(left))


def lockstep(left: Iterable[int], steps_per_round: int) -> int:
    """The batch denoises together until its slowest block is done."""
    return max(left)


class Policy(NamedTuple):
    """``forwards(left, steps_per_round)``: ``left`` are the passes until each open block will be done, which the loop
    on the GPU finds out as it goes."""

    forwards: Callable[[Iterable[int], int], int]
    in_turn: bool = False


POLICIES = {"fdfo": Policy(fdfo), "lockstep": Policy(lockstep, in_turn=True)}
