"""Routed experts: two-layer relu^2 MLPs, of which each token takes k."""

from __future__ import annotations

import torch
from torch import Tensor

from calibrate.kernels.language import INTERPRETED, dot, jit, tl, triton

SMALL = {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}  # while reading the weights takes longest
LARGE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8}  # and once products do
MANY = 64  # tokens of an expert from which on they do


def grouped_experts(x: Tensor, up: Tensor, down: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """The sum over a token's experts of weight x down_e relu(up_e x)^2; accumulated in fp32.

    Every expert that a token takes is read once, the others not at all.

    Args:
        x: (n, d).
        up, down: (E, f, d) and (E, d, f), contiguous.
        experts: (n, k) int64, distinct in a row.
        weights: (n, k).

    Returns:
        (n, d) of x's dtype.
    """
    args = x, up, down, experts, weights
    if not x.is_cuda:
        return torch_grouped_experts(*args)
    with torch.cuda.device(x.device):
        return triton_grouped_experts(*args)


def naive_grouped_experts(x, up, down, experts, weights):
    y = torch.zeros_like(x)
    for i, (chosen, shares) in enumerate(zip(experts.tolist(), weights, strict=True)):
        for e, share in zip(chosen, shares, strict=True):
            y[i] += share * (down[e] @ (up[e] @ x[i]).relu().square())
    return y


def torch_grouped_experts(x, up, down, experts, weights):
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in experts.unique().tolist():
        tokens, choice = (experts == e).nonzero(as_tuple=True)
        out = (x[tokens] @ up[e].T).relu().square() @ down[e].T
        y.index_add_(0, tokens, out.float() * weights[tokens, choice, None])
    return y.to(x.dtype)


def triton_grouped_experts(x, up, down, experts, weights):
    """Sorts the pairs of token and expert by expert, on the device; programs of experts without any leave at once."""
    (tokens, width), (count, hidden, _), top = x.shape, up.shape, experts.shape[1]
    of_pair, order = experts.flatten().sort(stable=True)
    starts = torch.searchsorted(of_pair, torch.arange(count + 1, device=x.device))  # (E + 1,)
    inner = torch.empty(tokens * top, hidden, dtype=x.dtype, device=x.device)
    outer = torch.empty(tokens * top, width, dtype=torch.float32, device=x.device)
    each = triton.cdiv(tokens * top, count)  # pairs of an expert, on average
    tiles, splits = SMALL | {"BLOCK_M": min(64, max(16, triton.next_power_of_2(tokens)))}, 1
    if each >= MANY and x.dtype != torch.float32:
        tiles, splits = LARGE | _stages(), triton.cdiv(each, LARGE["BLOCK_M"])
    for source, matrix, out, is_up in ((x, up, inner, True), (inner, down, outer, False)):
        _experts_kernel[(splits, triton.cdiv(matrix.shape[1], tiles["BLOCK_N"]), count)](
            source, matrix, out, order, starts, weights, *matrix.shape[1:], source.stride(0),
            TOP=top, UP=is_up, **tiles,
        )  # fmt: skip
    return outer.view(tokens, top, width).sum(1).to(x.dtype)


def _stages() -> dict[str, int]:
    """As many as shared memory holds of the large tiles."""
    amd = not INTERPRETED.value and triton.runtime.driver.active.get_current_target().backend == "hip"
    return {"num_stages": 3 if amd else 4}


@jit
def _experts_kernel(
    x, matrix, out, order, starts, weights, N, K, sx,
    TOP: tl.constexpr, UP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one expert for its tokens: relu(up x)^2, or weight x down x. Row i of ``inner`` is pair
    order[i]; row j of ``outer`` is pair j. The programs of axis 0 take the tiles of tokens in turn, side by side, so
    that one of them reads the weights from memory and the others from the L2 cache."""
    i_e = tl.program_id(2)
    start, end = tl.load(starts + i_e).to(tl.int32), tl.load(starts + i_e + 1).to(tl.int32)
    if start == end:
        return
    o_n, o_k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    p_matrix = matrix + i_e.to(tl.int64) * N * K + o_n[None, :] * K
    for i in range(start + tl.program_id(0) * BLOCK_M, end, tl.num_programs(0) * BLOCK_M):
        o_i = i + tl.arange(0, BLOCK_M)
        m_i = o_i < end
        b_pair = tl.load(order + o_i, mask=m_i, other=0)
        p_x = x + (b_pair // TOP if UP else o_i.to(tl.int64))[:, None] * sx
        b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            m_k = k + o_k < K
            b_x = tl.load(p_x + (k + o_k)[None, :], mask=m_i[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_matrix + (k + o_k)[:, None], mask=m_k[:, None] & (o_n < N)[None, :], other=0.0)
            b_out += dot(b_x, b_w)
        if UP:
            b_out = tl.maximum(b_out, 0.0)
            b_out = b_out * b_out
        else:
            b_out *= tl.load(weights + b_pair, mask=m_i, other=0.0).to(tl.float32)[:, None]
        p_out = out + (o_i.to(tl.int64) if UP else b_pair)[:, None] * N + o_n[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_i[:, None] & (o_n < N)[None, :])
