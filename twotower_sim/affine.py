"""Typed-in latency: every pass costs base + per sequence + per context token, as other simulators are told."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from twotower_sim.latency import Latency


@dataclass(frozen=True)
class Pass:
    """Costs of one kind of pass in milliseconds; a pass of nobody costs nothing."""

    base_ms: float = 0.0
    per_seq_ms: float = 0.0
    per_context_token_ms: float = 0.0

    def seconds(self, most: int) -> np.ndarray:
        """Without context, by number of sequences: (most + 1,)."""
        n = np.arange(most + 1)
        return np.where(n > 0, self.base_ms + self.per_seq_ms * n, 0.0) * 1e-3

    @property
    def context_token_s(self) -> float:
        return self.per_context_token_ms * 1e-3


@dataclass(frozen=True)
class Prefill:
    base_ms: float = 0.0
    per_new_token_ms: float = 0.0

    def seconds(self, tokens: int) -> float:
        return (self.base_ms + self.per_new_token_ms * tokens) * 1e-3


def _combine(compose: str) -> Callable:
    """(maximum, a, b) to the time of two passes in one round."""
    return {"sum": lambda maximum, a, b: a + b, "max": lambda maximum, a, b: maximum(a, b)}[compose]


def autoregressive_affine(prefill: Prefill, decode: Pass, compose: str, host_s: float, max_num_seqs: int) -> Latency:
    combine, token_s = _combine(compose), decode.context_token_s

    def decode_cost(maximum, decode_s):
        def cost(n, context, n_extend, extend_context):
            context_s = decode_s[n] + context * token_s
            return 0.0, context_s, host_s + context_s

        return cost

    def mixed(n, context, n_extend, extend_context, tokens, pairs, prefill_context, n_prefill):
        context_s = combine(max, latency.decode(n, context, 0, 0)[1], prefill.seconds(tokens))
        return 0.0, context_s, host_s + context_s

    latency = Latency.of(decode_cost, (decode.seconds(max_num_seqs),), mixed, side_by_side=compose == "max")
    return latency


def two_tower_affine(
    prefill: Prefill, denoise: Pass, extend: Pass, compose: str, host_s: float, max_num_seqs: int
) -> Latency:
    combine, denoise_token_s, extend_token_s = _combine(compose), denoise.context_token_s, extend.context_token_s

    def decode_cost(maximum, denoise_s, extend_s):
        def cost(n, context, n_extend, extend_context):
            denoiser_s = denoise_s[n] + context * denoise_token_s
            context_s = extend_s[n_extend] + extend_context * extend_token_s
            return denoiser_s, context_s, host_s + combine(maximum, denoiser_s, context_s)

        return cost

    def mixed(n, context, n_extend, extend_context, tokens, pairs, prefill_context, n_prefill):
        denoiser_s, extend_s, _ = latency.decode(n, context, n_extend, extend_context)
        context_s = combine(max, extend_s, prefill.seconds(tokens))
        return denoiser_s, context_s, host_s + combine(max, denoiser_s, context_s)

    tables = denoise.seconds(max_num_seqs), extend.seconds(max_num_seqs)
    latency = Latency.of(decode_cost, tables, mixed, side_by_side=compose == "max")
    return latency
