"""Mamba-2 over new tokens from a sequence's states (Dao & Gu, arXiv 2405.21060), its causal convolution included.

x, B, C = split(silu(conv(xbc)))          dt = softplus(dt + dt_bias)          A = -exp(a_log)
s[t] = exp(dt[t] A) s[t - 1] + dt[t] x[t] B[t]^T          y[t] = s[t] C[t] + D x[t]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calibrate.kernels.language import jit, tl, triton

CHUNK = 64  # tokens that the CPU path takes at once
TILE = 16  # tokens that a program of the convolution takes


def block_scan(
    xbc: Tensor,
    dt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    rows: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    groups: int,
    write: bool,
) -> Tensor:
    """y before gate and norm, computed in fp32.

    Args:
        xbc: (B, T, C) inputs of the convolution, C = H P + 2 groups N, in the order x, B, C.
        dt: (B, T, H), raw.
        conv_state: (slots, C, K - 1) contiguous, the latest inputs of the convolution, oldest first.
        ssm_state: (slots, H, P, N) contiguous.
        rows: (B,) int64, the slot of each sequence; distinct.
        conv_weight, conv_bias: (C, K) contiguous and (C,).
        dt_bias, a_log, d: (H,).
        groups: how many B and C there are; head h reads group h // (H / groups).
        write: whether both states of ``rows`` are advanced in place, or left as they are.

    Returns:
        (B, T, H P) of xbc's dtype.
    """
    args = xbc, dt, conv_state, ssm_state, rows, conv_weight, conv_bias, dt_bias, a_log, d, groups, write
    if not xbc.is_cuda:
        return torch_block_scan(*args)
    with torch.cuda.device(xbc.device):
        return triton_block_scan(*args)


def naive_block_scan(
    xbc, dt, conv_state, ssm_state, rows, conv_weight, conv_bias, dt_bias, a_log, d, groups, write
):  # fmt: skip
    (heads, dim, n), taps = ssm_state.shape[1:], conv_weight.shape[1]
    latest, s = conv_state[rows].transpose(1, 2), ssm_state[rows]
    y = []
    for t in range(xbc.shape[1]):
        window = torch.cat([latest, xbc[:, t : t + 1]], dim=1)  # (B, K, C)
        convolved = F.silu((window * conv_weight.T).sum(1) + conv_bias)
        x, b, c = convolved.split([heads * dim, groups * n, groups * n], dim=-1)
        x = x.unflatten(-1, (heads, dim))
        b, c = (z.unflatten(-1, (groups, n)).repeat_interleave(heads // groups, dim=1) for z in (b, c))
        step = F.softplus(dt[:, t] + dt_bias)  # (B, H)
        s = (step * -a_log.exp()).exp()[..., None, None] * s + (step[..., None] * x)[..., None] * b[:, :, None]
        y.append(((s * c[:, :, None]).sum(-1) + d[:, None] * x).flatten(1))
        latest = window[:, window.shape[1] - taps + 1 :]
    if write:
        conv_state[rows], ssm_state[rows] = latest.transpose(1, 2), s
    return torch.stack(y, dim=1)


def torch_block_scan(
    xbc, dt, conv_state, ssm_state, rows, conv_weight, conv_bias, dt_bias, a_log, d, groups, write
):  # fmt: skip
    """All tokens of a chunk at once, by their attention-like form; the state passes from chunk to chunk."""
    (heads, dim, n), taps, tokens = ssm_state.shape[1:], conv_weight.shape[1], xbc.shape[1]
    inputs = torch.cat([conv_state[rows].transpose(1, 2), xbc], dim=1)
    shifted = (inputs[:, k : k + tokens].float() * conv_weight[:, k].float() for k in range(taps))
    convolved = F.silu(sum(shifted, conv_bias.float()))
    x, b, c = convolved.split([heads * dim, groups * n, groups * n], dim=-1)
    x = x.unflatten(-1, (groups, -1, dim)).movedim(1, 3)  # (B, groups, R heads of a group, T, P)
    b, c = (z.unflatten(-1, (groups, n)).transpose(1, 2) for z in (b, c))  # (B, groups, T, N)
    step = F.softplus(dt.float() + dt_bias.float())
    decay = step * -a_log.float().exp()
    step, decay = (z.unflatten(-1, (groups, -1)).movedim(1, 3) for z in (step, decay))  # (B, groups, R, T)
    state = ssm_state[rows].float().unflatten(1, (groups, -1))  # (B, groups, R, P, N)
    y = x * d.float().view(groups, -1, 1, 1)
    for t in range(0, tokens, CHUNK):
        chunk = slice(t, t + CHUNK)
        part, state = _chunk(
            x[..., chunk, :], step[..., chunk], decay[..., chunk], b[:, :, chunk], c[:, :, chunk], state
        )
        y[..., chunk, :] += part
    if write:
        ssm_state[rows] = state.flatten(1, 2).to(ssm_state.dtype)
        conv_state[rows] = inputs[:, tokens:].transpose(1, 2)
    return y.movedim(3, 1).flatten(2).to(xbc.dtype)


def _chunk(x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, groups, R, T, P) of a chunk, without the D term, and the state after it."""
    total = decay.cumsum(-1)
    later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
    spans = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf)
    weights = spans.exp() * (c @ b.mT)[:, :, None] * step[..., None, :]  # (B, groups, R, T, T)
    y = weights @ x + total.exp()[..., None] * (c[:, :, None] @ state.mT)
    end = total[..., -1:]
    into = x * ((end - total).exp() * step)[..., None]
    return y, end.exp()[..., None] * state + into.mT @ b[:, :, None]


def triton_block_scan(
    xbc, dt, conv_state, ssm_state, rows, conv_weight, conv_bias, dt_bias, a_log, d, groups, write
):  # fmt: skip
    (sequences, tokens, channels), (heads, dim, n), taps = xbc.shape, ssm_state.shape[1:], conv_weight.shape[1]
    if taps > TILE:
        raise ValueError(f"a convolution over {taps} tokens; expected at most {TILE}")
    convolved = torch.empty(xbc.shape, dtype=torch.float32, device=xbc.device)
    y = torch.empty(sequences, tokens, heads * dim, dtype=xbc.dtype, device=xbc.device)
    block_t = min(TILE, triton.next_power_of_2(tokens))
    _conv_kernel[(triton.cdiv(channels, 128), triton.cdiv(tokens, block_t), sequences)](
        xbc, conv_state, rows, conv_weight, conv_bias, convolved, tokens, channels, *xbc.stride()[:2],
        TAPS=taps, WRITE=write, BLOCK_T=block_t, BLOCK_C=128, BLOCK_K=triton.next_power_of_2(taps), num_warps=4,
    )  # fmt: skip
    block_p, block_n = min(32, triton.next_power_of_2(dim)), triton.next_power_of_2(n)
    _scan_kernel[(triton.cdiv(dim, block_p), heads, sequences)](
        convolved, dt, ssm_state, rows, dt_bias, a_log, d, y, tokens, *dt.stride()[:2],
        H=heads, GROUPS=groups, P=dim, N=n, WRITE=write, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return y


@jit
def _conv_kernel(
    xbc, conv_state, rows, weight, bias, y, T, C, sx_b, sx_t,
    TAPS: tl.constexpr, WRITE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """silu of the convolution, of some channels and times. Inputs before time 0 are in the state, which only the
    programs of the first times read and write."""
    i_t, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_t = (i_t * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    m_c = o_c < C
    p_x, p_state = xbc + i_b * sx_b, conv_state + (tl.load(rows + i_b) * C + o_c) * (TAPS - 1)
    b_y = tl.zeros([BLOCK_T, BLOCK_C], tl.float32) + tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(TAPS):
        o_in = o_t + (k - TAPS + 1)
        m_new, m_old = (o_in >= 0) & (o_in < T) & m_c[None, :], (o_in < 0) & m_c[None, :]
        b_new = tl.load(p_x + o_in.to(tl.int64) * sx_t + o_c[None, :], mask=m_new, other=0.0).to(tl.float32)
        b_old = tl.load(p_state[None, :] + (o_in + TAPS - 1), mask=m_old, other=0.0).to(tl.float32)
        b_y += (b_new + b_old) * tl.load(weight + o_c * TAPS + k, mask=m_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (i_b * T + o_t) * C + o_c[None, :], b_y * tl.sigmoid(b_y), mask=(o_t < T) & m_c[None, :])
    if WRITE and i_t == 0:
        o_k = tl.arange(0, BLOCK_K)[None, :]
        o_last, m_k = T - (TAPS - 1) + o_k, m_c[:, None] & (o_k < TAPS - 1)
        b_kept = tl.load(p_state[:, None] + T + o_k, mask=m_k & (o_last < 0), other=0.0)
        b_last = tl.load(p_x + o_last.to(tl.int64) * sx_t + o_c[:, None], mask=m_k & (o_last >= 0), other=0.0)
        b_state = tl.where(o_last < 0, b_kept.to(tl.float32), b_last.to(tl.float32))
        tl.debug_barrier()  # every thread has read the state before any writes it
        tl.store(p_state[:, None] + o_k, b_state.to(conv_state.dtype.element_ty), mask=m_k)


@jit
def _scan_kernel(
    xbc, dt, ssm_state, rows, dt_bias, a_log, d_skip, y, T, sdt_b, sdt_t,
    H: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, WRITE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head of one sequence, or a part of its P, token by token; the state stays in registers."""
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_p, o_n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    m_p, m_n = o_p < P, o_n < N
    p_state = ssm_state + tl.load(rows + i_b) * (H * P * N) + (i_h * P + o_p)[:, None] * N + o_n[None, :]
    p_x = xbc + i_b * T * (H * P + 2 * GROUPS * N) + i_h * P + o_p
    p_b = xbc + i_b * T * (H * P + 2 * GROUPS * N) + H * P + (i_h // (H // GROUPS)) * N + o_n
    p_dt, p_y = dt + i_b * sdt_b + i_h, y + (i_b * T * H + i_h) * P + o_p
    b_a = -tl.exp(tl.load(a_log + i_h).to(tl.float32))
    b_bias, b_d = tl.load(dt_bias + i_h).to(tl.float32), tl.load(d_skip + i_h).to(tl.float32)
    b_state = tl.load(p_state, mask=m_p[:, None] & m_n[None, :], other=0.0).to(tl.float32)  # (BLOCK_P, BLOCK_N)
    for _ in range(T):
        b_x = tl.load(p_x, mask=m_p, other=0.0)
        b_b = tl.load(p_b, mask=m_n, other=0.0)
        b_c = tl.load(p_b + GROUPS * N, mask=m_n, other=0.0)
        b_dt = _softplus(tl.load(p_dt).to(tl.float32) + b_bias)
        b_state = b_state * tl.exp(b_dt * b_a) + (b_dt * b_x)[:, None] * b_b[None, :]
        b_y = tl.sum(b_state * b_c[None, :], 1) + b_d * b_x
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_p)
        p_x, p_b, p_dt, p_y = p_x + H * P + 2 * GROUPS * N, p_b + H * P + 2 * GROUPS * N, p_dt + sdt_t, p_y + H * P
    if WRITE:
        tl.store(p_state, b_state.to(ssm_state.dtype.element_ty), mask=m_p[:, None] & m_n[None, :])


@jit
def _softplus(b_x):
    """log(1 + exp(x)), exact to rounding where exp(x) is small, as it is for most steps (Kahan's log1p)."""
    b_e = tl.exp(tl.minimum(b_x, 20.0))
    b_u = 1.0 + b_e
    b_log1p = tl.where(b_u == 1.0, b_e, tl.log(b_u) * (b_e / tl.where(b_u == 1.0, 1.0, b_u - 1.0)))
    return tl.where(b_x > 20.0, b_x, b_log1p)
