"""Mamba layers by mamba-ssm's kernels (and causal-conv1d's, where it is), for cross-checks and comparison.

Blocks are scanned token by token with ``selective_state_update``: ``mamba_chunk_scan_combined`` with initial states has
been seen to return wrong values for blocks shorter than its chunk.
"""

import sys
from importlib.util import find_spec, module_from_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from calibrate.model import Mamba, TwoTower
from twotower_sim.errors import InputError

LONGEST_BLOCK = 64
"""Up to so many tokens are scanned one by one; longer prompts in whole chunks, the rest one by one."""
CHUNK = 128


def use_mamba_ssm(model: TwoTower) -> None:
    """Let the Mamba layers of both towers scan with mamba-ssm. Raises InputError where it cannot be imported."""
    load()
    for module in model.modules():
        if isinstance(module, Mamba):
            module.scan = scan


def load() -> None:
    """Import mamba-ssm's Triton kernels past its ``__init__``, which wants CUDA extensions that they do not need."""
    if "mamba_ssm" not in sys.modules:
        spec = find_spec("mamba_ssm")
        if spec is None:
            raise InputError("--backend mamba_ssm: mamba-ssm is not installed")
        sys.modules["mamba_ssm"] = module_from_spec(spec)  # not executed
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # noqa: F401
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # noqa: F401
    except Exception as error:  # its kernels fail to load in many ways
        raise InputError(f"--backend mamba_ssm: mamba-ssm cannot be imported: {error!r}") from None


def scan(
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
    """As ``calibrate.kernels.block_scan``."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    tokens, (heads, width, states) = xbc.shape[1], ssm_state.shape[1:]
    tail, state = conv_state[rows], ssm_state[rows]
    inputs = torch.cat([tail, xbc.transpose(1, 2)], dim=-1)  # (B, C, K - 1 + T)
    x, b, c = _convolved(inputs, conv_weight, conv_bias).split(
        [heads * width, groups * states, groups * states], dim=-1
    )
    x, b, c = x.unflatten(-1, (heads, width)), b.unflatten(-1, (groups, states)), c.unflatten(-1, (groups, states))
    a, whole = -a_log.float().exp(), tokens // CHUNK * CHUNK if tokens > LONGEST_BLOCK else 0
    parts = []
    if whole:
        y, state = mamba_chunk_scan_combined(
            x[:, :whole], dt[:, :whole], a, b[:, :whole], c[:, :whole], CHUNK, D=d, dt_bias=dt_bias,
            initial_states=state, dt_softplus=True, return_final_states=True,
        )  # fmt: skip
        parts.append(y)
    wide = (heads, width, states)
    a, d, bias = a[:, None, None].expand(wide), d[:, None].expand(wide[:2]), dt_bias[:, None].expand(wide[:2])
    for t in range(whole, tokens):  # updates ``state``, a copy of the rows, in place
        step = dt[:, t, :, None].expand(-1, *wide[:2])
        parts.append(
            selective_state_update(state, x[:, t], step, a, b[:, t], c[:, t], d, dt_bias=bias, dt_softplus=True)[
                :, None
            ]
        )
    if write:
        conv_state[rows] = inputs[..., inputs.shape[-1] - tail.shape[-1] :]
        ssm_state[rows] = state.to(ssm_state.dtype)
    return torch.cat(parts, dim=1).flatten(-2).to(xbc.dtype)


def _convolved(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal depthwise convolution and silu of (B, C, K - 1 + T): (B, T, C)."""
    width = weight.shape[-1]
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        out = F.silu(F.conv1d(inputs, weight[:, None], bias, groups=len(weight)))
    else:
        out = causal_conv1d_fn(inputs, weight, bias, activation="silu")[..., width - 1 :]
    return out.transpose(1, 2)
