"""What the decoding sequences of a round do: a policy is one entry.

A policy bounds the denoise passes of a round, which ends sooner once every open block is done. ``in_turn``: the round
starts with the extends, and whoever extends denoises in the same round.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple


class Policy(NamedTuple):
    most_passes: Callable[[int], int]  # of steps_per_round
    in_turn: bool = False


POLICIES = {
    "fdfo": Policy(lambda steps_per_round: steps_per_round),  # first done, first out (SGLang)
    "lockstep": Policy(lambda steps_per_round: sys.maxsize, in_turn=True),  # together until the slowest block is done
}
