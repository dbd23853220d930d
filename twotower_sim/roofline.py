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
- every kernel costs a gap; a CUDA graph costs its launch, and eager passes take at least that of their kernels.

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
        self.byte_s = 1 / (gpu.memory_bytes_per_s * gpu.reached.memory * parallel)
        self.flop_s = 1 / (gpu.flops * gpu.reached.compute * parallel)
        self.state_s = tower.state_bytes * self.byte_s  # to read, or to write, one sequence's state
        self.pair_s = 4 * tower.heads * tower.head_dim * tower.layers("*") * self.flop_s
        self.kv_token_s = tower.kv_bytes_per_token * self.byte_s * parallel / tower.kv_shards(parallel)

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
        t, tokens = self.tower, np.asarray(tokens, float)  # of large models 64 bits do not hold the FLOPs
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
        n = self.on.tensor_parallel
        if n == 1:
            return np.zeros(np.shape(tokens))
        link = self.on.gpu.fastest_link
        moved = 2 * (n - 1) / n * tokens * self.tower.hidden * self.tower.dtype_bytes
        return len(self.tower.pattern) * (moved / link.bytes_per_s + link.latency_s)

    def _gaps_s(self) -> float:
        """What a pass's kernels add to it."""
        costs = self.on.gpu.reached
        return (self.on.cuda_graphs * costs.graph_launch_us + self.kernels * costs.kernel_gap_us) * 1e-6

    @property
    def launch_s(self) -> float:
        """What a pass takes at least: eager launches, one after the other."""
        return 0.0 if self.on.cuda_graphs else self.kernels * self.on.gpu.reached.kernel_launch_us * 1e-6

    @property
    def kernels(self) -> int:
        return sum(KERNELS[layer] for layer in self.tower.pattern)

    def prompt_attention(self, maximum: Callable, pairs, context):
        """Chunks of prompts: their query-key pairs, or the keys and values they read."""
        return maximum(pairs * self.pair_s, context * self.kv_token_s)

    def moe(self) -> Callable:
        """The routed experts of all layers: (maximum, share of them left untouched, tokens) to seconds."""
        t = self.tower
        count, routed, byte_s = t.layers("E"), t.experts_per_token, t.dtype_bytes * self.byte_s
        read_s = count * t.experts * t.expert_params * byte_s
        io_s = count * routed * 2 * (t.expert_io + t.expert_width) * byte_s
        flop_s = count * routed * 2 * t.expert_params * self.flop_s

        def cost(maximum: Callable, untouched, tokens):
            return maximum((1 - untouched) * read_s + tokens * io_s, tokens * flop_s)

        return cost

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
    forward, size = _Forward(tower, on), block_size
    n, tokens = np.arange(max_num_seqs + 1), np.arange(max_num_batched_tokens + 1)
    moe, round_s, launch_s = forward.moe(), _round(tower, on), forward.launch_s
    context_token_s, pair_s, states_s = forward.context_token_s(size), forward.pair_s, 2 * forward.state_s
    own_pairs_s = size * (size + 1) // 2 * pair_s
    tables = (
        forward.dense(tokens),
        forward.untouched(routing, "blocks", n * size),
        forward.untouched(routing, "blocks", tokens),
    )

    def context_pass(maximum, dense_s, extends_free, prompts_free):
        """The context tower's forward but for the extends' attention to their context."""

        def cost(n_extend, prefill_tokens=0, prefill_pairs=0, prefill_context=0, n_prefill=0):
            q = n_extend * size + prefill_tokens
            prompts_s = forward.prompt_attention(maximum, prefill_pairs, prefill_context)
            moe_s = moe(maximum, extends_free[n_extend] * prompts_free[prefill_tokens], q)
            return dense_s[q] + moe_s + n_extend * own_pairs_s + prompts_s + (n_extend + n_prefill) * states_s

        return cost

    def decode(maximum, denoise_s, extend_s, launches_s):
        def cost(n, context, n_extend, extend_context):
            denoiser_s = maximum(denoise_s[n] + context * context_token_s, launches_s[n])
            context_s = maximum(extend_s[n_extend] + extend_context * context_token_s, launches_s[n_extend])
            return denoiser_s, context_s, round_s(maximum, denoiser_s, context_s, n_extend, n_extend * size)

        return cost

    denoise = forward.dense(n * size) + moe(np.maximum, tables[1], n * size) + forward.head(n * size)
    denoise += (n > 0) * (tower.time_params * tower.dtype_bytes * forward.byte_s)
    denoise += n * (size * size * pair_s + forward.state_s)
    extend, launches = context_pass(np.maximum, *tables)(n), (n > 0) * launch_s
    context_work = context_pass(max, *(table.tolist() for table in tables))
    denoise_s, launches_s = denoise.tolist(), launches.tolist()

    def mixed(n, context, n_extend, extend_context, prefill_tokens, prefill_pairs, prefill_context, n_prefill):
        denoiser_s = max(denoise_s[n] + context * context_token_s, launches_s[n])
        work_s = context_work(n_extend, prefill_tokens, prefill_pairs, prefill_context, n_prefill)
        context_s = max(work_s + extend_context * context_token_s, launch_s)
        q = n_extend * size + prefill_tokens
        return denoiser_s, context_s, round_s(max, denoiser_s, context_s, n_extend + n_prefill, q)

    return Latency.of(decode, (denoise, extend, launches), mixed, side_by_side=on.link is not None)


def autoregressive_roofline(
    tower: Tower, on: Deployment, routing: Routing, max_num_seqs: int, max_num_batched_tokens: int
) -> Latency:
    """Latency of rounds of one context forward of decoded tokens and prompt chunks."""
    forward, host_s = _Forward(tower, on), on.host_overhead_s
    n, tokens = np.arange(max_num_seqs + 1), np.arange(max_num_batched_tokens + 1)
    moe, launch_s = forward.moe(), forward.launch_s
    context_token_s, states_s = forward.context_token_s(1), 2 * forward.state_s
    tables = (
        forward.dense(tokens),
        forward.head(n),
        forward.untouched(routing, "singles", n),
        forward.untouched(routing, "blocks", tokens),
    )

    def forward_pass(maximum, dense_s, head_s, decodes_free, prompts_free):
        """The forward but for the decodes' attention."""

        def cost(n, prefill_tokens=0, prefill_pairs=0, prefill_context=0, n_prefill=0):
            q, sequences = n + prefill_tokens, n + n_prefill
            prompts_s = forward.prompt_attention(maximum, prefill_pairs, prefill_context)
            moe_s = moe(maximum, decodes_free[n] * prompts_free[prefill_tokens], q)
            return dense_s[q] + moe_s + prompts_s + sequences * states_s + head_s[sequences]

        return cost

    def decode(maximum, step_s, launches_s):
        def cost(n, context, n_extend, extend_context):
            context_s = maximum(step_s[n] + context * context_token_s, launches_s[n])
            return 0.0, context_s, host_s + context_s

        return cost

    work = forward_pass(max, *(table.tolist() for table in tables))

    def mixed(n, context, n_extend, extend_context, prefill_tokens, prefill_pairs, prefill_context, n_prefill):
        work_s = work(n, prefill_tokens, prefill_pairs, prefill_context, n_prefill)
        context_s = max(work_s + context * context_token_s, launch_s)
        return 0.0, context_s, host_s + context_s

    step = forward_pass(np.maximum, *tables)(n)
    return Latency.of(decode, (step, (n > 0) * launch_s), mixed, side_by_side=False)


def _round(tower: Tower, on: Deployment) -> Callable:
    """A round from its two passes: in turns on the same GPUs; side by side where the towers are apart, when the
    context tower also sends the states and the new keys and values over the link before the round ends."""
    host_s, link = on.host_overhead_s, on.link
    if link is None:
        return lambda maximum, denoiser_s, context_s, states, tokens: host_s + denoiser_s + context_s
    state_s = tower.state_bytes / on.tensor_parallel / link.bytes_per_s  # every GPU of the group sends its own part
    token_s = tower.kv_bytes_per_token / tower.kv_shards(on.tensor_parallel) / link.bytes_per_s
    hop_s = link.latency_s

    def split(maximum, denoiser_s, context_s, states, tokens):
        return host_s + maximum(denoiser_s, context_s + (states > 0) * hop_s + states * state_s + tokens * token_s)

    return split
