"""Modelled latency: for every kind of layer the larger of bytes / bandwidth and FLOPs / throughput.

The formulas are the roofline's (Williams et al., 2009) over the shapes in ``model.py``:

- weights are read once a pass; of the routed experts, those that the pass touches (``routing.py``);
- attention reads each sequence's keys and values once and computes 4 x heads x head_dim FLOPs for each
  query-key pair and layer;
- a Mamba layer reads each sequence's state and, but for denoising (which leaves it as it is), writes it;
  a verify pass writes one a position, so that rejected drafts can be rolled back;
- the head runs on all positions of a denoise or verify pass, on one token of each sequence in autoregressive
  decoding, and not at all in extend passes and two-tower prefills: nothing is sampled from them;
- tensor parallelism divides weights, heads, states and FLOPs, and adds an all-reduce a layer (ring:
  2 (n - 1) / n of the activations over the link, plus its latency);
- expert parallelism leaves routed experts whole, each on one of the tower's GPUs (as vLLM does with
  ``--enable-expert-parallel`` and sequence-parallel MoE): every GPU dispatches its share of the tokens to their
  experts and combines what comes back, two all-to-alls in which (n - 1) / n of the copies leave it. The all-reduce
  stays: its first half sums the shared expert, its second gathers what was combined. The layer waits for the GPU
  with the most experts touched;
- every kernel costs a gap; a CUDA graph costs its launch, and eager passes take at least that of their kernels.

The context tower's forward carries extends (decodes, verified drafts) and prompt chunks together and is costed as
that mix, not as a sum of passes: its weights are read once, its MoE layers touch the union of the experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np

from twotower_sim.drafter import Drafter, ModelDrafter, MtpDrafter, NgramDrafter, projection_params
from twotower_sim.gpu import Gpu, Link
from twotower_sim.latency import Host, Latency, no_transfer
from twotower_sim.model import Tower
from twotower_sim.paired import paired
from twotower_sim.routing import Routing

KERNELS = {"M": 7, "E": 9, "*": 6, "-": 4}
"""Kernels of a layer in a fused implementation (norm and residual fused): M in_proj, conv, scan, gated norm,
out_proj, norm, copy; E norm, router, top-k, permute, grouped up, grouped down, shared up, shared down,
combine; * norm, QKV, cache write, attention, combine, output; - norm, up, activation, down."""
PROJECTION_KERNELS = 3
"""In front of a multi-token-prediction module's layers: two norms and the projection."""


@dataclass(frozen=True)
class Deployment:
    """The hardware side of a replica: each tower on GPUs of its own (``link`` joins them), or both on the same."""

    gpu: Gpu
    tensor_parallel: int = 1  # GPUs of the context tower
    denoiser_tensor_parallel: int | None = None  # None: as many
    expert_parallel: bool = False
    link: Link | None = None  # between the towers' GPUs; None: both on the same
    cuda_graphs: bool = True
    host: Host = field(default_factory=Host)


@dataclass(frozen=True)
class _Pass:
    """What a pass is for each of its sequences."""

    positions: int  # new tokens
    pairs: int  # query-key pairs beside those with the context that the round's shape counts
    states: int  # of its Mamba layers, read or written
    rows: int = 0  # positions whose logits are needed

    @property
    def curve(self) -> str:
        """Of the routing: of blocks, or of single tokens of different sequences."""
        return "blocks" if self.positions > 1 else "singles"


_TOKEN = _Pass(positions=1, pairs=0, states=2, rows=1)
"""Autoregressive decoding: the context counts the token itself."""


def _denoise(block_size: int) -> _Pass:
    return _Pass(block_size, block_size * block_size, states=1, rows=block_size)


def _extend(block_size: int) -> _Pass:
    return _Pass(block_size, block_size * (block_size + 1) // 2, states=2)


def _verify(draft_tokens: int) -> _Pass:
    """The newest token, which the context counts, and the drafts after it; a state is kept after every position."""
    positions = draft_tokens + 1
    return _Pass(positions, draft_tokens * positions // 2, states=1 + positions, rows=positions)


class _Forward:
    """Seconds of the parts of one tower's forward on ``parallel`` GPUs, on integer arrays of any shape. ``projection``:
    the tower is a multi-token-prediction module, with one in front of its layers."""

    def __init__(self, tower: Tower, on: Deployment, parallel: int, projection: bool = False) -> None:
        self.tower, self.on, self.parallel, self.projection = tower, on, parallel, projection
        gpu = on.gpu
        self.byte_s = 1 / (gpu.memory_bytes_per_s * gpu.reached.memory * parallel)
        self.flop_s = 1 / (gpu.flops * gpu.reached.compute * parallel)
        self.state_s = tower.state_bytes * self.byte_s  # to read, or to write, one sequence's state
        self.pair_s = 4 * tower.heads * tower.head_dim * tower.layers("*") * self.flop_s
        self.kv_token_s = tower.kv_bytes_per_token * self.byte_s * parallel / tower.kv_shards(parallel)

    def own_s(self, each: _Pass) -> float:
        """Attention of a sequence's new positions to each other, and its states."""
        return each.pairs * self.pair_s + each.states * self.state_s

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
        seconds += self._layers(int(self.projection), projection_params(t), 3 * t.hidden, tokens)
        seconds += self._all_reduces(tokens) + self._all_to_alls(tokens) + self._gaps_s()
        return np.where(tokens > 0, seconds, 0.0)

    def _all_reduces(self, tokens: np.ndarray) -> np.ndarray:
        n = self.parallel
        if n == 1:
            return np.zeros(np.shape(tokens))
        link = self.on.gpu.fastest_link
        moved = 2 * (n - 1) / n * tokens * self.tower.hidden * self.tower.dtype_bytes
        return len(self.tower.pattern) * (moved / link.bytes_per_s + link.latency_s)

    def _all_to_alls(self, tokens: np.ndarray) -> np.ndarray:
        """Dispatch and combine: each GPU's share of the tokens, a copy for each of their experts."""
        n, t = self.parallel, self.tower
        if n == 1 or not self.on.expert_parallel:
            return np.zeros(np.shape(tokens))
        link = self.on.gpu.fastest_link
        moved = (n - 1) / n * tokens / n * t.experts_per_token * t.expert_io * t.dtype_bytes
        return 2 * t.layers("E") * (moved / link.bytes_per_s + link.latency_s)

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
        return sum(KERNELS[layer] for layer in self.tower.pattern) + self.projection * PROJECTION_KERNELS

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
        spread = self._spread()

        def cost(maximum: Callable, untouched, tokens):
            read = 1 - untouched
            if spread:
                read = -maximum(-1.0, -(read + spread * (read * untouched) ** 0.5))
            return maximum(read * read_s + tokens * io_s, tokens * flop_s)

        return cost

    def _spread(self) -> float:
        """How far the share of experts touched on the busiest GPU is above the mean, in units of sqrt(p (1 - p)).

        Each of a GPU's experts / n is taken to be touched with probability p by itself (binomial), and the largest of n
        such counts to lie at Blom's normal score, Phi^-1((n - 3/8) / (n + 1/4)) (Blom, 1958): 0 for one GPU.
        """
        n, experts = self.parallel, self.tower.experts
        if not self.on.expert_parallel or not experts:
            return 0.0
        return NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) * (n / experts) ** 0.5

    def untouched(self, routing: Routing, curve: str, tokens: np.ndarray) -> np.ndarray:
        """Share of the experts of a layer that ``tokens`` leave alone; 1 where there are none."""
        t = self.tower
        return routing.untouched(curve, tokens, t.experts, t.experts_per_token) if t.experts else np.ones(len(tokens))

    def head(self, rows: np.ndarray) -> np.ndarray:
        """Logits of ``rows`` positions, written and read once in fp32 to sample from."""
        t = self.tower
        moved = (t.head_params * t.dtype_bytes + rows * t.vocab * 8) * self.byte_s
        return np.where(rows > 0, np.maximum(moved, 2 * t.head_params * rows * self.flop_s), 0.0)


@dataclass(frozen=True)
class _Half:
    """One of the two kinds of pass in a round: seconds of ``alone[n]`` and ``context_token_s`` for each token of the
    contexts, but at least ``floors[n]``; ``mixed(n, context, *prefill)`` in a round with prompts."""

    alone: np.ndarray
    floors: np.ndarray
    context_token_s: float
    mixed: Callable[..., float]


def two_tower_roofline(
    tower: Tower, on: Deployment, routing: Routing, block_size: int, max_num_seqs: int, max_num_batched_tokens: int
) -> Latency:
    """Latency of rounds of denoise passes beside one context forward of extends and prompt chunks."""
    denoiser = _denoiser(tower, on, routing, _denoise(block_size), max_num_seqs, timed=True)
    context = _shared(_context(tower, on), routing, _extend(block_size), max_num_seqs, max_num_batched_tokens)
    return _two_passes(denoiser, context, block_size, on, _transfer(tower, on))


def mock_ar_roofline(
    tower: Tower, on: Deployment, routing: Routing, max_num_seqs: int, max_num_batched_tokens: int
) -> Latency:
    """Latency of rounds in which each sequence's last token goes through both towers: the denoiser, causal and without
    time conditioning, predicts the next one, and the context tower reads it, beside prompt chunks, and samples nothing.
    """
    denoiser = _denoiser(tower, on, routing, replace(_TOKEN, states=1), max_num_seqs, timed=False)
    context = _shared(_context(tower, on), routing, replace(_TOKEN, rows=0), max_num_seqs, max_num_batched_tokens)
    return paired(_two_passes(denoiser, context, 1, on, _transfer(tower, on)))


def speculative_roofline(
    tower: Tower,
    on: Deployment,
    routing: Routing,
    draft_tokens: int,
    drafter: Drafter,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> Latency:
    """Latency of rounds in which ``drafter`` drafts ``draft_tokens`` of each sequence, and then one forward verifies
    them beside prompt chunks. Sequences whose prompt completes in the round are among those that draft.

    Drafts, all but one token a sequence, come on top of ``max_num_batched_tokens``.
    """
    most = max_num_seqs, max_num_batched_tokens
    reach = (draft_tokens + 1) * max_num_seqs + max_num_batched_tokens
    verify = _shared(_context(tower, on), routing, _verify(draft_tokens), max_num_seqs, reach)
    drafts = _drafts(drafter, tower, on, routing, draft_tokens, *most)
    return paired(_two_passes(drafts, verify, draft_tokens + 1, replace(on, link=None), no_transfer))


def autoregressive_roofline(
    tower: Tower, on: Deployment, routing: Routing, max_num_seqs: int, max_num_batched_tokens: int
) -> Latency:
    """Latency of rounds of one context forward of decoded tokens and prompt chunks."""
    step = _shared(_context(tower, on), routing, _TOKEN, max_num_seqs, max_num_batched_tokens, prompt_rows=1)
    token_s, around = step.context_token_s, on.host.around

    def decode(maximum, step_s, floors_s):
        def cost(n, context, n_extend, extend_context):
            context_s = maximum(step_s[n] + context * token_s, floors_s[n])
            return 0.0, context_s, around(maximum, context_s)

        return cost

    def mixed(n, context, n_extend, extend_context, *prefill):
        context_s = step.mixed(n, context, *prefill)
        return 0.0, context_s, around(max, context_s)

    return Latency.of(decode, (step.alone, step.floors), mixed, side_by_side=False, host=on.host)


def block_diffusion_roofline(
    tower: Tower, on: Deployment, routing: Routing, block_size: int, max_num_seqs: int, max_num_batched_tokens: int
) -> Latency:
    """Latency of rounds of one forward of one tower over blocks under denoising, blocks that extend the cache and
    prompt chunks: weights are read once; there is no time conditioning."""
    forward, n = _context(tower, on), np.arange(max_num_seqs + 1)
    denoise, extend, token_s = _denoise(block_size), _extend(block_size), forward.context_token_s(block_size)
    blocks, work = _work(forward, routing, _Pass(block_size, 0, 0), max_num_seqs, max_num_batched_tokens)
    denoised = forward.head(n * denoise.rows) + n * forward.own_s(denoise)
    tables = blocks, denoised, n * forward.own_s(extend), (n > 0) * forward.launch_s
    around, launch_s = on.host.around, forward.launch_s

    def decode(maximum, blocks_s, denoised_s, extended_s, floors_s):
        def cost(n, context, n_extend, extend_context):
            kinds_s = denoised_s[n] + extended_s[n_extend] + (context + extend_context) * token_s
            context_s = maximum(blocks_s[n + n_extend] + kinds_s, floors_s[n + n_extend])
            return 0.0, context_s, around(maximum, context_s)

        return cost

    denoised_s, extended_s = denoised.tolist(), tables[2].tolist()

    def mixed(n, context, n_extend, extend_context, *prefill):
        kinds_s = denoised_s[n] + extended_s[n_extend] + (context + extend_context) * token_s
        context_s = max(work(n + n_extend, *prefill) + kinds_s, launch_s)
        return 0.0, context_s, around(max, context_s)

    return Latency.of(decode, tables, mixed, side_by_side=False, host=on.host, one_forward=True)


def _context(tower: Tower, on: Deployment) -> _Forward:
    return _Forward(tower, on, on.tensor_parallel)


def _denoiser(tower: Tower, on: Deployment, routing: Routing, each: _Pass, max_num_seqs: int, *, timed: bool) -> _Half:
    """Passes of the denoiser, which never carry prompts; ``timed``: with time conditioning."""
    forward, n = _Forward(tower, on, on.denoiser_tensor_parallel or on.tensor_parallel), np.arange(max_num_seqs + 1)
    tokens, token_s = n * each.positions, forward.context_token_s(each.positions)
    untouched = forward.untouched(routing, each.curve, tokens)
    alone = forward.dense(tokens) + forward.moe()(np.maximum, untouched, tokens) + forward.head(n * each.rows)
    alone += (n > 0) * (timed * tower.time_params * tower.dtype_bytes * forward.byte_s)
    alone += n * forward.own_s(each)
    floors = (n > 0) * forward.launch_s
    alone_s, floors_s = alone.tolist(), floors.tolist()

    def mixed(n, context, *prefill):
        return max(alone_s[n] + context * token_s, floors_s[n])

    return _Half(alone, floors, token_s, mixed)


def _shared(
    forward: _Forward, routing: Routing, each: _Pass, max_num_seqs: int, most_tokens: int, prompt_rows: int = 0
) -> _Half:
    """Passes that sequences, ``each`` with the same, share with prompts; those need ``prompt_rows`` logits each."""
    alone, work = _work(forward, routing, each, max_num_seqs, most_tokens, prompt_rows)
    launch_s, token_s = forward.launch_s, forward.context_token_s(each.positions)

    def mixed(n, context, *prefill):
        return max(work(n, *prefill) + context * token_s, launch_s)

    return _Half(alone, (np.arange(max_num_seqs + 1) > 0) * launch_s, token_s, mixed)


def _work(
    forward: _Forward, routing: Routing, each: _Pass, max_num_seqs: int, most_tokens: int, prompt_rows: int = 0
) -> tuple[np.ndarray, Callable[..., float]]:
    """Seconds of a forward but for its sequences' attention to their contexts: of 0 … ``max_num_seqs`` sequences, and
    as a function (sequences, *prefill) with prompts beside them. ``most_tokens``: of a forward."""
    n, tokens = np.arange(max_num_seqs + 1), np.arange(most_tokens + 1)
    moe, state_s, pairs_s = forward.moe(), forward.state_s, each.pairs * forward.pair_s
    positions, states, rows = each.positions, each.states, each.rows
    tables = (
        forward.dense(tokens),
        forward.untouched(routing, each.curve, n * positions),
        forward.untouched(routing, "blocks", tokens),
        forward.head(np.arange(max(rows, prompt_rows) * max_num_seqs + 1)),
    )

    def seconds(maximum, dense_s, sequences_free, prompts_free, head_s):
        def cost(n, prefill_tokens=0, prefill_pairs=0, prefill_context=0, n_prefill=0):
            q = n * positions + prefill_tokens
            prompts_s = forward.prompt_attention(maximum, prefill_pairs, prefill_context)
            moe_s = moe(maximum, sequences_free[n] * prompts_free[prefill_tokens], q)
            states_s = (n * states + n_prefill * 2) * state_s
            return dense_s[q] + moe_s + n * pairs_s + prompts_s + states_s + head_s[n * rows + n_prefill * prompt_rows]

        return cost

    return seconds(np.maximum, *tables)(n), seconds(max, *(table.tolist() for table in tables))


def _drafts(
    drafter: Drafter,
    tower: Tower,
    on: Deployment,
    routing: Routing,
    draft_tokens: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> _Half:
    """All drafts of a round: one token a forward, each attending to those before it. The first forward takes along the
    prompts of the round, which the drafter reads too."""
    n = np.arange(max_num_seqs + 1)
    match drafter:
        case NgramDrafter(seconds):
            return _Half((n > 0) * seconds, np.zeros(len(n)), 0.0, lambda n, *_: (n > 0) * seconds)
        case MtpDrafter():
            forward = _Forward(drafter.layers(tower), on, on.tensor_parallel, projection=True)
        case ModelDrafter(small):
            forward = _Forward(small, on, on.tensor_parallel)
    one, work = _work(forward, routing, _TOKEN, max_num_seqs, max_num_seqs + max_num_batched_tokens)
    token_s, launch_s = forward.context_token_s(1), forward.launch_s
    later = (draft_tokens - 1) * one + n * (draft_tokens * (draft_tokens - 1) // 2 * token_s)
    later_s = later.tolist()

    def mixed(n, context, *prefill):
        forwards = draft_tokens if n else 1
        return max(work(n, *prefill) + later_s[n] + draft_tokens * context * token_s, forwards * launch_s)

    return _Half(one + later, (n > 0) * (draft_tokens * launch_s), draft_tokens * token_s, mixed)


def _two_passes(
    denoiser: _Half, context: _Half, positions: int, on: Deployment, transfer: Callable[[object, object], object]
) -> Latency:
    """Rounds of ``n`` sequences in the one pass, and ``n_extend`` of ``positions`` tokens and prompts in the other: in
    turns on the same GPUs; side by side where the towers are apart, when the context tower also sends the states and
    the new keys and values over the link before the round ends."""
    denoiser_token_s, context_token_s = denoiser.context_token_s, context.context_token_s
    host, apart = on.host, on.link is not None

    def end(maximum, denoiser_s, context_s, states, tokens):
        if apart:
            return host.around(maximum, maximum(denoiser_s, context_s + transfer(states, tokens)))
        return host.around(maximum, denoiser_s + context_s)

    def decode(maximum, denoise_s, denoise_floors_s, extend_s, extend_floors_s):
        def cost(n, context, n_extend, extend_context):
            denoiser_s = maximum(denoise_s[n] + context * denoiser_token_s, denoise_floors_s[n])
            context_s = maximum(extend_s[n_extend] + extend_context * context_token_s, extend_floors_s[n_extend])
            return denoiser_s, context_s, end(maximum, denoiser_s, context_s, n_extend, n_extend * positions)

        return cost

    def mixed(n, context_tokens, n_extend, extend_context, prefill_tokens, prefill_pairs, prefill_context, n_prefill):
        prefill = prefill_tokens, prefill_pairs, prefill_context, n_prefill
        denoiser_s = denoiser.mixed(n, context_tokens, *prefill)
        context_s = context.mixed(n_extend, extend_context, *prefill)
        sent = n_extend + n_prefill, n_extend * positions + prefill_tokens
        return denoiser_s, context_s, end(max, denoiser_s, context_s, *sent)

    tables = denoiser.alone, denoiser.floors, context.alone, context.floors
    return Latency.of(decode, tables, mixed, side_by_side=apart, host=host, transfer=transfer)


def _transfer(tower: Tower, on: Deployment) -> Callable:
    """(states, tokens) to seconds over the link: as many GPUs as both towers have send their parts at a time."""
    if on.link is None:
        return no_transfer
    pairs = min(on.tensor_parallel, on.denoiser_tensor_parallel or on.tensor_parallel)
    state_s = tower.state_bytes / pairs / on.link.bytes_per_s
    token_s = tower.kv_bytes_per_token / tower.kv_shards(pairs) / on.link.bytes_per_s
    hop_s = on.link.latency_s

    def transfer(states, tokens):
        return (states > 0) * hop_s + states * state_s + tokens * token_s

    return transfer
