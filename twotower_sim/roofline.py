"""Modelled latency: for every kind of layer the larger of bytes / bandwidth and FLOPs / throughput.

The formulas are the roofline's (Williams et al., 2009) over the shapes in ``model.py``:

- weights are read once a pass; of the routed experts, those that the pass touches (``routing.py``);
- attention reads each sequence's keys and values once and computes 4 x heads x head_dim FLOPs for each
  query-key pair and layer;
- a Mamba layer reads each sequence's state and, but for denoising (which leaves it as it is), writes it;
- the head runs on all positions of a denoise pass, on one token of each sequence in autoregressive
  decoding, and not at all in extend passes and two-tower prefills: nothing is sampled from them;
- tensor parallelism divides weights, heads, states and FLOPs, and adds an all-reduce a layer (ring:
  2 (n - 1) / n of the activations over the link, plus its latency);
- every kernel costs a gap inside a CUDA graph; eager passes take at least the time to launch them.

The context tower's forward carries extends (or decodes) and prompt chunks together and is costed as that
mix, not as a sum of passes: its weights are read once, its MoE layers touch the union of the experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from twotower_sim.gpu import Gpu, Link
from twotower_sim.latency import Latency
from twotower_sim.model import Tower
from twotower_sim.routing import Routing

KERNELS = {"M": 7, "E": 9, "*": 6, "-": 4}
"""Kernels of a layer in a fused implementation (norm and residual fused): M in_proj, conv, scan, gated norm,
out_proj, norm, copy; E norm, router, top-k, permute, grouped up, grouped down, shared up, shared down,
combine; * norm, QKV, cache write, attention, combine, output; - norm, up, activation, down."""


@dataclass(frozen=True)
class Deployment:
    """The hardware side of a replica: each tower on ``tensor_parallel`` GPUs, together or (``link``) apart."""

    gpu: Gpu
    tensor_parallel: int = 1
    link: Link | None = None  # between the towers' GPUs; None: both on the same
    cuda_graphs: bool = True
    host_overhead_s: float = 0.0


class _Forward:
    """Seconds of the parts of one tower's forward, on integer arrays of any shape."""

    def __init__(self, tower: Tower, on: Deployment) -> None:
        self.tower, self.on = tower, on
        gpu, parallel = on.gpu, on.tensor_parallel
        self.byte_s = 1 / (gpu.memory_bytes_per_s * gpu.efficiency.memory * parallel)
        self.flop_s = 1 / (gpu.flops * gpu.efficiency.compute * parallel)
        self.state_s = tower.state_bytes * self.byte_s  # to read, or to write, one sequence's state
        self.pair_s = 4 * tower.heads * tower.head_dim * tower.layers("*") * self.flop_s
        # KV heads are divided among the GPUs as far as there are any, and copied beyond
        self.kv_token_s = tower.kv_bytes_per_token * self.byte_s * parallel / min(parallel, tower.kv_heads)

    def context_token_s(self, queries: int) -> float:
        """Attention of ``queries`` positions of a sequence to one token of its context."""
        return max(self.kv_token_s, queries * self.pair_s)

    def _layers(self, count: int, params: int, io: int, tokens: np.ndarray, flops_per_token: int = 0) -> np.ndarray:
        """``count`` layers of dense weights; ``io``: elements a token reads and writes on the way."""
        size = self.tower.dtype_bytes
        moved = (params + io * tokens) * size * self.byte_s
        return count * np.maximum(moved, (2 * params + flops_per_token) * tokens * self.flop_s)

    def dense(self, tokens: np.ndarray) -> np.ndarray:
        """All that depends on the number of tokens alone: every layer's dense part, all-reduces, kernels."""
        t = self.tower
        # state-space duality in chunks (Dao & Gu, 2024): within a chunk, and through the chunk's state
        scan = 2 * t.chunk * (t.groups * t.state + t.inner) + 4 * t.inner * t.state
        mamba_io = 2 * t.hidden + 3 * t.inner + 4 * t.conv_channels + 2 * t.inner
        attention_io = 2 * t.hidden + 2 * (2 * t.heads + 2 * t.kv_heads) * t.head_dim
        seconds = self._layers(t.layers("M"), t.mamba_params, mamba_io, tokens, scan)
        seconds = seconds + self._layers(t.layers("*"), t.attention_params, attention_io, tokens)
        seconds += self._layers(t.layers("E"), t.moe_dense_params, 2 * t.hidden + 2 * t.shared_width, tokens)
        seconds += self._layers(t.layers("-"), t.mlp_params, 2 * t.hidden + 2 * t.mlp_width, tokens)
        seconds += self._all_reduces(tokens) + self._gaps_s()
        return np.where(tokens > 0, seconds, 0.0)

    def _all_reduces(self, tokens: np.ndarray) -> np.ndarray:
        n, link = self.on.tensor_parallel, self.on.gpu.fastest_link
        if n == 1:
            return np.zeros(np.shape(tokens))
        moved = 2 * (n - 1) / n * tokens * self.tower.hidden * self.tower.dtype_bytes
        return len(self.tower.pattern) * (moved / link.bytes_per_s + link.latency_s)

    def _gaps_s(self) -> float:
        """What a pass's kernels add to it."""
        costs = self.on.gpu.efficiency
        return (costs.graph_launch_us + self.kernels * costs.kernel_gap_us) * 1e-6 if self.on.cuda_graphs else 0.0

    @property
    def launch_s(self) -> float:
        """What a pass takes at least: eager launches."""
        return 0.0 if self.on.cuda_graphs else self.kernels * self.on.gpu.efficiency.kernel_launch_us * 1e-6

    @property
    def kernels(self) -> int:
        return sum(KERNELS[layer] for layer in self.tower.pattern)

    def moe(self, maximum: Callable = np.maximum) -> Callable:
        """The routed experts of all layers: (share of them left untouched, tokens) to seconds."""
        t = self.tower
        count, routed, byte_s = t.layers("E"), t.experts_per_token, t.dtype_bytes * self.byte_s
        read_s = count * t.experts * t.expert_params * byte_s
        io_s = count * routed * 2 * (t.expert_io + t.expert_width) * byte_s
        flop_s = count * routed * 2 * t.expert_params * self.flop_s
        return lambda untouched, tokens: maximum((1 - untouched) * read_s + tokens * io_s, tokens * flop_s)

    def untouched(self, routing: Routing, curve: str, tokens: np.ndarray) -> np.ndarray:
        """Share of the experts of a layer that ``tokens`` leave alone; 1 where there are none."""
        t = self.tower
        return routing.untouched(curve, tokens, t.experts, t.experts_per_token) if t.experts else np.ones(len(tokens))

    def head(self, rows: np.ndarray) -> np.ndarray:
        """Logits of ``rows`` positions, written and read once in fp32 to sample from."""
        t = self.tower
        moved = (t.head_params * t.dtype_bytes + rows * t.vocab * 8) * self.byte_s
        return np.where(rows > 0, np.maximum(moved, 2 * t.head_params * rows * self.flop_s), 0.0)


def two_tower_roofline(
    tower: Tower, on: Deployment, routing: Routing, block_size: int, max_num_seqs: int, max_num_batched_tokens: int
) -> Latency:
    """Latency of rounds of denoise passes beside one context forward of extends and prompt chunks."""
    forward, size, n = _Forward(tower, on), block_size, np.arange(max_num_seqs + 1)
    blocks_free = forward.untouched(routing, "blocks", n * size)
    both = forward.dense(n * size) + forward.moe()(blocks_free, n * size)
    extra = (n > 0) * (tower.time_params * tower.dtype_bytes * forward.byte_s) + forward.head(n * size)
    denoise = both + extra + n * (size * size * forward.pair_s + forward.state_s)
    own_pairs = size * (size + 1) // 2
    extend = both + n * (own_pairs * forward.pair_s + 2 * forward.state_s)
    context_token_s, launches, round_s = forward.context_token_s(size), (n > 0) * forward.launch_s, _round(tower, on)

    def decode(maximum, denoise_s, extend_s, launches_s):
        def cost(n, context, n_extend, extend_context):
            denoiser_s = maximum(denoise_s[n] + context * context_token_s, launches_s[n])
            context_s = maximum(extend_s[n_extend] + extend_context * context_token_s, launches_s[n_extend])
            return denoiser_s, context_s, round_s(maximum, denoiser_s, context_s, n_extend, n_extend * size)

        return cost

    tokens = np.arange(max_num_batched_tokens + 1)
    dense_s, prompt_free = forward.dense(tokens).tolist(), forward.untouched(routing, "blocks", tokens).tolist()
    denoise_s, launches_s, extends_free = denoise.tolist(), launches.tolist(), blocks_free.tolist()
    moe = forward.moe(max)
    pair_s, state_s, launch_s = forward.pair_s, 2 * forward.state_s, forward.launch_s

    def mixed(n, context, n_extend, extend_context, prefill_tokens, prefill_pairs, n_prefill):
        denoiser_s = max(denoise_s[n] + context * context_token_s, launches_s[n])
        q, states = n_extend * size + prefill_tokens, n_extend + n_prefill
        attention_s = extend_context * context_token_s + (n_extend * own_pairs + prefill_pairs) * pair_s
        moe_s = moe(extends_free[n_extend] * prompt_free[prefill_tokens], q)
        context_s = max(dense_s[q] + moe_s + attention_s + states * state_s, launch_s)
        return denoiser_s, context_s, round_s(max, denoiser_s, context_s, states, q)

    return Latency.of(decode, (denoise, extend, launches), mixed, side_by_side=on.link is not None)


def autoregressive_roofline(
    tower: Tower, on: Deployment, routing: Routing, max_num_seqs: int, max_num_batched_tokens: int
) -> Latency:
    """Latency of rounds of one context forward of decoded tokens and prompt chunks."""
    forward, n, host_s = _Forward(tower, on), np.arange(max_num_seqs + 1), on.host_overhead_s
    singles_free, head = forward.untouched(routing, "singles", n), forward.head(n)
    step = forward.dense(n) + forward.moe()(singles_free, n) + head + n * 2 * forward.state_s
    context_token_s, launches = forward.context_token_s(1), (n > 0) * forward.launch_s

    def decode(maximum, step_s, launches_s):
        def cost(n, context, n_extend, extend_context):
            context_s = maximum(step_s[n] + context * context_token_s, launches_s[n])
            return 0.0, context_s, host_s + context_s

        return cost

    tokens = np.arange(max_num_batched_tokens + 1)
    dense_s, prompt_free = forward.dense(tokens).tolist(), forward.untouched(routing, "blocks", tokens).tolist()
    decodes_free, head_s, moe = singles_free.tolist(), head.tolist(), forward.moe(max)
    pair_s, state_s, launch_s = forward.pair_s, 2 * forward.state_s, forward.launch_s

    def mixed(n, context, n_extend, extend_context, prefill_tokens, prefill_pairs, n_prefill):
        q, states = n + prefill_tokens, n + n_prefill
        attention_s = context * context_token_s + prefill_pairs * pair_s
        moe_s = moe(decodes_free[n] * prompt_free[prefill_tokens], q)
        work_s = dense_s[q] + moe_s + attention_s + states * state_s + head_s[states]
        context_s = max(work_s, launch_s)
        return 0.0, context_s, host_s + context_s

    return Latency.of(decode, (step, launches), mixed, side_by_side=False)


def _round(tower: Tower, on: Deployment) -> Callable:
    """A round from its two passes: in turns on the same GPUs; side by side where the towers are apart, when the
    context tower also sends the states and the new keys and values over the link before the round ends."""
    host_s, link = on.host_overhead_s, on.link
    if link is None:
        return lambda maximum, denoiser_s, context_s, states, tokens: host_s + denoiser_s + context_s
    bytes_per_s = link.bytes_per_s * on.tensor_parallel
    state_s, token_s, hop_s = tower.state_bytes / bytes_per_s, tower.kv_bytes_per_token / bytes_per_s, link.latency_s

    def split(maximum, denoiser_s, context_s, states, tokens):
        return host_s + maximum(denoiser_s, context_s + (states > 0) * hop_s + states * state_s + tokens * token_s)

    return split
