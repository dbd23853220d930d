"""The KV blocks and Mamba states of one engine: counted (``KvCache``), or shared by hash (``PrefixCache``).

The rules of a prefix cache are those of vLLM-like engines as NVIDIA's DynoSim has them:

- a full block is known by the hash of its prefix; blocks of generated tokens are private to their request;
- a block can be hit as soon as it is scheduled; a hit is the longest resident prefix, at most all full blocks before
  the last token of the prompt;
- blocks that nobody uses stay until they are needed: those without a hash go first, then the least recently released,
  of one request the last block first.

In a hybrid model keys and values do not resume a prompt: the Mamba state at that point is needed too. One is kept,
a *checkpoint*, where a prefill passes a multiple of ``state_every`` tokens, in a state slot that no running sequence
needs, least recently used first to go; a hit then ends at the last resident checkpoint inside the resident prefix.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from twotower_sim.errors import InputError
from twotower_sim.requests import Prefixes, Requests


class Cache(Protocol):
    """What an engine asks of its memory; sequences go by request id."""

    used: int  # blocks that running sequences hold

    @property
    def free(self) -> int: ...
    def hits(self, request: int, length: int) -> int:
        """Tokens of a prompt of ``length`` that need no prefill, were it admitted now."""
        ...

    def fits(self, request: int, length: int) -> bool:
        """Whether memory for the whole prompt is there."""
        ...

    def admit(self, request: int, length: int) -> int:
        """Take what is resident of the prompt; returns its tokens."""
        ...

    def missing(self, request: int, tokens: int) -> int:
        """Blocks to allocate before the sequence can hold ``tokens``."""
        ...

    def grow(self, request: int, tokens: int, computed: int | None = None) -> None:
        """Hold ``tokens``, ``computed`` (None: all) of them with keys and values; the caller has seen to room."""
        ...

    def release(self, request: int) -> None:
        """Give everything of a sequence back."""
        ...


class KvCache:
    """Blocks as a count: nothing is shared, nothing outlives its sequence."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.capacity, self._tokens = blocks, block_tokens
        self.used = 0
        self._held: dict[int, int] = {}

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def hits(self, request: int, length: int) -> int:
        return 0

    def fits(self, request: int, length: int) -> bool:
        return -(-length // self._tokens) <= self.capacity - self.used

    def admit(self, request: int, length: int) -> int:
        return 0

    def missing(self, request: int, tokens: int) -> int:
        return max(0, -(-tokens // self._tokens) - self._held.get(request, 0))

    def grow(self, request: int, tokens: int, computed: int | None = None) -> None:
        new = self.missing(request, tokens)
        self._held[request] = self._held.get(request, 0) + new
        self.used += new

    def release(self, request: int) -> None:
        self.used -= self._held.pop(request, 0)


class _Sequence:
    """What a sequence holds of a prefix cache."""

    __slots__ = ("blocks", "keys", "registered")

    def __init__(self, keys: list[int]) -> None:
        self.keys = keys  # of its prompt's full blocks
        self.blocks: list[int] = []
        self.registered = 0  # leading blocks that are known by a key


class PrefixCache:
    """See the module's text. ``state_every`` None: blocks alone resume a prompt, as without Mamba layers.

    A block is a number; a key is known to several copies at times (the last block of a prompt is never hit).
    ``drafts``: speculative decoding, in which the last block of a hit is recomputed.
    """

    def __init__(
        self,
        blocks: int,
        block_tokens: int,
        requests: Requests,
        state_every: int | None = None,
        state_slots: int = 0,
        drafts: bool = False,
    ) -> None:
        self.capacity, self._tokens, self._drafts = blocks, block_tokens, drafts
        self.used = 0
        self.counts: Counter[str] = Counter()  # see ``total``
        self.reused_tokens: dict[int, int] = {}  # of each request's latest admission
        self._keys = _Keys(requests, block_tokens)
        self._references: dict[int, int] = {}
        self._key: dict[int, int | tuple[int, int]] = {}  # of registered blocks
        self._copies: dict[int | tuple[int, int], list[int]] = {}  # resident blocks of a key, oldest first
        self._unused: OrderedDict[int, None] = OrderedDict()  # registered blocks that nobody holds, next to go first
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0
        self._found: tuple[int, int, list[int]] | None = None  # of the latest look-up
        self._states = _States(state_slots, state_every // block_tokens) if state_every else None

    # ------------------------------------------------------------------ looking

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def hits(self, request: int, length: int) -> int:
        return len(self._look_up(request, length)) * self._tokens

    def fits(self, request: int, length: int) -> bool:
        active = sum(self._references[block] > 0 for block in self._look_up(request, length))
        return -(-length // self._tokens) - active <= self.free

    def _look_up(self, request: int, length: int) -> list[int]:
        """The resident prefix of a prompt; remembered until something changes."""
        if self._found and self._found[:2] == (request, length):
            return self._found[2]
        found = []
        for index in range((length - 1) // self._tokens):
            copies = self._copies.get(self._key_of(request, index))
            if copies is None:
                break
            found.append(copies[0])
        if self._drafts and found:
            found.pop()
        if self._states:
            keys = self._keys.of(request)
            del found[self._states.resumable(keys, min(len(found), len(keys))) :]
        self._found = request, length, found
        return found

    def _key_of(self, request: int, index: int) -> int | tuple[int, int]:
        keys = self._keys.of(request)
        return keys[index] if index < len(keys) else (request, index)

    # ------------------------------------------------------------------ taking

    def admit(self, request: int, length: int) -> int:
        found = self._look_up(request, length)
        self._found = None
        sequence = self._sequences[request] = _Sequence(self._keys.of(request))
        for block in found:
            if not self._references[block]:
                del self._unused[block]
                self.used += 1
            self._references[block] += 1
        sequence.blocks, sequence.registered = list(found), len(found)
        if self._states:
            self._states.take()
            self._states.touch(sequence.keys, len(found))
        tokens = len(found) * self._tokens
        first = request not in self.reused_tokens
        self.reused_tokens[request] = tokens
        self.counts["blocks_looked_up"] += (length - 1) // self._tokens
        self.counts["blocks_hit"] += len(found)
        self.counts["tokens_reused"] += tokens
        self.counts["tokens_asked"] += length
        self.counts["tokens_reused_at_first"] += first * tokens
        self.counts["tokens_asked_at_first"] += first * length
        return tokens

    def missing(self, request: int, tokens: int) -> int:
        return max(0, -(-tokens // self._tokens) - len(self._sequences[request].blocks))

    def grow(self, request: int, tokens: int, computed: int | None = None) -> None:
        sequence, self._found = self._sequences[request], None
        for _ in range(self.missing(request, tokens)):
            sequence.blocks.append(self._allocate())
        full = (tokens if computed is None else computed) // self._tokens
        for index in range(sequence.registered, full):
            block, key = sequence.blocks[index], self._key_of(request, index)
            self._key[block] = key
            self._copies.setdefault(key, []).append(block)
            if self._states and index < len(sequence.keys):
                self.counts["states_evicted"] += self._states.keep(sequence.keys, index)
        sequence.registered = max(sequence.registered, full)

    def _allocate(self) -> int:
        if self.used + len(self._unused) == self.capacity:
            block, _ = self._unused.popitem(last=False)
            key = self._key.pop(block)
            del self._references[block]
            self._copies[key].remove(block)
            if not self._copies[key]:
                del self._copies[key]
            self.counts["blocks_evicted"] += 1
        self.used += 1
        self._next += 1
        self._references[self._next] = 1
        return self._next

    def release(self, request: int) -> None:
        sequence, self._found = self._sequences.pop(request), None
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            self.used -= 1
            if block in self._key:
                self._unused[block] = None
            else:
                del self._references[block]
        if self._states:
            self._states.give()

    def check(self) -> None:
        """Audit: allocated + free = capacity, every count in order."""
        held = Counter(block for sequence in self._sequences.values() for block in sequence.blocks)
        assert self.used == len(held) <= self.capacity
        assert self.used + len(self._unused) <= self.capacity
        assert {block: count for block, count in self._references.items() if count} == dict(held)
        assert set(self._unused) == {block for block, count in self._references.items() if not count}
        assert sorted(self._key) == sorted(block for copies in self._copies.values() for block in copies)
        if self._states:
            self._states.check(len(self._sequences))


class _States:
    """Slots for Mamba states: one for each running sequence, the rest for checkpoints, known by the block they end."""

    def __init__(self, slots: int, every_blocks: int) -> None:
        self._slots, self._every, self._running = slots, every_blocks, 0
        self._kept: OrderedDict[int, None] = OrderedDict()  # next to go first

    def resumable(self, keys: list[int], blocks: int) -> int:
        """Leading blocks, of the first ``blocks``, after which a state is kept."""
        for end in range(blocks // self._every * self._every, 0, -self._every):
            if keys[end - 1] in self._kept:
                return end
        return 0

    def take(self) -> None:
        self._running += 1
        if self._running + len(self._kept) > self._slots:
            self._kept.popitem(last=False)

    def touch(self, keys: list[int], blocks: int) -> None:
        if blocks:
            self._kept.move_to_end(keys[blocks - 1])

    def give(self) -> None:
        self._running -= 1

    def keep(self, keys: list[int], index: int) -> bool:
        """Block ``index`` of a prefill is full; returns whether a checkpoint had to go for this one."""
        if (index + 1) % self._every:
            return False
        key = keys[index]
        if key in self._kept:
            self._kept.move_to_end(key)
            return False
        full = self._running + len(self._kept) == self._slots
        if full and not self._kept:
            return False  # every slot is a running sequence's
        if full:
            self._kept.popitem(last=False)
        self._kept[key] = None
        return full

    def check(self, running: int) -> None:
        assert self._running == running
        assert self._running + len(self._kept) <= self._slots


class _Keys:
    """The keys of the full KV blocks of prompts: one integer for (hash, position), and the part of the hashed block."""

    KEEP = 4096

    def __init__(self, requests: Requests, block_tokens: int) -> None:
        self._requests, self._tokens = requests, block_tokens
        self._of: OrderedDict[int, list[int]] = OrderedDict()

    def of(self, request: int) -> list[int]:
        keys = self._of.get(request)
        if keys is None:
            keys = self._of[request] = self._make(request)
            if len(self._of) > self.KEEP:
                self._of.popitem(last=False)
        return keys

    def _make(self, request: int) -> list[int]:
        prefixes, full = self._requests.prefixes, int(self._requests.input_tokens[request]) // self._tokens
        if prefixes is None:
            return []
        parts = prefixes.block_tokens // self._tokens
        hashes = prefixes.of(request).tolist()
        return [(hashes[i // parts] << 32 | i // parts) * parts + i % parts for i in range(full)]


def check_block_tokens(prefixes: Prefixes, kv_block_tokens: int) -> None:
    """Raises InputError where a hash does not cover whole KV blocks."""
    if prefixes.block_tokens % kv_block_tokens:
        raise InputError(
            f"memory.kv_block_tokens: found {kv_block_tokens}; the workload's prefix hashes cover "
            f"{prefixes.block_tokens} tokens each, of which it has to be a divisor"
        )


def total(caches: Iterable[PrefixCache]) -> dict[str, int | float]:
    """Hit statistics of all replicas together; blocks looked up are the full blocks of admitted prompts."""
    counts: Counter[str] = Counter()
    for cache in caches:
        counts.update(cache.counts)
    names = ("blocks_looked_up", "blocks_hit", "blocks_evicted", "states_evicted", "tokens_asked", "tokens_reused")
    found: dict[str, int | float] = {name: counts[name] for name in names}
    found["block_hit_ratio"] = counts["blocks_hit"] / max(counts["blocks_looked_up"], 1)
    found["reused_input_ratio"] = counts["tokens_reused_at_first"] / max(counts["tokens_asked_at_first"], 1)
    return found


def infinite_hits(requests: Requests) -> tuple[int, int]:
    """Hash blocks that a cache without bounds would hit if requests came one by one, and all of them."""
    assert requests.prefixes is not None
    hashes, first = requests.prefixes.hashes, requests.prefixes.first
    position = np.arange(len(hashes)) - np.repeat(first[:-1], np.diff(first))
    _, earliest = np.unique(np.stack((hashes, position)), axis=1, return_index=True)
    return len(hashes) - len(earliest), len(hashes)
