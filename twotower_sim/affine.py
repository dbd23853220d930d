"""Typed-in latency: every pass costs base + per sequence + per context token, as other simulators are told."""

from collections.abc import Callable

import numpy as np

from twotower_sim.latency import Latency

Pass = tuple[float, float, float]
"""base_ms, per_seq_ms, per_context_token_ms."""
Prefill = tuple[float, float]
"""base_ms, per_new_token_ms."""


def autoregressive_affine(
    prefill: Prefill, decode: Pass, compose: str, host_overhead_s: float, max_num_seqs: int, max_num_batched_tokens: int
) -> Latency:
    combine = _combine(compose)

    def formula(maximum: Callable, decode_s, prefill_s):
        def cost(n, context, n_extend=0, extend_context=0, prefill_tokens=0, prefill_pairs=0, n_prefill=0):
            passes_s = decode_s[n] + context * decode[2] * 1e-3, prefill_s[prefill_tokens]
            context_s = combine(maximum, *passes_s)
            return 0.0 * context_s, context_s, host_overhead_s + context_s

        return cost

    tables = _per_sequence(decode, max_num_seqs), _per_token(prefill, max_num_batched_tokens)
    return Latency.of(formula, tables, side_by_side=compose == "max")


def two_tower_affine(
    prefill: Prefill,
    denoise: Pass,
    extend: Pass,
    compose: str,
    host_overhead_s: float,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> Latency:
    combine = _combine(compose)

    def formula(maximum: Callable, denoise_s, extend_s, prefill_s):
        def cost(n, context, n_extend, extend_context, prefill_tokens=0, prefill_pairs=0, n_prefill=0):
            denoiser_s = denoise_s[n] + context * denoise[2] * 1e-3
            passes_s = extend_s[n_extend] + extend_context * extend[2] * 1e-3, prefill_s[prefill_tokens]
            context_s = combine(maximum, *passes_s)
            return denoiser_s, context_s, host_overhead_s + combine(maximum, denoiser_s, context_s)

        return cost

    tables = (
        _per_sequence(denoise, max_num_seqs),
        _per_sequence(extend, max_num_seqs),
        _per_token(prefill, max_num_batched_tokens),
    )
    return Latency.of(formula, tables, side_by_side=compose == "max")


def _combine(compose: str) -> Callable:
    """(maximum, a, b) to the time of two passes in one round."""
    return {"sum": lambda maximum, a, b: a + b, "max": lambda maximum, a, b: maximum(a, b)}[compose]


def _per_sequence(cost: Pass, most: int) -> np.ndarray:
    n = np.arange(most + 1)
    return np.where(n > 0, cost[0] + cost[1] * n, 0.0) * 1e-3


def _per_token(cost: Prefill, most: int) -> np.ndarray:
    n = np.arange(most + 1)
    return np.where(n > 0, cost[0] + cost[1] * n, 0.0) * 1e-3
