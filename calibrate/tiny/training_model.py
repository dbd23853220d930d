"""The two-tower in the form that trains: whole sequences in parallel, and all blocks of a sequence at once.

It computes what ``calibrate.model`` computes pass by pass, from the same tensors: a dict by the checkpoint's names,
experts apart. Matrix products run in the dtype of their weights (``for_matmul``), all else in fp32. All experts are
evaluated for every token and weighted by the router, by zero where not chosen: the same value and gradient.

Symbols: B sequences of T tokens, n = T / S blocks of S tokens, H hidden width, V vocabulary, E experts; of a Mamba
layer h heads of width P, state N, convolution width K.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calibrate.model import TIME_EMBEDDING, Config, TwoTower

Weights = dict[str, Tensor]


class MambaStart(NamedTuple):
    """States of a Mamba layer where blocks begin."""

    conv: Tensor  # (B n, K - 1, channels): the convolution's last inputs
    ssm: Tensor  # (B n, h, P, N)


class Context(NamedTuple):
    """Keys and values of an attention layer, each (B, kv heads, T, head_dim)."""

    k: Tensor
    v: Tensor


class Read(NamedTuple):
    """What a pass over whole sequences gives."""

    logits: Tensor  # (B, T, V) or (B, n, S, V)
    loads: Tensor  # (MoE layers, E): share of tokens that chose each expert
    layers: list[MambaStart | Context | None]  # what the denoiser reads of each layer of the context tower


def for_matmul(w: Weights, dtype: torch.dtype) -> Weights:
    """Projections, experts and heads in ``dtype``; routers, time conditioning, embeddings and vectors as they are."""
    return {name: t.to(dtype) if name.endswith(("proj.weight", "head.weight")) else t for name, t in w.items()}


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint: the decoder's, experts apart."""
    with torch.device("meta"):
        tensors = TwoTower(c).state_dict()
    out: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        parent, _, kind = name.rpartition(".")
        if parent.endswith(".experts"):
            out |= {f"{parent}.{e}.{kind}.weight": tuple(expert.shape) for e, expert in enumerate(tensor)}
        else:
            out[name] = tuple(tensor.shape)
    return out


# ---------------------------------------------------------------------- towers


def context(w: Weights, c: Config, ids: Tensor) -> Read:
    """The context tower over ``ids`` (B, T), T whole blocks, from empty states."""
    x = F.embedding(ids, w["context_tower.embeddings.weight"])
    loads: list[Tensor] = []
    layers: list[MambaStart | Context | None] = []
    for i, kind in enumerate(c.hybrid_override_pattern):
        layer = _under(w, f"context_tower.layers.{i}.")
        mixer, normed = _under(layer, "mixer."), rms_norm(x, layer["norm.weight"], c.layer_norm_epsilon)
        left: MambaStart | Context | None = None
        if kind == "M":
            y, left = mamba(mixer, c, normed)
        elif kind == "*":
            q, k, v = _qkv(mixer, c, normed)
            y, left = _attention(mixer, q, k, v, causal=True), Context(k, v)
        else:
            y, load = moe(mixer, c, normed)
            loads.append(load)
        x = x + y
        layers.append(left)
    x = rms_norm(x, w["context_tower.norm_f.weight"], c.layer_norm_epsilon)
    return Read(linear(x, w["context_lm_head.weight"]), torch.stack(loads), layers)


def denoise(w: Weights, c: Config, blocks: Tensor, masked: Tensor, left: list[MambaStart | Context | None]) -> Read:
    """The denoiser over ``blocks`` (B, n, S), shares ``masked`` (B, n) of which are masked; ``left`` is what the
    context tower left over the same sequences. Every block sees the context strictly before it, and itself."""
    batch, n, size = blocks.shape
    x = F.embedding(blocks.flatten(0, 1), w["denoiser_tower.embeddings.weight"])  # (B n, S, H)
    shared = time_modulation(w, masked.flatten())
    visible = block_mask(n, size)
    loads = []
    for i, kind in enumerate(c.hybrid_override_pattern):
        layer = _under(w, f"denoiser_tower.layers.{i}.")
        mixer = _under(layer, "mixer.")
        shift, scale, gate = (shared + w[f"scale_shift_tables.{i}"])[:, :, None].unbind(1)  # (B n, 1, H) each
        if kind == "E":
            normed = rms_norm(x, layer["norm.weight"], c.layer_norm_epsilon) * (1 + scale) + shift
        else:
            normed = rms_norm(x * (1 + scale) + shift, layer["norm.weight"], c.layer_norm_epsilon)
        before = left[i]
        if isinstance(before, MambaStart):
            y = mamba_blocks(mixer, c, normed, before)
        elif isinstance(before, Context):
            q, k, v = _qkv(mixer, c, normed.view(batch, n * size, -1))
            k, v = torch.cat([before.k, k], 2), torch.cat([before.v, v], 2)
            y = _attention(mixer, q, k, v, visible=visible).view_as(x)
        else:
            y, load = moe(mixer, c, normed)
            loads.append(load)
        x = x + y * gate
    x = rms_norm(x, w["denoiser_tower.norm_f.weight"], c.layer_norm_epsilon)
    return Read(linear(x, w["lm_head.weight"]).unflatten(0, (batch, n)), torch.stack(loads), [])


def time_modulation(w: Weights, masked: Tensor) -> Tensor:
    """Shift, scale and gate for shares ``masked`` (B,), before the layers' tables: (B, 3, H)."""
    half = TIME_EMBEDDING // 2
    angles = masked[:, None] * 1000 * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    e = torch.cat([angles.cos(), angles.sin()], -1)
    e = F.silu(F.linear(e, w["t_embedder.mlp.0.weight"], w["t_embedder.mlp.0.bias"]))
    e = F.linear(e, w["t_embedder.mlp.2.weight"], w["t_embedder.mlp.2.bias"])
    return F.linear(F.silu(e), w["t_block.1.weight"], w["t_block.1.bias"]).unflatten(-1, (3, -1))


def block_mask(n: int, size: int) -> Tensor:
    """Which of [context | blocks] each position of n blocks sees: bool (T, 2 T)."""
    block = torch.arange(n * size) // size
    return torch.cat([block[None] < block[:, None], block[None] == block[:, None]], 1)


# ---------------------------------------------------------------------- layers


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _qkv(m: Weights, c: Config, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, heads, T, head_dim)."""
    weights = (m[f"{name}_proj.weight"] for name in "qkv")
    return tuple(linear(x, weight).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for weight in weights)


def _attention(
    m: Weights, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, causal: bool = False
) -> Tensor:
    dtype, repeats = m["o_proj.weight"].dtype, q.shape[1] // k.shape[1]
    k, v = (t.to(dtype).repeat_interleave(repeats, 1) for t in (k, v))
    out = F.scaled_dot_product_attention(q.to(dtype), k, v, attn_mask=visible, is_causal=causal)
    return linear(out.transpose(1, 2).flatten(-2), m["o_proj.weight"])


def moe(m: Weights, c: Config, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output, and the share of tokens that chose each expert (E,)."""
    scores = F.linear(x, m["gate.weight"]).sigmoid()
    chosen = (scores + m["gate.e_score_correction_bias"]).topk(c.num_experts_per_tok, -1).indices
    weights = scores.gather(-1, chosen)
    weights = c.routed_scaling_factor * weights / weights.sum(-1, keepdim=True)
    routing = torch.zeros_like(scores).scatter(-1, chosen, weights)
    up = torch.cat([m[f"experts.{e}.up_proj.weight"] for e in range(c.n_routed_experts)])
    down = torch.cat([m[f"experts.{e}.down_proj.weight"] for e in range(c.n_routed_experts)], 1)
    hidden = F.relu(linear(x, up)).square().unflatten(-1, (c.n_routed_experts, -1)) * routing[..., None]
    shared = F.relu(linear(x, m["shared_experts.up_proj.weight"])).square()
    y = linear(hidden.flatten(-2), down) + linear(shared, m["shared_experts.down_proj.weight"])
    return y, (routing > 0).float().flatten(0, -2).mean(0)


# ---------------------------------------------------------------------- Mamba-2 (Dao & Gu, arXiv 2405.21060, section 6)


def mamba(m: Weights, c: Config, x: Tensor) -> tuple[Tensor, MambaStart]:
    """Over whole sequences (B, T, H) from empty states; also the states at the starts of the blocks."""
    batch, tokens, _ = x.shape
    size = c.block_size
    n = tokens // size
    z, inputs, tail = _scan_inputs(m, c, x, x.new_zeros(batch, c.conv_kernel - 1, c.conv_channels))
    by_block = _ScanInputs(*(t.unflatten(1, (n, size)).flatten(0, 1) for t in inputs))
    scan = _scan(by_block, -m["A_log"].exp())
    starts = _carry(scan.state.unflatten(0, (batch, n)), scan.decay[..., -1].unflatten(0, (batch, n)))
    y = scan.y + _from_state(by_block, starts, scan.decay)
    y = y.transpose(1, 2).reshape(batch, tokens, c.mamba_num_heads, c.mamba_head_dim)
    before = torch.stack([tail[:, j : j + tokens : size] for j in range(c.conv_kernel - 1)], 2).flatten(0, 1)
    return _scan_output(m, c, y, inputs.x, z), MambaStart(before, starts)


def mamba_blocks(m: Weights, c: Config, x: Tensor, start: MambaStart) -> Tensor:
    """Over blocks (B n, S, H), each from its own start."""
    z, inputs, _ = _scan_inputs(m, c, x, start.conv)
    scan = _scan(inputs, -m["A_log"].exp())
    y = scan.y + _from_state(inputs, start.ssm, scan.decay)
    return _scan_output(m, c, y.transpose(1, 2), inputs.x, z)


class _ScanInputs(NamedTuple):
    x: Tensor  # (B, T, h, P)
    b: Tensor  # (B, T, h, N), a group's heads alike
    c: Tensor  # (B, T, h, N)
    dt: Tensor  # (B, T, h)


class _Scan(NamedTuple):
    y: Tensor  # (B, h, T, P)
    state: Tensor  # (B, h, P, N), after the last token
    decay: Tensor  # (B, h, T): log of what is left of the state before the first token


def _scan_inputs(m: Weights, c: Config, x: Tensor, conv: Tensor) -> tuple[Tensor, _ScanInputs, Tensor]:
    """The gate z, the scan's inputs, and the convolution's inputs from the K - 1 of ``conv`` on."""
    tokens, heads = x.shape[1], c.mamba_num_heads
    z, xbc, dt = linear(x, m["in_proj.weight"]).split([c.inner, c.conv_channels, heads], -1)
    padded = torch.cat([conv, xbc], 1)
    kernel = m["conv1d.weight"][:, 0]  # (channels, K)
    shifted = sum(padded[:, j : j + tokens] * kernel[:, j] for j in range(c.conv_kernel))
    out = F.silu(shifted + m["conv1d.bias"])
    xs, b, c_ = out.split([c.inner, c.n_groups * c.ssm_state_size, c.n_groups * c.ssm_state_size], -1)
    b, c_ = (t.unflatten(-1, (c.n_groups, -1)).repeat_interleave(heads // c.n_groups, 2) for t in (b, c_))
    return z, _ScanInputs(xs.unflatten(-1, (heads, -1)), b, c_, F.softplus(dt + m["dt_bias"])), padded


def _scan(i: _ScanInputs, a: Tensor) -> _Scan:
    """From an empty state, all pairs of tokens at once; ``a`` (h,) is negative."""
    decay = (i.dt * a).cumsum(1).transpose(1, 2)  # (B, h, T)
    tokens = decay.shape[-1]
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf).exp()  # (B, h, T, T)
    b, c = i.b.transpose(1, 2), i.c.transpose(1, 2)
    x = (i.x * i.dt[..., None]).transpose(1, 2)  # (B, h, T, P)
    y = (c @ b.mT * between) @ x
    state = (x * (decay[..., -1:] - decay).exp()[..., None]).mT @ b
    return _Scan(y, state, decay)


def _from_state(i: _ScanInputs, state: Tensor, decay: Tensor) -> Tensor:
    """What the state before the first token adds to y: (B, h, T, P)."""
    return i.c.transpose(1, 2) @ state.mT * decay.exp()[..., None]


def _carry(states: Tensor, decay: Tensor) -> Tensor:
    """States at the starts of blocks (B n, h, P, N), from what each block adds (B, n, h, P, N) and the log of what it
    leaves of the state before it (B, n, h)."""
    n = decay.shape[1]
    total = decay.cumsum(1).transpose(1, 2)  # (B, h, n), to the end of each block
    before = F.pad(total, (1, -1))
    later = torch.ones(n, n, dtype=torch.bool).triu()
    left = (before[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()  # (B, h, n, n)
    carried = left @ states.flatten(3).transpose(1, 2)  # (B, h, n, P N)
    return carried.transpose(1, 2).flatten(0, 1).unflatten(-1, states.shape[3:])


def _scan_output(m: Weights, c: Config, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """Skip connection, gated norm by group and projection of y (B, T, h, P): (B, T, H)."""
    gated = (y + m["D"][:, None] * x).flatten(-2) * F.silu(z)
    weight = m["norm.weight"].unflatten(0, (c.n_groups, -1))
    normed = rms_norm(gated.unflatten(-1, (c.n_groups, -1)), weight, c.layer_norm_epsilon)
    return linear(normed.flatten(-2), m["out_proj.weight"])


def _under(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
