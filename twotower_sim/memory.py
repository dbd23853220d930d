"""What fits into a replica's GPUs: KV blocks and Mamba state slots, after weights and workspace.

Each GPU of a replica is accounted by the towers it carries. KV and states live on the context tower's GPUs,
and, where the towers are split, a second time on the denoiser's, which attends to the same context and starts
its scans from the same states. The pools are therefore the smaller of the two sides.
"""

from dataclasses import dataclass
from math import floor

from twotower_sim.errors import InputError
from twotower_sim.gpu import Gpu
from twotower_sim.model import Tower

STATE_SHARE = 0.9 / 1.9
"""Share of the free memory that states may take: SGLang's default mamba_full_memory_ratio of 0.9 to KV."""
ACTIVATIONS = 12
"""Live activations of a token in units of the hidden width: in- and out-projections of the widest layer."""


@dataclass(frozen=True)
class Side:
    """One GPU of a replica: what is on it, in bytes."""

    role: str  # "both", "context" or "denoiser"
    capacity: int  # what the engine may use
    weights: int
    workspace: int

    @property
    def free(self) -> int:
        return self.capacity - self.weights - self.workspace


@dataclass(frozen=True)
class MemoryPlan:
    """The pools of a replica, and the account they come from."""

    kv_blocks: int
    state_slots: int
    kv_block_bytes: int  # on one GPU
    state_bytes: int  # on one GPU
    sides: tuple[Side, ...]
    overcommitted: str | None  # pools given that the GPUs do not hold


def plan_memory(
    tower: Tower,
    gpu: Gpu,
    *,
    two_tower: bool,
    split: bool,
    tensor_parallel: int,
    utilization: float,
    kv_block_tokens: int,
    pass_tokens: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_blocks: int | None,
    state_slots: int | None,
) -> MemoryPlan:
    """Pools for given limits; ``kv_blocks`` and ``state_slots`` override what memory would give.

    Raises InputError where weights and pools do not fit. With both pools given, as for an engine that is known by its
    pools alone, they are taken as they are, and ``overcommitted`` says so.
    """
    capacity = floor(gpu.memory_bytes * utilization)
    context = tower.weight_bytes() // tensor_parallel
    denoiser = tower.weight_bytes(denoiser=True) // tensor_parallel if two_tower else 0
    activations = max_num_batched_tokens * tower.hidden * ACTIVATIONS * tower.dtype_bytes
    logits = max_num_seqs * pass_tokens * tower.vocab * 4 // tensor_parallel
    sides: tuple[Side, ...]
    if two_tower and split:
        sides = (
            Side("context", capacity, context, activations),
            Side("denoiser", capacity, denoiser, activations + logits),
        )
    else:
        sides = (Side("both" if two_tower else "context", capacity, context + denoiser, activations + logits),)
    kv_block_bytes = kv_block_tokens * tower.kv_bytes_per_token // tower.kv_shards(tensor_parallel)
    state_bytes = tower.state_bytes // tensor_parallel
    free = min(side.free for side in sides)
    given = kv_blocks is not None and state_slots is not None
    if state_slots is None:
        room = STATE_SHARE * free if kv_blocks is None else free - kv_blocks * kv_block_bytes
        state_slots = min(max_num_seqs, floor(room / max(state_bytes, 1)))
    if kv_blocks is None:
        unbounded = state_slots * -(-tower.max_positions // kv_block_tokens)  # all sequences at their longest
        kv_blocks = (free - state_slots * state_bytes) // kv_block_bytes if kv_block_bytes else unbounded
    short = free < kv_blocks * kv_block_bytes + state_slots * state_bytes or kv_blocks < 1 or state_slots < 1
    problem = _no_room(tower, gpu, sides, kv_blocks * kv_block_bytes, state_slots * state_bytes, utilization)
    if short and not given:
        raise InputError(problem)
    return MemoryPlan(kv_blocks, state_slots, kv_block_bytes, state_bytes, sides, problem if short else None)


def _no_room(tower: Tower, gpu: Gpu, sides: tuple[Side, ...], kv: int, states: int, utilization: float) -> str:
    side = min(sides, key=lambda s: s.free)
    towers = {"both": "both towers", "context": "the context tower", "denoiser": "the denoiser tower"}[side.role]
    needs = "need" if side.role == "both" else "needs"
    parts = f"{needs} {side.weights / 1e9:.1f} GB for weights, {side.workspace / 1e9:.1f} GB for workspace"
    if side.free > 0:
        parts += f", {max(kv, 0) / 1e9:.1f} GB for the KV cache, {max(states, 0) / 1e9:.1f} GB for Mamba states"
    return (
        f"{towers} of {tower.name} {parts} on each {gpu.name}; "
        f"{side.capacity / 1e9:.1f} GB may be used ({utilization:.0%} of {gpu.memory_bytes / 1e9:.1f} GB). "
        f"{'Split the towers, raise' if side.role == 'both' else 'Raise'} deployment.tensor_parallel, "
        "lower scheduler.max_num_seqs, max_num_batched_tokens or the pools under memory, or take a larger GPU"
    )
