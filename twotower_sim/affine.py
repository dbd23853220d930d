"""Typed-in latency: every pass costs base + per sequence + per context token, as other simulators are told."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from twotower_sim.latency import Host, Latency, no_transfer
from twotower_sim.paired import paired


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

    def sent(self, states, tokens):
        """Seconds of a transfer of ``states`` sequences' states and ``tokens`` keys and values; numbers or arrays."""
        return ((states > 0) * self.base_ms + states * self.per_seq_ms + tokens * self.per_context_token_ms) * 1e-3


@dataclass(frozen=True)
class Prefill:
    base_ms: float = 0.0
    per_new_token_ms: float = 0.0

    def seconds(self, tokens: int) -> float:
        return (self.base_ms + self.per_new_token_ms * tokens) * 1e-3


def _combine(compose: str) -> Callable:
    """(maximum, a, b) to the time of two passes in one round."""
    return {"sum": lambda maximum, a, b: a + b, "max": lambda maximum, a, b: maximum(a, b)}[compose]


def autoregressive_affine(prefill: Prefill, decode: Pass, compose: str, host: Host, max_num_seqs: int) -> Latency:
    combine, token_s = _combine(compose), decode.context_token_s

    def decode_cost(maximum, decode_s):
        def cost(n, context, n_extend, extend_context):
            context_s = decode_s[n] + context * token_s
            return 0.0, context_s, host.around(maximum, context_s)

        return cost

    def mixed(n, context, n_extend, extend_context, tokens, pairs, prefill_context, n_prefill):
        context_s = combine(max, latency.decode(n, context, 0, 0)[1], prefill.seconds(tokens))
        return 0.0, context_s, host.around(max, context_s)

    tables = (decode.seconds(max_num_seqs),)
    latency = Latency.of(decode_cost, tables, mixed, side_by_side=compose == "max", host=host)
    return latency


def two_tower_affine(
    prefill: Prefill,
    denoise: Pass,
    extend: Pass,
    compose: str,
    host: Host,
    max_num_seqs: int,
    *,
    block_size: int,
    transfer: Pass | None = None,
) -> Latency:
    """``transfer``: what the context tower sends before a round ends: ``per_seq_ms`` for the state of each sequence
    that extends or is prefilled, ``per_context_token_ms`` for each token's keys and values."""
    combine, denoise_token_s, extend_token_s = _combine(compose), denoise.context_token_s, extend.context_token_s
    sent = transfer.sent if transfer else no_transfer

    def decode_cost(maximum, denoise_s, extend_s):
        def cost(n, context, n_extend, extend_context):
            denoiser_s = denoise_s[n] + context * denoise_token_s
            context_s = extend_s[n_extend] + extend_context * extend_token_s
            sent_s = context_s + sent(n_extend, n_extend * block_size)
            return denoiser_s, context_s, host.around(maximum, combine(maximum, denoiser_s, sent_s))

        return cost

    def mixed(n, context, n_extend, extend_context, tokens, pairs, prefill_context, n_prefill):
        denoiser_s, extend_s, _ = latency.decode(n, context, n_extend, extend_context)
        context_s = combine(max, extend_s, prefill.seconds(tokens))
        sent_s = context_s + sent(n_extend + n_prefill, n_extend * block_size + tokens)
        return denoiser_s, context_s, host.around(max, combine(max, denoiser_s, sent_s))

    tables = denoise.seconds(max_num_seqs), extend.seconds(max_num_seqs)
    latency = Latency.of(decode_cost, tables, mixed, side_by_side=compose == "max", host=host, transfer=sent)
    return latency


def mock_ar_affine(
    prefill: Prefill,
    denoise: Pass,
    decode: Pass,
    compose: str,
    host: Host,
    max_num_seqs: int,
    transfer: Pass | None = None,
) -> Latency:
    """``denoise`` predicts the next token of each sequence, ``decode`` reads the last one into the context tower."""
    return paired(
        two_tower_affine(prefill, denoise, decode, compose, host, max_num_seqs, block_size=1, transfer=transfer)
    )


def speculative_affine(
    prefill: Prefill, decode: Pass, draft: Pass, compose: str, host: Host, max_num_seqs: int
) -> Latency:
    """``draft``: all drafts of a round; then ``decode``, which verifies them, beside prompts as ``compose`` says."""
    combine, draft_token_s, token_s = _combine(compose), draft.context_token_s, decode.context_token_s

    def decode_cost(maximum, draft_s, decode_s):
        def cost(n, context, n_extend, extend_context):
            drafter_s = draft_s[n] + context * draft_token_s
            context_s = decode_s[n] + context * token_s
            return drafter_s, context_s, host.around(maximum, drafter_s + context_s)

        return cost

    def mixed(n, context, n_extend, extend_context, tokens, pairs, prefill_context, n_prefill):
        drafter_s, verify_s, _ = latency.decode(n, context, 0, 0)
        context_s = combine(max, verify_s, prefill.seconds(tokens))
        return drafter_s, context_s, host.around(max, drafter_s + context_s)

    tables = draft.seconds(max_num_seqs), decode.seconds(max_num_seqs)
    latency = Latency.of(decode_cost, tables, mixed, side_by_side=False, host=host)
    return latency


def block_diffusion_affine(
    prefill: Prefill, denoise: Pass, extend: Pass, compose: str, host: Host, max_num_seqs: int
) -> Latency:
    """One tower, one forward of denoised blocks, extends and prompts, whose costs ``compose`` joins."""
    combine, denoise_token_s, extend_token_s = _combine(compose), denoise.context_token_s, extend.context_token_s

    def decode_cost(maximum, denoise_s, extend_s):
        def cost(n, context, n_extend, extend_context):
            denoised_s = denoise_s[n] + context * denoise_token_s
            context_s = combine(maximum, denoised_s, extend_s[n_extend] + extend_context * extend_token_s)
            return 0.0, context_s, host.around(maximum, context_s)

        return cost

    def mixed(n, context, n_extend, extend_context, tokens, pairs, prefill_context, n_prefill):
        blocks_s = latency.decode(n, context, n_extend, extend_context)[1]
        context_s = combine(max, blocks_s, prefill.seconds(tokens))
        return 0.0, context_s, host.around(max, context_s)

    tables = denoise.seconds(max_num_seqs), extend.seconds(max_num_seqs)
    latency = Latency.of(decode_cost, tables, mixed, side_by_side=False, host=host, one_forward=True)
    return latency
