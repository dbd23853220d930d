"""Nemotron-TwoTower: a causal context tower that owns the cache, and a denoiser that fills blocks of masks.

Both towers are NemotronH stacks of Mamba-2 (``M``), attention (``*``), mixture-of-experts (``E``) and MLP (``-``)
layers (NVIDIA, arXiv 2504.03624; Dao & Gu, arXiv 2405.21060, for Mamba-2). The denoiser is conditioned on t, the share
of its block that is still masked, by adaLN-single (Nemotron-TwoTower, arXiv 2606.26493; Chen et al., arXiv 2310.00426).
Modules are named as the checkpoint's tensors, but for experts, which are stacked.

A pass runs over *segments*: groups of sequences that take equally many tokens. Dense layers see all tokens of a pass as
one matrix, so that extends and prompts share one read of the weights; attention and Mamba layers go segment by segment.

Symbols: B sequences, T tokens of each in the pass, N tokens of the pass, S block size, H hidden width, V vocabulary.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrate.kernels import block_attention, block_scan, grouped_experts, modulated_norm
from twotower_sim.errors import InputError

TIME_EMBEDDING = 256  # width of the sinusoidal embedding of t

# ---------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """Dimensions, by the names of a NemotronH ``config.json``; the mask, the block and the name are the two-tower's."""

    hybrid_override_pattern: str
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    routed_scaling_factor: float = 1.0
    intermediate_size: int = 0
    layer_norm_epsilon: float = 1e-5
    max_position_embeddings: int = 262_144
    eos_token_id: int | None = 2
    mask_token_id: int = 3
    block_size: int = 16
    name: str | None = None

    @property
    def inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        return self.inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def expert_input(self) -> int:
        return self.moe_latent_size or self.hidden_size

    @classmethod
    def read(cls, path: Path) -> "Config":
        """Raises InputError that names the file and what is wrong with it."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a NemotronH config.json: {error}") from None
        if not isinstance(data, dict):
            raise InputError(f"{path}: not a NemotronH config.json: the top level is no object")
        return cls.of(data, str(path))

    @classmethod
    def of(cls, data: dict[str, Any], where: str) -> "Config":
        fields = cls.__dataclass_fields__
        known = {name: data[name] for name in fields if data.get(name) is not None}
        if missing := [name for name in list(fields)[:11] if name not in known]:
            raise InputError(f"{where}: {missing[0]} is missing; expected a NemotronH config.json")
        for name, value in known.items():
            number = (int, float) if name in ("routed_scaling_factor", "layer_norm_epsilon") else int
            if name in ("hybrid_override_pattern", "name"):
                continue
            if not isinstance(value, number) or isinstance(value, bool) or value < 0:
                raise InputError(f"{where}: {name} is {value!r}; expected a number >= 0, as in a NemotronH config.json")
        config = cls(**known)
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        found: object = self.hybrid_override_pattern
        if not isinstance(found, str) or not found or set(found) - set("ME*-"):
            raise InputError(f"{where}: hybrid_override_pattern is {found!r}; expected a string of M, E, * and -")
        divides = [
            ("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads),
            ("mamba_num_heads", self.mamba_num_heads, "n_groups", self.n_groups),
        ]
        for whole_name, whole, part_name, part in divides:
            if not part or whole % part:
                raise InputError(f"{where}: {whole_name} is {whole}, no multiple of {part_name} {part}")
        if "E" in self.hybrid_override_pattern and not 0 < self.num_experts_per_tok <= self.n_routed_experts:
            found = f"num_experts_per_tok is {self.num_experts_per_tok}"
            raise InputError(f"{where}: {found}; expected 1 to n_routed_experts {self.n_routed_experts}")


# ---------------------------------------------------------------------- what a pass reads and writes


class Segment(NamedTuple):
    """Sequences that take equally many tokens in a pass."""

    rows: Tensor  # (B,) int64: their slots in the cache
    ids: Tensor  # (B, T) int64


class Cache:
    """Keys and values of every attention layer and the two states of every Mamba layer, a slot a sequence."""

    def __init__(self, config: Config, slots: int, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.slots, self.tokens, self.device, self.dtype = config, slots, tokens, device, dtype
        c = config
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.conv: dict[int, Tensor] = {}  # the last inputs of the convolution
        self.ssm: dict[int, Tensor] = {}  # fp32: long contexts overflow a bf16 state
        for i, kind in enumerate(c.hybrid_override_pattern):
            if kind == "*":
                shape = slots, tokens, c.num_key_value_heads, c.head_dim
                self.keys[i], self.values[i] = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
            elif kind == "M":
                tail = slots, c.conv_channels, c.conv_kernel - 1
                self.conv[i] = torch.zeros(tail, device=device, dtype=dtype)
                state = slots, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size
                self.ssm[i] = torch.zeros(state, device=device, dtype=torch.float32)

    @property
    def state_bytes(self) -> int:
        """Of one sequence, whatever its context."""
        states = [*self.conv.values(), *self.ssm.values()]
        return sum(state[0].numel() * state.element_size() for state in states)

    @property
    def token_bytes(self) -> int:
        return sum(kv[0, 0].numel() * kv.element_size() for kv in [*self.keys.values(), *self.values.values()])

    def reset(self, rows: Tensor) -> None:
        """Forget the sequences in ``rows``."""
        self.lengths[rows] = 0
        for state in [*self.conv.values(), *self.ssm.values()]:
            state[rows] = 0

    def store(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Append k, v (B, T, heads, head_dim) after each sequence's context; ``grow`` then counts them."""
        at = self.lengths[rows, None] + torch.arange(k.shape[1], device=self.device)
        self.keys[layer][rows[:, None], at] = k
        self.values[layer][rows[:, None], at] = v

    def grow(self, rows: Tensor, tokens: int) -> None:
        self.lengths[rows] += tokens

    def send(self, other: "Cache", rows: Tensor, tokens: int) -> None:
        """Bring ``other``, a mirror on another device, up to date: states, and the latest ``tokens`` of the context."""
        there = rows.to(other.device)
        at = self.lengths[rows, None] - tokens + torch.arange(tokens, device=self.device)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, kv in mine.items():
                theirs[layer][there[:, None], at.to(other.device)] = kv[rows[:, None], at].to(other.device)
        for mine, theirs in ((self.conv, other.conv), (self.ssm, other.ssm)):
            for layer, state in mine.items():
                theirs[layer][there] = state[rows].to(other.device)
        other.lengths[there] = self.lengths[rows].to(other.device)


@dataclass(frozen=True)
class Pass:
    """One forward: its segments, the cache it reads, and whether it reads causally and appends to the cache."""

    segments: Sequence[Segment]
    cache: Cache
    causal: bool
    write: bool

    def split(self, x: Tensor) -> list[Tensor]:
        """(N, …) into a (B, T, …) for each segment."""
        parts = x.split([s.ids.numel() for s in self.segments])
        return [part.unflatten(0, s.ids.shape) for part, s in zip(parts, self.segments, strict=True)]

    def join(self, parts: list[Tensor]) -> Tensor:
        flat = [part.flatten(0, 1) for part in parts]
        return flat[0] if len(flat) == 1 else torch.cat(flat)


# ---------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:  # (N, H)
        return modulated_norm(x[None], self.weight, self.eps)[0]


class GatedNorm(nn.Module):
    """RMSNorm of y * silu(z) over each of the groups of a Mamba layer."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight, self.groups, self.eps = nn.Parameter(torch.ones(width)), groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:  # (N, inner)
        gated = (y.float() * F.silu(z.float())).unflatten(-1, (self.groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.flatten(-2).to(y.dtype)


class Mamba(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c, self.scan = c, block_scan
        self.in_proj = nn.Linear(c.hidden_size, c.inner + c.conv_channels + c.mamba_num_heads, bias=False)
        self.conv1d = nn.Conv1d(c.conv_channels, c.conv_channels, c.conv_kernel, groups=c.conv_channels)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.zeros(c.mamba_num_heads)) for _ in range(3))
        self.norm = GatedNorm(c.inner, c.n_groups, c.layer_norm_epsilon)
        self.out_proj = nn.Linear(c.inner, c.hidden_size, bias=False)

    def forward(self, x: Tensor, layer: int, run: Pass) -> Tensor:  # (N, H)
        c, cache = self.c, run.cache
        z, xbc, dt = self.in_proj(x).split([c.inner, c.conv_channels, c.mamba_num_heads], dim=-1)
        assert self.conv1d.bias is not None
        weights = self.conv1d.weight[:, 0], self.conv1d.bias, self.dt_bias, self.A_log, self.D
        parts = [
            self.scan(part, step, cache.conv[layer], cache.ssm[layer], s.rows, *weights, c.n_groups, run.write)
            for part, step, s in zip(run.split(xbc), run.split(dt), run.segments, strict=True)
        ]
        return self.out_proj(self.norm(run.join(parts), z))


class Attention(nn.Module):
    """Grouped-query attention without positional embedding."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, c.hidden_size, bias=False)

    def forward(self, x: Tensor, layer: int, run: Pass) -> Tensor:  # (N, H)
        cache, head_dim = run.cache, self.c.head_dim
        q, k, v = (run.split(proj(x).unflatten(-1, (-1, head_dim))) for proj in (self.q_proj, self.k_proj, self.v_proj))
        parts = []
        for i, s in enumerate(run.segments):
            context = cache.lengths[s.rows]
            kv = k[i], v[i], cache.keys[layer], cache.values[layer]
            parts.append(block_attention(q[i], *kv, s.rows, context, run.causal).flatten(-2))
            if run.write:
                cache.store(layer, s.rows, k[i], v[i])
        return self.o_proj(run.join(parts))


class Mlp(nn.Module):
    """Non-gated MLP with relu^2."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(hidden, width, bias=False), nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor, layer: int = -1, run: Pass | None = None) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Router(nn.Module):
    """Sigmoid scores in fp64; the correction bias counts for choosing only (DeepSeek-V3, arXiv 2412.19437)."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.top, self.scaling = c.num_experts_per_tok, c.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(c.n_routed_experts, c.hidden_size, dtype=torch.float64))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(c.n_routed_experts, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H) to the experts of each token and their weights, both (N, k)."""
        scores = F.linear(x.double(), self.weight).sigmoid()
        experts = (scores + self.e_score_correction_bias).topk(self.top, dim=-1).indices
        chosen = scores.gather(-1, experts)
        return experts, (self.scaling * chosen / chosen.sum(-1, keepdim=True)).float()


class Experts(nn.Module):
    """Routed experts, stacked."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(c.n_routed_experts, c.moe_intermediate_size, c.expert_input))
        self.down_proj = nn.Parameter(torch.zeros(c.n_routed_experts, c.expert_input, c.moe_intermediate_size))


class MoE(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate, self.experts = Router(c), Experts(c)
        self.shared_experts = Mlp(c.hidden_size, c.moe_shared_expert_intermediate_size)
        if c.moe_latent_size:
            self.fc1_latent_proj = nn.Linear(c.hidden_size, c.moe_latent_size, bias=False)
            self.fc2_latent_proj = nn.Linear(c.moe_latent_size, c.hidden_size, bias=False)
        self.latent = c.moe_latent_size is not None

    def forward(self, x: Tensor, layer: int = -1, run: Pass | None = None) -> Tensor:  # (N, H)
        experts, weights = self.gate(x)
        routed = self.fc1_latent_proj(x) if self.latent else x
        routed = grouped_experts(routed, self.experts.up_proj, self.experts.down_proj, experts, weights)
        return (self.fc2_latent_proj(routed) if self.latent else routed) + self.shared_experts(x)


class Layer(nn.Module):
    """Norm, mixer, residual; with (shift, scale, gate), each (B, H), the denoiser's modulated form of it."""

    def __init__(self, c: Config, kind: str, index: int) -> None:
        super().__init__()
        self.kind, self.index = kind, index
        self.norm = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.mixer: nn.Module = _mixer(c, kind)

    def forward(self, x: Tensor, run: Pass, modulation: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        if modulation is None:
            return x + self.mixer(self.norm(x), self.index, run)
        shift, scale, gate = modulation
        sequences = len(gate)
        blocks = x.unflatten(0, (sequences, -1))  # (B, S, H)
        first = self.kind in "M*"  # E layers norm and then modulate
        normed = modulated_norm(blocks, self.norm.weight, self.norm.eps, shift, scale, modulate_first=first)
        mixed = self.mixer(normed.flatten(0, 1), self.index, run).unflatten(0, (sequences, -1))
        return (blocks + mixed * gate[:, None]).flatten(0, 1)


def _mixer(c: Config, kind: str) -> nn.Module:
    if kind == "-":
        return Mlp(c.hidden_size, c.intermediate_size)
    return {"M": Mamba, "*": Attention, "E": MoE}[kind](c)


# ---------------------------------------------------------------------- towers


class Tower(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, kind, i) for i, kind in enumerate(c.hybrid_override_pattern))
        self.norm_f = RMSNorm(c.hidden_size, c.layer_norm_epsilon)

    def forward(self, run: Pass, modulations: Tensor | None = None) -> Tensor:
        """The last hidden states (N, H); ``modulations`` (layers, 3, B, H) for the one segment of a denoise pass."""
        x = self.embeddings(run.join([s.ids for s in run.segments]))
        for i, layer in enumerate(self.layers):
            x = layer(x, run, None if modulations is None else tuple(modulations[i]))
        if run.write:
            for s in run.segments:
                run.cache.grow(s.rows, s.ids.shape[1])
        return self.norm_f(x)


class TimeEmbedder(nn.Module):
    """Sinusoids of t x 1000 (cosines first, base 10,000) through an MLP."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_EMBEDDING, c.hidden_size), nn.SiLU(), nn.Linear(c.hidden_size, c.hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:  # (B,) to (B, H)
        half = TIME_EMBEDDING // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        angles = t.float()[:, None] * 1000 * rates
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(next(self.parameters()).dtype))


class TwoTower(nn.Module):
    """The model. Every pass takes slots ``rows`` (B,) of a cache; nothing but ``extend``, ``prefill`` and ``decode`` of
    the context tower writes to it."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.context_tower, self.denoiser_tower = Tower(c), Tower(c)
        self.context_lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.t_embedder = TimeEmbedder(c)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(c.hidden_size, 3 * c.hidden_size))
        tables = (nn.Parameter(torch.zeros(3, c.hidden_size)) for _ in c.hybrid_override_pattern)
        self.scale_shift_tables = nn.ParameterList(tables)

    @property
    def device(self) -> torch.device:
        """Of the context tower and the cache."""
        return self.context_lm_head.weight.device

    @property
    def denoiser_device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def split(self) -> bool:
        """Whether the towers are on different devices."""
        return self.device != self.denoiser_device

    def cache(self, slots: int, tokens: int) -> "TowerCaches":
        """Room for ``slots`` sequences of ``tokens`` tokens; rounded up to whole blocks and one block of slack."""
        size = (-(-tokens // self.config.block_size) + 1) * self.config.block_size
        return TowerCaches(self, slots, size)

    @torch.inference_mode()
    def context_pass(self, segments: Sequence[Segment], caches: "TowerCaches") -> list[Tensor]:
        """One forward of the context tower over extends and prompts together; hidden states (B, T, H) a segment."""
        run = Pass(segments, caches.context, causal=True, write=True)
        return run.split(self.context_tower(run))

    def prefill(self, prompts: Sequence[Tensor], rows: Sequence[int], caches: "TowerCaches") -> Tensor:
        """Read prompts, each (T,) with T >= 1, into slots ``rows``; logits (B, V) of their last positions."""
        segments = [
            Segment(torch.tensor([row], device=self.device), ids[None]) for row, ids in zip(rows, prompts, strict=True)
        ]
        return self.last_logits(segments, caches)

    def last_logits(self, segments: Sequence[Segment], caches: "TowerCaches") -> Tensor:
        """Append ``segments`` to the cache; logits (B, V) of the last position of every sequence in turn."""
        hidden = self.context_pass(segments, caches)
        caches.update(segments)
        return self.context_lm_head(torch.cat([h[:, -1] for h in hidden]))

    def extend(self, ids: Tensor, rows: Tensor, caches: "TowerCaches") -> None:
        """Append committed blocks ``ids`` (B, S) to the cache."""
        segment = Segment(rows, ids)
        self.context_pass([segment], caches)
        caches.update([segment])

    def decode(self, ids: Tensor, rows: Tensor, caches: "TowerCaches") -> Tensor:
        """Append the latest tokens ``ids`` (B,) and predict the next: logits (B, V)."""
        (hidden,) = self.context_pass([Segment(rows, ids[:, None])], caches)
        return self.context_lm_head(hidden[:, -1])

    @torch.inference_mode()
    def denoise(self, ids: Tensor, rows: Tensor, masked: Tensor, caches: "TowerCaches") -> Tensor:
        """Logits (B, S, V) of blocks ``ids`` (B, S) of which the shares ``masked`` (B,) are masked."""
        device = self.denoiser_device
        run = Pass([Segment(rows.to(device), ids.to(device))], caches.denoiser, causal=False, write=False)
        return self.lm_head(self.denoiser_tower(run, self.modulations(masked.to(device)))).unflatten(0, ids.shape)

    @torch.inference_mode()
    def mock_decode(self, ids: Tensor, rows: Tensor, caches: "TowerCaches") -> Tensor:
        """The denoiser as an autoregressive model: it reads the latest tokens ``ids`` (B,), which are not in the cache
        yet, causally and without modulation, and predicts the next: logits (B, V)."""
        device = self.denoiser_device
        run = Pass([Segment(rows.to(device), ids.to(device)[:, None])], caches.denoiser, causal=True, write=False)
        return self.lm_head(self.denoiser_tower(run))

    def modulations(self, masked: Tensor) -> Tensor:
        """(shift, scale, gate) of every layer for shares ``masked`` (B,): (layers, 3, B, H)."""
        shared = self.t_block(self.t_embedder(masked)).unflatten(-1, (3, -1))  # (B, 3, H)
        tables = torch.stack(list(self.scale_shift_tables))  # (layers, 3, H)
        return (shared + tables[:, None]).transpose(1, 2)


class TowerCaches:
    """The context tower's cache, and the denoiser's mirror of it where the towers are on different devices."""

    def __init__(self, model: TwoTower, slots: int, tokens: int) -> None:
        dtype = model.context_lm_head.weight.dtype
        self.context = Cache(model.config, slots, tokens, model.device, dtype)
        self.denoiser = self.context
        if model.split:
            self.denoiser = Cache(model.config, slots, tokens, model.denoiser_device, dtype)

    def update(self, segments: Sequence[Segment]) -> None:
        """Send what a context pass has just written to the mirror, if there is one."""
        if self.denoiser is not self.context:
            for s in segments:
                self.context.send(self.denoiser, s.rows, s.ids.shape[1])
