"""The most probable token of every position, and which positions commit to theirs (arXiv 2606.26493)."""

from __future__ import annotations

import torch
from torch import Tensor

from calibrate.kernels.language import jit, tl, triton

PROGRAMS = 256  # enough to fill a GPU; the vocabulary is split until there are as many
TOKENS = 4096  # tokens of the vocabulary a tile


def confidence(logits: Tensor, mask_token: int) -> tuple[Tensor, Tensor]:
    """The most probable token and its probability, ``mask_token`` excluded; ties go to the lower token.

    Args:
        logits: (rows, V).
        mask_token: 0 to V - 1, or -1 to exclude none.

    Returns:
        int64 (rows,) and fp32 (rows,).
    """
    if not logits.is_cuda:
        return torch_confidence(logits, mask_token)
    with torch.cuda.device(logits.device):
        return triton_confidence(logits, mask_token)


def naive_confidence(logits, mask_token):
    banned = torch.arange(logits.shape[1], device=logits.device) == mask_token
    probabilities = logits.masked_fill(banned, -torch.inf).softmax(-1)
    tokens = [row.index(max(row)) for row in probabilities.tolist()]
    return torch.tensor(tokens, device=logits.device), probabilities.amax(-1)


def torch_confidence(logits, mask_token):
    logits = logits.to(torch.float32, copy=True)
    if mask_token >= 0:
        logits[:, mask_token] = -torch.inf
    top, tokens = logits.max(-1, keepdim=True)
    return tokens[:, 0], 1 / logits.sub_(top).exp_().sum(-1)


def triton_confidence(logits, mask_token):
    rows, vocabulary = logits.shape
    tiles = triton.cdiv(vocabulary, TOKENS)
    part = triton.cdiv(tiles, min(tiles, max(1, PROGRAMS // rows))) * TOKENS
    splits = triton.cdiv(vocabulary, part)
    top, total = torch.empty(2, rows, splits, dtype=torch.float32, device=logits.device)
    best = torch.empty(rows, splits, dtype=torch.int32, device=logits.device)
    _top_kernel[(splits, rows)](
        logits, top, total, best, vocabulary, part, mask_token, logits.stride(0), BLOCK_V=TOKENS, num_warps=8
    )
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    probabilities = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _merge_kernel[(rows,)](
        top, total, best, tokens, probabilities, splits, BLOCK_S=triton.next_power_of_2(splits), num_warps=1
    )
    return tokens, probabilities


@jit
def _top_kernel(logits, top, total, best, V, part, mask_token, s_row, BLOCK_V: tl.constexpr):
    """Of one part of one row: the largest logit, the sum of exp(logit - largest), and the token."""
    i_split, i_row = tl.program_id(0), tl.program_id(1)
    p_row = logits + i_row.to(tl.int64) * s_row
    b_top, b_sum, b_best = -float("inf"), 0.0, 0
    for v in range(i_split * part, tl.minimum((i_split + 1) * part, V), BLOCK_V):
        o_v = v + tl.arange(0, BLOCK_V)
        b_x = tl.load(p_row + o_v, mask=(o_v < V) & (o_v != mask_token), other=-float("inf")).to(tl.float32)
        b_tile, i_tile = tl.max(b_x, 0, return_indices=True)
        b_best = tl.where(b_tile > b_top, v + i_tile, b_best)
        b_new = tl.maximum(b_top, b_tile)
        b_base = tl.where(b_new == -float("inf"), 0.0, b_new)  # where all so far are excluded
        b_sum = b_sum * tl.exp(b_top - b_base) + tl.sum(tl.exp(b_x - b_base), 0)
        b_top = b_new
    o_part = i_row * tl.num_programs(0) + i_split
    tl.store(top + o_part, b_top)
    tl.store(total + o_part, b_sum)
    tl.store(best + o_part, b_best)


@jit
def _merge_kernel(top, total, best, tokens, probabilities, splits, BLOCK_S: tl.constexpr):
    i_row, o_s = tl.program_id(0), tl.arange(0, BLOCK_S)
    o_part, m_s = i_row * splits + o_s, o_s < splits
    b_top = tl.load(top + o_part, mask=m_s, other=-float("inf"))
    b_max, i_max = tl.max(b_top, 0, return_indices=True)
    b_sum = tl.sum(tl.load(total + o_part, mask=m_s, other=0.0) * tl.exp(b_top - b_max), 0)
    tl.store(tokens + i_row, tl.load(best + i_row * splits + i_max).to(tl.int64))
    tl.store(probabilities + i_row, 1.0 / b_sum)


def commit(
    ids: Tensor, tokens: Tensor, probabilities: Tensor, gamma: float | Tensor, steps_left: Tensor, mask_token: int
) -> Tensor:
    """Give the most confident masked positions their tokens, in place; ties go to the lower position.

    Of r masked positions, n of them surer than gamma, max(1, n, ceil(r / steps_left)) commit: none where r is 0.

    Args:
        ids: (B, S) int64.
        tokens, probabilities: (B, S) int64 and fp32, what each position would become and how sure that is.
        gamma: one threshold, or (B,).
        steps_left: (B,) int64, how many steps the block may take, this one included: at least 1.

    Returns:
        How many positions committed, (B,) int64.
    """
    args = ids, tokens, probabilities, gamma, steps_left, mask_token
    if not ids.is_cuda:
        return torch_commit(*args)
    with torch.cuda.device(ids.device):
        return triton_commit(*args)


def naive_commit(ids, tokens, probabilities, gamma, steps_left, mask_token):
    committed = []
    for b, left in enumerate(steps_left.tolist()):
        masked = [i for i, token in enumerate(ids[b].tolist()) if token == mask_token]
        sure = [p > (gamma[b] if isinstance(gamma, Tensor) else gamma) for p in probabilities[b, masked]]
        count = max(1, sum(map(bool, sure)), -(-len(masked) // left))
        chosen = sorted(masked, key=lambda i: (-probabilities[b, i].item(), i))[:count]
        ids[b, chosen] = tokens[b, chosen]
        committed.append(len(chosen))
    return torch.tensor(committed, device=ids.device)


def torch_commit(ids, tokens, probabilities, gamma, steps_left, mask_token):
    masked = ids == mask_token
    threshold = gamma[:, None] if isinstance(gamma, Tensor) else gamma
    remaining = masked.sum(-1)
    sure = (masked & (probabilities > threshold)).sum(-1)
    count = torch.maximum(sure, (remaining + steps_left - 1) // steps_left).clamp(min=1)
    order = probabilities.masked_fill(~masked, -1).argsort(dim=-1, descending=True, stable=True)
    chosen = masked & (order.argsort(dim=-1) < count[:, None])
    ids[chosen] = tokens[chosen]
    return chosen.sum(-1)


def triton_commit(ids, tokens, probabilities, gamma, steps_left, mask_token):
    sequences, size = ids.shape
    committed = torch.empty(sequences, dtype=torch.int64, device=ids.device)
    _commit_kernel[(sequences,)](
        ids, tokens, probabilities, gamma, steps_left, committed, mask_token,
        ids.stride(0), tokens.stride(0), probabilities.stride(0),
        S=size, BLOCK_S=triton.next_power_of_2(size), RAGGED=isinstance(gamma, Tensor), num_warps=1,
    )  # fmt: skip
    return committed


@jit
def _commit_kernel(
    ids, tokens, probabilities, gamma, steps_left, committed, mask_token, s_ids, s_tokens, s_probabilities,
    S: tl.constexpr, BLOCK_S: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < S
    b_ids = tl.load(ids + i_b * s_ids + o_s, mask=m_s, other=mask_token)
    b_masked = m_s & (b_ids == mask_token)
    b_sure = tl.load(probabilities + i_b * s_probabilities + o_s, mask=b_masked, other=-1.0)
    threshold = tl.load(gamma + i_b) if RAGGED else gamma
    left = tl.load(steps_left + i_b).to(tl.int32)
    least = tl.maximum(1, tl.cdiv(tl.sum(b_masked.to(tl.int32), 0), left))
    count = tl.maximum(least, tl.sum((b_masked & (b_sure > threshold)).to(tl.int32), 0))
    b_ahead = (b_sure[None, :] > b_sure[:, None]) | (
        (b_sure[None, :] == b_sure[:, None]) & (o_s[None, :] < o_s[:, None])
    )
    b_chosen = b_masked & (tl.sum(b_ahead.to(tl.int32), 1) < count)  # how many are ahead of each position
    tl.store(ids + i_b * s_ids + o_s, tl.load(tokens + i_b * s_tokens + o_s, mask=b_chosen, other=0), mask=b_chosen)
    tl.store(committed + i_b, tl.sum(b_chosen.to(tl.int64), 0))
