"""Rounds in which the same sequences take both passes: mock-AR's two towers, a drafter and what verifies it."""

from dataclasses import replace

from twotower_sim.latency import Latency


def paired(latency: Latency, own: int = 0) -> Latency:
    """``latency`` of two kinds of pass as one of rounds whose ``n`` sequences take one of each.

    ``own``: new tokens of a sequence that the round's context counts, and that of the passes does not.
    """

    def decode(n, context, n_extend, extend_context):
        return latency.decode(n, context - n * own, n, context - n * own)

    def decode_many(n, context, n_extend, extend_context):
        return latency.decode_many(n, context - n * own, n, context - n * own)

    def mixed(n, context, n_extend, extend_context, *prefill):
        return latency.mixed(n, context - n * own, n, context - n * own, *prefill)

    return replace(latency, decode=decode, decode_many=decode_many, mixed=mixed)
