"""What a sequence does in each decode round once its prompt is in the cache.

The engine's virtual clock is the *tick*: the index of a round in which sequences decode. Every decoding
sequence takes exactly one pass a tick, so from the tick at which it starts, the ticks of its extend
passes, of its growth in the KV cache and of its end are known. A schedule writes them into the engine's
rings (``place``) and takes the rest out again when the sequence is preempted (``lift``).
"""

from array import array
from itertools import count

import numpy as np


class Sequence:
    """A request inside an engine."""

    __slots__ = (
        "request", "input_tokens", "output_tokens", "plan", "done", "order", "position", "length",
        "start_tick", "finish_tick", "start_ns",
    )  # fmt: skip

    def __init__(self, request: int, input_tokens: int, output_tokens: int, plan: list[int] | None) -> None:
        self.request = request
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.plan = plan
        self.done = 0  # units whose tokens are known: tokens (autoregressive) or blocks (two towers)
        self.order = -1  # admission number on its replica, of the latest admission
        self.position = 0  # prefilled tokens
        self.length = 0  # tokens to prefill at this admission
        self.start_tick = -1  # first decode tick; -1 while waiting or in prefill
        self.finish_tick = -1
        self.start_ns = 0  # end of its prefill


EXTEND_SHIFT = 48
EXTEND_CONTEXT = (1 << EXTEND_SHIFT) - 1
"""An entry of ``Rings.passes`` is extend passes << EXTEND_SHIFT | tokens in the cache of the sequences that extend."""


class Rings:
    """What is due at each tick, modulo the rings' size (a power of two above the longest decode in ticks).

    KV blocks are taken before the round: ``blocks_per_extend`` for each extend pass, and ``growth`` beyond.
    """

    def __init__(self, longest_decode_ticks: int, blocks_per_extend: int) -> None:
        size = 1 << max(10, (longest_decode_ticks + 1).bit_length())
        self.mask = size - 1
        self.blocks_per_extend = blocks_per_extend
        self.passes, self.growth = array("q", bytes(8 * size)), array("q", bytes(8 * size))
        self._passes, self._growth = np.frombuffer(self.passes, np.int64), np.frombuffer(self.growth, np.int64)

    def extends(self, at: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
        """Extend passes and their context in a stretch of ticks."""
        due = self._passes[at : at + rounds]
        return due >> EXTEND_SHIFT, due & EXTEND_CONTEXT

    def kv_blocks(self, at: int, rounds: int) -> np.ndarray:
        """KV blocks to take in a stretch of ticks."""
        growth = self._growth[at : at + rounds]
        if not self.blocks_per_extend:
            return growth
        return growth + self.blocks_per_extend * (self._passes[at : at + rounds] >> EXTEND_SHIFT)

    def clear(self, at: int, rounds: int) -> None:
        self._passes[at : at + rounds] = self._growth[at : at + rounds] = 0


class TokenSchedule:
    """Autoregressive decoding: one token a tick; prefill ends with the first token.

    At tick ``start + k`` a sequence holds ``input + done + k`` tokens, the newest of which takes its KV
    slot in that round, so its block may be new.
    """

    blocks = False
    pass_tokens = 1  # of a round's token budget, for each decoding sequence
    growth = 1  # context that a decoding sequence gains in every tick
    blocks_per_extend = 0

    def __init__(self, kv_block_tokens: int) -> None:
        self.kv_block = kv_block_tokens

    def ticks(self, output_tokens: int) -> int:
        """Ticks of the longest decode."""
        return output_tokens

    def prefill_length(self, seq: Sequence) -> int:
        return seq.input_tokens + seq.done

    def peak_tokens(self, input_tokens, output_tokens):
        """Most tokens a request ever holds in the KV cache (the last token never enters it)."""
        return input_tokens + output_tokens - 1

    def context(self, seq: Sequence, tick: int) -> int:
        """Tokens a pass at ``tick`` attends to."""
        return seq.input_tokens + seq.done + tick - seq.start_tick

    def kv_tokens(self, seq: Sequence, tick: int) -> int:
        """Tokens in the KV cache before the round of ``tick``."""
        return self.context(seq, tick) - 1

    def ahead(self, rings: Rings, at: int, rounds: int, context: int, decoding: int):
        """Of a stretch of ticks from ring index ``at``: the arguments of ``Latency.many``, and the context of all
        decoding sequences after each round (rounds,)."""
        contexts = context + decoding * np.arange(rounds + 1)
        return (decoding, contexts[:-1], 0, 0), contexts[1:]

    def progress(self, seq: Sequence, tick: int) -> int:
        """Units done before the round of ``tick``."""
        return seq.done + tick - seq.start_tick

    def _growths(self, seq: Sequence, tick: int) -> range:
        """Ticks from ``tick`` on at which the sequence takes a new KV block."""
        first = tick + -self.kv_tokens(seq, tick) % self.kv_block
        return range(first, seq.finish_tick, self.kv_block)

    def place(self, seq: Sequence, rings: Rings) -> None:
        seq.finish_tick = seq.start_tick + seq.output_tokens - seq.done
        growth, mask = rings.growth, rings.mask
        for tick in self._growths(seq, seq.start_tick):
            growth[tick & mask] += 1

    def lift(self, seq: Sequence, rings: Rings, tick: int) -> None:
        growth, mask = rings.growth, rings.mask
        for due in self._growths(seq, tick):
            growth[due & mask] -= 1


class BlockSchedule:
    """Two towers: a block takes its denoise steps, one a tick, then an extend pass; the last block none.

    ``plan[b]`` is the tick of block b's extend pass, counted from the first tick of block 0.
    """

    blocks = True
    growth = 0

    def __init__(self, kv_block_tokens: int, block_size: int, steps_per_block: int) -> None:
        self.kv_block = kv_block_tokens
        self.pass_tokens = block_size
        self.blocks_per_extend = block_size // kv_block_tokens if block_size % kv_block_tokens == 0 else 0
        self.steps_per_block = steps_per_block

    def ticks(self, output_tokens: int) -> int:
        return -(-output_tokens // self.pass_tokens) * (self.steps_per_block + 1)

    def prefill_length(self, seq: Sequence) -> int:
        return seq.input_tokens + seq.done * self.pass_tokens

    def peak_tokens(self, input_tokens, output_tokens):
        """Most tokens a request ever holds in the KV cache (the last block never enters it)."""
        return input_tokens + (output_tokens - 1) // self.pass_tokens * self.pass_tokens

    def _origin(self, seq: Sequence) -> int:
        assert seq.plan is not None
        return seq.start_tick - (seq.plan[seq.done - 1] + 1 if seq.done else 0)

    def _extended(self, seq: Sequence, tick: int) -> int:
        """Blocks in the cache before the round of ``tick``."""
        assert seq.plan is not None
        blocks, last, ahead = seq.done, len(seq.plan) - 1, tick - self._origin(seq)
        while blocks < last and seq.plan[blocks] < ahead:
            blocks += 1
        return blocks

    def context(self, seq: Sequence, tick: int) -> int:
        return seq.input_tokens + self._extended(seq, tick) * self.pass_tokens

    kv_tokens = context

    def ahead(self, rings: Rings, at: int, rounds: int, context: int, decoding: int):
        extends, extend_context = rings.extends(at, rounds)
        after = context + self.pass_tokens * extends.cumsum()
        before = after - self.pass_tokens * extends
        return (decoding - extends, before - extend_context, extends, extend_context), after

    def progress(self, seq: Sequence, tick: int) -> int:
        """Blocks whose tokens are known: a block whose extend pass is due is done."""
        return self._extended(seq, tick + 1)

    def _write(self, seq: Sequence, rings: Rings, blocks: int, sign: int) -> None:
        """Add (or take out) the extend passes of all blocks but the first ``blocks`` and the last."""
        assert seq.plan is not None
        passes, mask, origin = rings.passes, rings.mask, self._origin(seq)
        start = seq.input_tokens + blocks * self.pass_tokens
        entries = count(sign * (1 << EXTEND_SHIFT | start), sign * self.pass_tokens)
        for offset, entry in zip(seq.plan[blocks:-1], entries, strict=False):
            passes[(origin + offset) & mask] += entry
        if not self.blocks_per_extend:
            for context, offset in zip(count(start, self.pass_tokens), seq.plan[blocks:-1], strict=False):
                new = -(-(context + self.pass_tokens) // self.kv_block) - -(-context // self.kv_block)
                rings.growth[(origin + offset) & mask] += sign * new

    def place(self, seq: Sequence, rings: Rings) -> None:
        assert seq.plan is not None
        seq.finish_tick = self._origin(seq) + seq.plan[-1]
        self._write(seq, rings, seq.done, 1)

    def lift(self, seq: Sequence, rings: Rings, tick: int) -> None:
        self._write(seq, rings, self._extended(seq, tick), -1)


Schedule = TokenSchedule | BlockSchedule
