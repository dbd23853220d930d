"""RMSNorm with the denoiser's modulation before or after it."""

from __future__ import annotations

import torch
from torch import Tensor

from calibrate.kernels.language import jit, tl, triton


def modulated_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    modulate_first: bool = False,
) -> Tensor:
    """rms(x (1 + scale) + shift) weight if ``modulate_first``, else rms(x) weight (1 + scale) + shift; in fp32.

    Args:
        x: (B, T, d).
        weight: (d,).
        shift, scale: (B, d), both or neither; with neither the norm is plain.

    Returns:
        (B, T, d) of x's dtype.
    """
    args = x, weight, eps, shift, scale, modulate_first
    if not x.is_cuda:
        return naive_modulated_norm(*args)
    with torch.cuda.device(x.device):
        return triton_modulated_norm(*args)


def naive_modulated_norm(x, weight, eps, shift, scale, modulate_first):
    """At least in fp32."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None and modulate_first:
        y = y * (1 + scale[:, None]) + shift[:, None]
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight
    if scale is not None and not modulate_first:
        y = y * (1 + scale[:, None]) + shift[:, None]
    return y.to(x.dtype)


def triton_modulated_norm(x, weight, eps, shift, scale, modulate_first):
    (sequences, tokens, width), modulated = x.shape, scale is not None
    strides = (shift.stride(0), scale.stride(0)) if modulated else (0, 0)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_kernel[(tokens, sequences)](
        x, weight, shift, scale, y, eps, *x.stride()[:2], *strides,
        D=width, BLOCK_D=triton.next_power_of_2(width), MODULATED=modulated, FIRST=modulate_first, num_warps=8,
    )  # fmt: skip
    return y


@jit
def _norm_kernel(
    x, weight, shift, scale, y, eps, sx_b, sx_t, s_shift, s_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MODULATED: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    i_t, i_b = tl.program_id(0), tl.program_id(1)
    i_b64, o_d = i_b.to(tl.int64), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_y = tl.load(x + i_b64 * sx_b + i_t.to(tl.int64) * sx_t + o_d, mask=m_d, other=0.0).to(tl.float32)
    if MODULATED:
        b_shift = tl.load(shift + i_b64 * s_shift + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_scale = 1.0 + tl.load(scale + i_b64 * s_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    if MODULATED and FIRST:
        b_y = b_y * b_scale + b_shift
    b_y = b_y * tl.rsqrt(tl.sum(b_y * b_y, 0) / D + eps) * tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    if MODULATED and not FIRST:
        b_y = b_y * b_scale + b_shift
    p_y = y + (i_b64 * tl.num_programs(0) + i_t) * D + o_d
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_d)
