"""Attention of new tokens over their sequence's cached context and over each other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from calibrate.kernels.language import dot, jit, tl, triton

PROGRAMS = 128  # enough to fill a GPU; the context is split until there are as many
KEYS = 64  # keys a tile


def block_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    context: Tensor,
    causal: bool,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over each sequence's context and the new keys; accumulated in fp32.

    Args:
        q: (B, T, HQ, D); query head h reads KV head h // (HQ / HK).
        k_new, v_new: (B, T, HK, D), laid out alike.
        k_cache, v_cache: (slots, L, HK, D), laid out alike.
        rows: (B,) int64, the slot of each sequence.
        context: (B,) int64, how many tokens of its slot each sequence reads: 0 to L.
        causal: whether a query reads the new keys up to its own only, or all of them.

    Returns:
        (B, T, HQ, D) of q's dtype.
    """
    args = q, k_new, v_new, k_cache, v_cache, rows, context, causal
    if not q.is_cuda:
        return torch_block_attention(*args)
    with torch.cuda.device(q.device):
        return triton_block_attention(*args)


def naive_block_attention(q, k_new, v_new, k_cache, v_cache, rows, context, causal):
    out, group = torch.empty_like(q), q.shape[2] // k_new.shape[2]
    for b, (row, n) in enumerate(zip(rows.tolist(), context.tolist(), strict=True)):
        k, v = (
            torch.cat([cache[row, :n], new[b]]).repeat_interleave(group, dim=1)
            for cache, new in ((k_cache, k_new), (v_cache, v_new))
        )
        scores = torch.einsum("thd,shd->hts", q[b], k) / math.sqrt(q.shape[-1])
        if causal:
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(n + 1)
            scores = scores.masked_fill(later, -torch.inf)
        out[b] = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
    return out


def torch_block_attention(q, k_new, v_new, k_cache, v_cache, rows, context, causal):
    """Contexts are padded to the longest. Padding is read, and must be finite."""
    longest, t = int(context.max()), torch.arange(q.shape[1], device=q.device)
    k = torch.cat([k_cache[rows, :longest], k_new], dim=1)
    v = torch.cat([v_cache[rows, :longest], v_new], dim=1)
    cached = torch.arange(longest, device=q.device) < context[:, None]  # (B, longest)
    fresh = (t <= t[:, None]) | (not causal)  # (T, T)
    mask = torch.cat([cached[:, None].expand(-1, len(t), -1), fresh.expand(len(q), -1, -1)], dim=-1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True).transpose(1, 2)


def triton_block_attention(q, k_new, v_new, k_cache, v_cache, rows, context, causal):
    if k_new.stride() != v_new.stride() or k_cache.stride() != v_cache.stride():
        raise ValueError("keys and values differ in layout")
    (sequences, tokens, heads, dim), kv_heads = q.shape, k_new.shape[2]
    packed = tokens * (heads // kv_heads)
    block_m = min(128, max(16, triton.next_power_of_2(packed)))
    tiles = triton.cdiv(packed, block_m)
    splits = _splits(sequences * kv_heads * tiles, k_cache.shape[1])
    out = torch.empty(sequences, tokens, heads, dim, dtype=q.dtype, device=q.device)
    part, weight = out, out  # what each split found, and the logarithm of its share; of one split, the result
    if splits > 1:
        part = torch.empty(splits, *out.shape, dtype=torch.float32, device=q.device)
        weight = torch.empty(part.shape[:-1], dtype=torch.float32, device=q.device)
    _attention_kernel[(tiles, sequences * kv_heads, splits)](
        q, k_new, v_new, k_cache, v_cache, rows, context, part, weight, tokens, out.numel(),
        math.log2(math.e) / math.sqrt(dim), *q.stride()[:3], *k_new.stride()[:3], *k_cache.stride()[:3],
        HQ=heads, HK=kv_heads, D=dim, BLOCK_D=triton.next_power_of_2(dim), CAUSAL=causal, SPLITS=splits,
        BLOCK_M=block_m, BLOCK_N=KEYS, num_warps=8 if block_m == 128 else 4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(out.numel() // dim,)](
            part, weight, out, out.numel(), D=dim, BLOCK_D=triton.next_power_of_2(dim), SPLITS=splits, num_warps=4
        )
    return out


def _splits(programs: int, context: int) -> int:
    """Into how many parts to split the context: from shapes alone, so that a CUDA graph can hold the launch."""
    wanted = min(PROGRAMS // programs, triton.cdiv(context, KEYS))
    return triton.next_power_of_2(wanted + 1) // 2 if wanted > 1 else 1


@jit
def _attention_kernel(
    q, k_new, v_new, k_cache, v_cache, rows, context, out, weight, T, numel, scale_log2e,
    sq_b, sq_t, sq_h, sn_b, sn_t, sn_h, sc_b, sc_t, sc_h,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of one tile of queries; the last split also reads the new keys (flash-decoding, Dao et al., 2023). The
    G query heads of a KV head are packed: row m is token m // G, head m % G of them."""
    G: tl.constexpr = HQ // HK
    i_m, i_split = tl.program_id(0), tl.program_id(2)
    i_b, i_hk = tl.program_id(1) // HK, tl.program_id(1) % HK
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_t, o_h = o_m // G, i_hk * G + o_m % G
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_q, m_d = (o_t < T)[:, None] & (o_d < D)[None, :], (o_d < D)[None, :]
    i_b64 = i_b.to(tl.int64)
    p_q = q + i_b64 * sq_b + o_t.to(tl.int64)[:, None] * sq_t + o_h[:, None] * sq_h + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # (BLOCK_M, BLOCK_D)
    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    length = tl.load(context + i_b).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, BLOCK_N), SPLITS) * BLOCK_N
    start = i_split * part
    end = tl.minimum(start + part, length)
    o_kv = tl.load(rows + i_b) * sc_b + i_hk * sc_h
    for n in range(start, end, BLOCK_N):
        m_n = n + o_n < end
        b_max, b_sum, b_out = _tile(
            b_q, k_cache + o_kv, v_cache + o_kv, n + o_n, sc_t, o_d, m_n[:, None] & m_d, m_n[None, :],
            b_max, b_sum, b_out, scale_log2e,
        )  # fmt: skip
    if i_split == SPLITS - 1:
        o_kv = i_b64 * sn_b + i_hk * sn_h
        end = tl.minimum(T, ((i_m + 1) * BLOCK_M - 1) // G + 1) if CAUSAL else T
        for n in range(0, end, BLOCK_N):
            m_n = n + o_n < end
            m_s = m_n[None, :] & ((n + o_n)[None, :] <= o_t[:, None]) if CAUSAL else m_n[None, :]
            b_max, b_sum, b_out = _tile(
                b_q, k_new + o_kv, v_new + o_kv, n + o_n, sn_t, o_d, m_n[:, None] & m_d, m_s,
                b_max, b_sum, b_out, scale_log2e,
            )  # fmt: skip

    # an empty split stores no more than its weight of zero
    m_found = (o_t < T) & (b_sum > 0)
    o_row = (i_b64 * T + o_t) * HQ + o_h
    p_out = out + i_split.to(tl.int64) * numel + o_row[:, None] * D + o_d[None, :]
    b_sum = tl.where(b_sum > 0, b_sum, 1.0)  # b_max of an empty split is -inf
    tl.store(p_out, (b_out / b_sum[:, None]).to(out.dtype.element_ty), mask=m_found[:, None] & m_d)
    if SPLITS > 1:
        p_weight = weight + i_split.to(tl.int64) * (numel // D) + o_row
        tl.store(p_weight, b_max + tl.log2(b_sum), mask=o_t < T)


@jit
def _tile(b_q, k, v, o_n, s_n, o_d, m_kv, m_s, b_max, b_sum, b_out, scale_log2e):
    """Online softmax over one tile of keys (Milakov & Gimelshein, arXiv 1805.02867), to base 2."""
    o_kv = o_n.to(tl.int64)[:, None] * s_n + o_d[None, :]
    b_k = tl.load(k + o_kv, mask=m_kv, other=0.0)  # (BLOCK_N, BLOCK_D)
    b_v = tl.load(v + o_kv, mask=m_kv, other=0.0)
    b_s = tl.where(m_s, dot(b_q, tl.trans(b_k)) * scale_log2e, -float("inf"))  # (BLOCK_M, BLOCK_N)
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    return b_new, b_sum * b_old + tl.sum(b_p, 1), b_out * b_old[:, None] + dot(b_p.to(b_v.dtype), b_v)


@jit
def _combine_kernel(
    part, weight, out, numel, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """One query and head: the average of what its splits found."""
    i_row = tl.program_id(0).to(tl.int64)
    o_s, o_d = tl.arange(0, SPLITS).to(tl.int64), tl.arange(0, BLOCK_D)
    b_w = tl.load(weight + o_s * (numel // D) + i_row)
    b_share = tl.exp2(b_w - tl.max(b_w, 0))
    m_part = (b_share > 0)[:, None] & (o_d < D)[None, :]
    b_part = tl.load(part + o_s[:, None] * numel + i_row * D + o_d[None, :], mask=m_part, other=0.0)
    b_out = tl.sum(b_part * b_share[:, None], 0) / tl.sum(b_share, 0)
    tl.store(out + i_row * D + o_d, b_out.to(out.dtype.element_ty), mask=o_d < D)
