"""What fits into a replica's GPUs: KV blocks and Mamba state slots, after weights and workspace.

Each GPU of a replica is accounted by the towers it carries. KV and states live on the context tower's GPUs,
and, where the towers are split, a second time on the denoiser's, which attends to the same context and starts
its scans from the same states. The pools are therefore the smaller of the two sides.
"""

from dataclasses import dataclass, replace
from math import floor

from twotower_sim.drafter import DrafterBytes
from twotower_sim.errors import InputError
from twotower_sim.gpu import Gpu
from twotower_sim.model import Tower

STATE_SHARE = 0.9 / 1.9
"""Share of the free memory that states may take: SGLang's default mamba_full_memory_ratio of 0.9 to KV."""
ACTIVATIONS = 12
"""Live activations of a token in units of the hidden width: in- and out-projections of the widest layer."""
NO_DRAFTER = DrafterBytes()


@dataclass(frozen=True)
class Side:
    """One GPU of a replica: what is on it, in bytes, and the pools of the server that it belongs to."""

    role: str  # "both", "context" or "denoiser"
    capacity: int  # what the engine may use
    weights: int
    workspace: int
    kv_block_bytes: int
    state_bytes: int  # of a sequence's slot
    kv_blocks: int = 0
    state_slots: int = 0

    @property
    def free(self) -> int:
        """For the pools."""
        return self.capacity - self.weights - self.workspace

    @property
    def left(self) -> int:
        """Once the pools are taken; negative where they do not fit."""
        return self.free - self.kv_blocks * self.kv_block_bytes - self.state_slots * self.state_bytes

    @property
    def short(self) -> bool:
        return self.left < 0 or self.kv_blocks < 1 or self.state_slots < 1


@dataclass(frozen=True)
class MemoryPlan:
    """The account of each kind of GPU in a replica, the context tower's first, and what is wrong with it."""

    sides: tuple[Side, ...]
    overcommitted: str | None  # pools given that the GPUs do not hold

    @property
    def kv_blocks(self) -> int:
        return self.sides[0].kv_blocks

    @property
    def state_slots(self) -> int:
        return self.sides[0].state_slots

    @property
    def kv_block_bytes(self) -> int:
        return self.sides[0].kv_block_bytes

    @property
    def state_bytes(self) -> int:
        return self.sides[0].state_bytes


def plan_memory(
    tower: Tower,
    gpu: Gpu,
    *,
    two_tower: bool,
    split: bool,
    tensor_parallel: int,
    denoiser_tensor_parallel: int | None = None,
    utilization: float,
    kv_block_tokens: int,
    pass_tokens: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_blocks: int | None,
    state_slots: int | None,
    drafter: DrafterBytes = NO_DRAFTER,
    states_per_sequence: int = 1,
    checkpoints: bool = False,
    servers: tuple[int, int] | None = None,
) -> MemoryPlan:
    """Pools for given limits; ``kv_blocks`` and ``state_slots`` override what memory would give, on every server.

    - ``pass_tokens``: positions of a sequence whose logits a round needs,
    - ``drafter``: what lies beside the context tower in speculative decoding, and ``states_per_sequence``, one for each
      position that drafts may be rolled back to,
    - ``checkpoints``: slots of the context tower also keep states of prompts for later, so they are not bounded by
      ``max_num_seqs``,
    - ``servers``: context and denoiser servers in tandem. Each has pools of its own; a denoiser server holds at most
      ``max_num_seqs`` sequences, and the context servers together as many as all of those.

    Raises InputError where weights and pools do not fit. With both pools given, as for an engine that is known by its
    pools alone, they are taken as they are, and ``overcommitted`` says so.
    """
    capacity, denoiser_parallel = floor(gpu.memory_bytes * utilization), denoiser_tensor_parallel or tensor_parallel
    activations = max_num_batched_tokens * tower.hidden * ACTIVATIONS * tower.dtype_bytes
    context = tower.weight_bytes() // tensor_parallel + drafter.weights
    denoiser = tower.weight_bytes(denoiser=True) // denoiser_parallel if two_tower else 0

    def side(role: str, parallel: int, weights: int, rows: int) -> Side:
        workspace = activations + rows * tower.vocab * 4 // parallel
        block = kv_block_tokens * tower.kv_bytes_per_token // tower.kv_shards(parallel)
        state = states_per_sequence * (tower.state_bytes // parallel + drafter.state)
        return Side(role, capacity, weights, workspace, block + kv_block_tokens * drafter.kv_per_token, state)

    def pooled(sides: tuple[Side, ...], sequences: int, checkpoints: bool = checkpoints) -> tuple[Side, ...]:
        """Sides that hold the same sequences have the pools of the smallest."""
        slots, blocks = state_slots, kv_blocks
        if slots is None:
            slots = min(_slots(of, kv_blocks, None if checkpoints and of.state_bytes else sequences) for of in sides)
        if blocks is None:
            longest = -(-tower.max_positions // kv_block_tokens)
            blocks = min(_blocks(of, slots, slots * longest) for of in sides)
        return tuple(replace(of, kv_blocks=blocks, state_slots=slots) for of in sides)

    rows = max_num_seqs * pass_tokens
    if not (two_tower and split):
        if two_tower and denoiser_parallel != tensor_parallel:
            raise InputError(
                f"deployment.tensor_parallel: found context {tensor_parallel}, denoiser {denoiser_parallel}; "
                "colocated towers share their GPUs and have the same"
            )
        role = "both" if two_tower else "context"
        sides = pooled((side(role, tensor_parallel, context + denoiser, rows),), max_num_seqs)
    else:
        sides = side("context", tensor_parallel, context, 0), side("denoiser", denoiser_parallel, denoiser, rows)
        if servers:
            most = -(-servers[1] * max_num_seqs // servers[0])
            sides = pooled(sides[:1], most) + pooled(sides[1:], max_num_seqs, checkpoints=False)
        else:
            sides = pooled(sides, max_num_seqs)
    fullest_first = sorted(sides, key=lambda of: of.left)
    problem = next((_no_room(tower, gpu, of, utilization) for of in fullest_first if of.short), None)
    if problem and (kv_blocks is None or state_slots is None):
        raise InputError(problem)
    return MemoryPlan(sides, problem)


def _slots(side: Side, kv_blocks: int | None, most: int | None) -> int:
    """State slots that a side has room for."""
    room = STATE_SHARE * side.free if kv_blocks is None else side.free - kv_blocks * side.kv_block_bytes
    slots = floor(room / max(side.state_bytes, 1))
    return slots if most is None else min(slots, most)


def _blocks(side: Side, state_slots: int, unbounded: int) -> int:
    """KV blocks that a side has room for; ``unbounded``: all that its sequences need at their longest."""
    room = side.free - state_slots * side.state_bytes
    return room // side.kv_block_bytes if side.kv_block_bytes else unbounded


def _no_room(tower: Tower, gpu: Gpu, side: Side, utilization: float) -> str:
    towers = {"both": "both towers", "context": "the context tower", "denoiser": "the denoiser tower"}[side.role]
    needs = "need" if side.role == "both" else "needs"
    parts = f"{needs} {side.weights / 1e9:.1f} GB for weights, {side.workspace / 1e9:.1f} GB for workspace"
    if side.free > 0:
        kv, states = side.kv_blocks * side.kv_block_bytes, side.state_slots * side.state_bytes
        parts += f", {max(kv, 0) / 1e9:.1f} GB for the KV cache, {max(states, 0) / 1e9:.1f} GB for Mamba states"
    return (
        f"{towers} of {tower.name} {parts} on each {gpu.name}; "
        f"{side.capacity / 1e9:.1f} GB may be used ({utilization:.0%} of {gpu.memory_bytes / 1e9:.1f} GB). "
        f"{'Split the towers, raise' if side.role == 'both' else 'Raise'} deployment.tensor_parallel, "
        "lower scheduler.max_num_seqs, max_num_batched_tokens or the pools under memory, or take a larger GPU"
    )
