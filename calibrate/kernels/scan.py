"""Mamba-2 over new tokens from a sequence's states (Dao & Gu, arXiv 2405.21060), its causal convolution included.

x, B, C = split(silu(conv(xbc)))          dt = softplus(dt + dt_bias)          A = -exp(a_log)
s[t] = exp(dt[t] A) s[t - 1] + dt[t] x[t] B[t]^T          y[t] = s[t] C[t] + D x[t]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calibrate.kernels.language import INTERPRETED, dot, jit, tl, triton

CHUNK = 64  # tokens that the CPU path takes at once
LONG_CHUNK = 128  # tokens that the GPU takes at once of longer inputs; of shorter ones it takes one after another
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
    chunked = tokens > LONG_CHUNK
    narrow = torch.bfloat16 if chunked and xbc.dtype == torch.bfloat16 else torch.float32
    convolved = torch.empty(xbc.shape, dtype=narrow, device=xbc.device)
    y = torch.empty(sequences, tokens, heads * dim, dtype=xbc.dtype, device=xbc.device)
    block_t = min(TILE, triton.next_power_of_2(tokens))
    _conv_kernel[(triton.cdiv(channels, 128), triton.cdiv(tokens, block_t), sequences)](
        xbc, conv_state, rows, conv_weight, conv_bias, convolved, tokens, channels, *xbc.stride()[:2],
        TAPS=taps, WRITE=write, BLOCK_T=block_t, BLOCK_C=128, BLOCK_K=triton.next_power_of_2(taps), num_warps=4,
    )  # fmt: skip
    if chunked:
        _scan_chunks(convolved, dt, ssm_state, rows, dt_bias, a_log, d, groups, write, y)
        return y
    block_p, block_n = min(32, triton.next_power_of_2(dim)), triton.next_power_of_2(n)
    _scan_kernel[(triton.cdiv(dim, block_p), heads, sequences)](
        convolved, dt, ssm_state, rows, dt_bias, a_log, d, y, tokens, *dt.stride()[:2],
        H=heads, GROUPS=groups, P=dim, N=n, WRITE=write, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return y


def _scan_chunks(convolved, dt, ssm_state, rows, dt_bias, a_log, d, groups, write, y):
    """Only the state passes from chunk to chunk; then y of all chunks is found at once. ``step`` and ``decay`` are of
    whole chunks: beyond the last token a step is 0, so that nothing is added to the state and it does not decay."""
    (sequences, tokens, _), (heads, dim, n) = convolved.shape, ssm_state.shape[1:]
    chunks = triton.cdiv(tokens, LONG_CHUNK)
    step, decay = torch.empty(2, sequences, heads, chunks * LONG_CHUNK, dtype=torch.float32, device=y.device)
    entering = torch.empty(sequences, chunks, heads, dim, n, dtype=torch.float32, device=y.device)
    block_p, block_n = max(16, triton.next_power_of_2(dim)), min(32, max(16, triton.next_power_of_2(n)))
    shape = {"H": heads, "GROUPS": groups, "P": dim, "N": n, "CHUNK": LONG_CHUNK}
    _decay_kernel[(chunks, triton.cdiv(heads, 16), sequences)](
        dt, dt_bias, a_log, step, decay, tokens, *dt.stride()[:2], H=heads, CHUNK=LONG_CHUNK, BLOCK_H=16, num_warps=4
    )
    _state_kernel[(triton.cdiv(n, block_n), heads, sequences)](
        convolved, step, decay, ssm_state, rows, entering, tokens,
        **shape, WRITE=write, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4, num_stages=3,
    )  # fmt: skip
    _chunk_kernel[(heads, triton.cdiv(tokens, 64), sequences)](
        convolved, step, decay, entering, d, y, tokens,
        **shape, BLOCK_T=64, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4, num_stages=2,
    )  # fmt: skip


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
    b_y = _narrow(b_y * tl.sigmoid(b_y), y.dtype.element_ty)
    tl.store(y + (i_b * T + o_t) * C + o_c[None, :], b_y, mask=(o_t < T) & m_c[None, :])
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
def _decay_kernel(
    dt, dt_bias, a_log, step, decay, T, sdt_b, sdt_t, H: tl.constexpr, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr
):
    """The step of every token, and the logarithm of what the state has decayed by since its chunk began; some heads of
    one chunk."""
    i_c, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_h, o_t = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), i_c * CHUNK + tl.arange(0, CHUNK)
    m_h = o_h < H
    b_a = -tl.exp(tl.load(a_log + o_h, mask=m_h, other=0.0).to(tl.float32))
    b_bias = tl.load(dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)
    m_dt = (o_t < T)[:, None] & m_h[None, :]
    b_dt = tl.load(dt + i_b * sdt_b + o_t.to(tl.int64)[:, None] * sdt_t + o_h[None, :], mask=m_dt, other=0.0)
    b_step = tl.where(m_dt, _softplus(b_dt.to(tl.float32) + b_bias[None, :]), 0.0)  # (CHUNK, BLOCK_H)
    o_out = (i_b * H + o_h)[None, :] * tl.num_programs(0) * CHUNK + o_t[:, None]
    tl.store(step + o_out, b_step, mask=m_h[None, :])
    tl.store(decay + o_out, tl.cumsum(b_step * b_a[None, :], 0), mask=m_h[None, :])


@jit
def _state_kernel(
    xbc, step, decay, ssm_state, rows, entering, T,
    H: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    WRITE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The state of one head, or a part of its N, from chunk to chunk; keeps what each chunk enters with."""
    C: tl.constexpr = H * P + 2 * GROUPS * N
    i_h, i_b, chunks = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.cdiv(T, CHUNK)
    o_p, o_n, o_t = tl.arange(0, BLOCK_P), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    m_p, m_n = o_p < P, o_n < N
    o_state, m_state = i_h * P * N + o_p[:, None] * N + o_n[None, :], m_p[:, None] & m_n[None, :]
    p_state = ssm_state + tl.load(rows + i_b) * (H * P * N) + o_state
    p_entering = entering + i_b * chunks * (H * P * N) + o_state
    p_x = xbc + i_b * T * C + i_h * P + o_p[:, None] + o_t[None, :] * C
    p_b = xbc + i_b * T * C + H * P + (i_h // (H // GROUPS)) * N + o_t[:, None] * C + o_n[None, :]
    p_step = step + (i_b * H + i_h) * chunks * CHUNK
    p_decay = decay + (i_b * H + i_h) * chunks * CHUNK
    b_state = tl.load(p_state, mask=m_state, other=0.0).to(tl.float32)  # (BLOCK_P, BLOCK_N)
    for i_c in range(chunks):
        tl.store(p_entering, b_state, mask=m_state)
        m_t = i_c * CHUNK + o_t < T
        b_x = tl.load(p_x, mask=m_p[:, None] & m_t[None, :], other=0.0)  # (BLOCK_P, CHUNK)
        b_b = tl.load(p_b, mask=m_t[:, None] & m_n[None, :], other=0.0)  # (CHUNK, BLOCK_N)
        b_end = tl.load(p_decay + CHUNK - 1)
        b_weight = tl.load(p_step + o_t) * tl.exp(b_end - tl.load(p_decay + o_t))
        b_x = _narrow(b_x.to(tl.float32) * b_weight[None, :], b_b.dtype)
        b_state = b_state * tl.exp(b_end) + _product(b_x, b_b)
        p_x, p_b, p_step, p_decay = p_x + CHUNK * C, p_b + CHUNK * C, p_step + CHUNK, p_decay + CHUNK
        p_entering += H * P * N
    if WRITE:
        tl.store(p_state, b_state.to(ssm_state.dtype.element_ty), mask=m_state)


@jit
def _chunk_kernel(
    xbc, step, decay, entering, d_skip, y, T,
    H: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y of one head at BLOCK_T tokens t of a chunk, from the state that the chunk enters with and its tokens s <= t."""
    C: tl.constexpr = H * P + 2 * GROUPS * N
    i_h, i_t, i_b, chunks = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.cdiv(T, CHUNK)
    i_c = i_t * BLOCK_T // CHUNK
    o_t, o_s = i_t * BLOCK_T - i_c * CHUNK + tl.arange(0, BLOCK_T), tl.arange(0, CHUNK)  # within the chunk
    o_p, o_n, left = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), T - i_c * CHUNK
    m_t, m_s, m_p = (o_t < left)[:, None], o_s < left, (o_p < P)[None, :]
    first = i_b * T + i_c * CHUNK
    p_x = xbc + first * C + i_h * P + o_p[None, :]
    p_b = xbc + first * C + H * P + (i_h // (H // GROUPS)) * N
    p_state = entering + ((i_b * chunks + i_c) * H + i_h) * P * N + o_p[None, :] * N
    p_step = step + ((i_b * H + i_h) * chunks + i_c) * CHUNK
    p_decay = decay + ((i_b * H + i_h) * chunks + i_c) * CHUNK
    b_y = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    b_weight = tl.zeros([BLOCK_T, CHUNK], tl.float32)
    for n in range(0, N, BLOCK_N):
        o_k = n + o_n
        m_k = o_k < N
        b_c = tl.load(p_b + GROUPS * N + o_t[:, None] * C + o_k[None, :], mask=m_t & m_k[None, :], other=0.0)
        b_b = tl.load(p_b + o_s[None, :] * C + o_k[:, None], mask=m_k[:, None] & m_s[None, :], other=0.0)
        b_state = tl.load(p_state + o_k[:, None], mask=m_k[:, None] & m_p, other=0.0)  # (BLOCK_N, BLOCK_P)
        b_weight += _product(b_c, b_b)
        b_high = _narrow(b_state, b_c.dtype)
        b_y += _product(b_c, b_high)
        if b_c.dtype != tl.float32:
            b_y += _product(b_c, _narrow(b_state - b_high.to(tl.float32), b_c.dtype))
    b_decay = tl.load(p_decay + o_t)
    b_span = tl.where(o_s[None, :] <= o_t[:, None], b_decay[:, None] - tl.load(p_decay + o_s)[None, :], -float("inf"))
    b_weight *= tl.exp(b_span) * tl.load(p_step + o_s)[None, :]
    b_x = tl.load(p_x + o_s[:, None] * C, mask=m_s[:, None] & m_p, other=0.0)
    b_y = b_y * tl.exp(b_decay)[:, None] + _product(_narrow(b_weight, b_x.dtype), b_x)
    b_skip = tl.load(p_x + o_t[:, None] * C, mask=m_t & m_p, other=0.0).to(tl.float32)
    b_y += tl.load(d_skip + i_h).to(tl.float32) * b_skip
    p_y = y + (first * H + i_h) * P + o_t[:, None] * (H * P) + o_p[None, :]
    tl.store(p_y, _narrow(b_y, y.dtype.element_ty), mask=m_t & m_p)


@jit
def _product(a, b):
    """a @ b in fp32; fp32 operands are split into bf16 parts, of which all products that matter are summed."""
    if INTERPRETED or a.dtype != tl.float32:
        return dot(a, b)
    return tl.dot(a, b, input_precision="bf16x6")


@jit
def _narrow(b_x, dtype: tl.constexpr):
    """fp32 in another type, rounded to the nearest: the interpreter cuts bf16 off, so what rounds up is added first."""
    if INTERPRETED and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_x = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return b_x.to(dtype)


@jit
def _softplus(b_x):
    """log(1 + exp(x)), exact to rounding where exp(x) is small, as it is for most steps (Kahan's log1p)."""
    b_e = tl.exp(tl.minimum(b_x, 20.0))
    b_u = 1.0 + b_e
    b_log1p = tl.where(b_u == 1.0, b_e, tl.log(b_u) * (b_e / tl.where(b_u == 1.0, 1.0, b_u - 1.0)))
    return tl.where(b_x > 20.0, b_x, b_log1p)
