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
from itertools import chain, islice
from typing import Protocol

import numpy as np

from twotower_sim.errors import InputError
from twotower_sim.requests import Prefixes, Requests

Key = int | tuple[int, int]
"""Of a block: what ``_Keys`` makes of a prompt's hash, or (request, index) of a block with generated tokens."""


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

    def __init__(self, keys: list[int], blocks: list[int]) -> None:
        self.keys = keys  # of its prompt's full blocks
        self.blocks = blocks
        self.registered = len(blocks)  # leading blocks that are known by a key


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
        self._references: list[int] = []  # of each block that was ever taken
        self._key: dict[int, Key] = {}  # of registered blocks
        self._resident: dict[Key, int] = {}  # a key's block, the one that was registered first
        self._copies: dict[Key, list[int]] = {}  # its other blocks, in the order in which they were registered
        self._unused: OrderedDict[int, None] = OrderedDict()  # registered blocks that nobody holds, next to go first
        self._anonymous: list[int] = []  # blocks without a key that nobody holds
        self._sequences: dict[int, _Sequence] = {}
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
        """The resident prefix of a prompt; remembered until blocks or states come or go."""
        if self._found and self._found[:2] == (request, length):
            return self._found[2]
        keys, full = self._keys.of(request), (length - 1) // self._tokens
        own = ((request, index) for index in range(len(keys), full))
        found: list[int] = []
        for key in islice(chain[Key](keys, own), full):
            block = self._resident.get(key)
            if block is None:
                break
            found.append(block)
        if self._drafts and found:
            found.pop()
        if self._states:
            del found[self._states.resumable(keys, min(len(found), len(keys))) :]
        self._found = request, length, found
        return found

    # ------------------------------------------------------------------ taking

    def admit(self, request: int, length: int) -> int:
        found, keys = self._look_up(request, length), self._keys.of(request)
        self._found = None
        self._sequences[request] = _Sequence(keys, found)
        for block in found:
            if not self._references[block]:
                del self._unused[block]
                self.used += 1
            self._references[block] += 1
        if self._states:
            self.counts["states_evicted"] += self._states.take(keys, len(found))
        self._count(request, length, len(found))
        return len(found) * self._tokens

    def _count(self, request: int, length: int, blocks: int) -> None:
        tokens, first = blocks * self._tokens, request not in self.reused_tokens
        self.reused_tokens[request] = tokens
        self.counts["blocks_looked_up"] += (length - 1) // self._tokens
        self.counts["blocks_hit"] += blocks
        self.counts["tokens_reused"] += tokens
        self.counts["tokens_asked"] += length
        self.counts["tokens_reused_at_first"] += first * tokens
        self.counts["tokens_asked_at_first"] += first * length

    def missing(self, request: int, tokens: int) -> int:
        return max(0, -(-tokens // self._tokens) - len(self._sequences[request].blocks))

    def grow(self, request: int, tokens: int, computed: int | None = None) -> None:
        sequence, new = self._sequences[request], self.missing(request, tokens)
        if new:
            sequence.blocks += self._allocate(new)
        full = (tokens if computed is None else computed) // self._tokens
        if full > sequence.registered:
            self._register(request, sequence, full)

    def _allocate(self, count: int) -> list[int]:
        """Blocks for new tokens: those without a hash go first, then the least recently released."""
        references, anonymous = self._references, self._anonymous
        blocks = [anonymous.pop() for _ in range(min(count, len(anonymous)))]
        never_taken = range(len(references), min(len(references) + count - len(blocks), self.capacity))
        references += [0] * len(never_taken)
        blocks += never_taken
        if count > len(blocks):
            blocks += self._evict(count - len(blocks))
        for block in blocks:
            references[block] = 1
        self.used += count
        return blocks

    def _evict(self, count: int) -> list[int]:
        blocks = [self._unused.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            key = self._key.pop(block)
            if key in self._copies:
                self._forget(key, block)
            else:
                del self._resident[key]
        self.counts["blocks_evicted"] += count
        self._found = None
        return blocks

    def _forget(self, key: Key, block: int) -> None:
        """One of several blocks of a key goes."""
        copies = self._copies[key]
        if self._resident[key] == block:
            self._resident[key] = copies.pop(0)
        else:
            copies.remove(block)
        if not copies:
            del self._copies[key]

    def _register(self, request: int, sequence: _Sequence, full: int) -> None:
        """The first ``full`` blocks can be hit from now on."""
        keys, start, resident, known = sequence.keys, sequence.registered, self._resident, self._key
        own = ((request, index) for index in range(max(start, len(keys)), full))
        for block, key in zip(sequence.blocks[start:full], chain[Key](keys[start:full], own), strict=True):
            known[block] = key
            if resident.setdefault(key, block) != block:
                self._copies.setdefault(key, []).append(block)
        if self._states:
            self.counts["states_evicted"] += self._states.keep(keys, start, min(full, len(keys)))
        sequence.registered = full
        self._found = None

    def release(self, request: int) -> None:
        references, known, unused, anonymous = self._references, self._key, self._unused, self._anonymous
        kept = len(unused) + len(anonymous)
        for block in reversed(self._sequences.pop(request).blocks):
            references[block] -= 1
            if references[block]:
                continue
            if block in known:
                unused[block] = None
            else:
                anonymous.append(block)
        self.used -= len(unused) + len(anonymous) - kept
        if self._states:
            self._states.give()

    def check(self) -> None:
        """Audit: allocated + free = capacity, every count in order."""
        held = Counter(block for sequence in self._sequences.values() for block in sequence.blocks)
        assert self.used == len(held)
        assert sorted([*held, *self._unused, *self._anonymous]) == list(range(len(self._references)))
        assert len(self._references) <= self.capacity
        assert {block: count for block, count in enumerate(self._references) if count} == dict(held)
        known = [(block, key) for key, block in self._resident.items()]
        known += [(block, key) for key, copies in self._copies.items() for block in copies]
        assert len(known) == len(self._key)
        assert dict(known) == self._key
        assert self._key.keys() >= self._unused.keys()
        assert self._key.keys().isdisjoint(self._anonymous)
        assert all(self._copies.values())
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

    def take(self, keys: list[int], blocks: int) -> int:
        """A slot for a sequence that resumes after ``blocks``; returns how many checkpoints had to go for it. If the
        state that it resumes is the only one left, the sequence goes on in its slot."""
        if blocks:
            self._kept.move_to_end(keys[blocks - 1])
        self._running += 1
        full = self._running + len(self._kept) > self._slots
        if full:
            self._kept.popitem(last=False)
        return full

    def give(self) -> None:
        self._running -= 1

    def keep(self, keys: list[int], start: int, end: int) -> int:
        """A prefill went from block ``start`` to ``end``; returns how many checkpoints had to go for its own."""
        every, evicted = self._every, 0
        for stop in range((start // every + 1) * every, end + 1, every):
            key = keys[stop - 1]
            if key in self._kept:
                self._kept.move_to_end(key)
                continue
            if self._running + len(self._kept) == self._slots:
                if not self._kept:
                    break  # every slot is a running sequence's
                self._kept.popitem(last=False)
                evicted += 1
            self._kept[key] = None
        return evicted

    def check(self, running: int) -> None:
        assert self._running == running
        assert self._running + len(self._kept) <= self._slots


class _Keys:
    """The keys of the full KV blocks of prompts: one integer for (hash, position), and the part of the hashed block."""

    def __init__(self, requests: Requests, block_tokens: int) -> None:
        self._requests, self._tokens = requests, block_tokens
        self._latest: tuple[int, list[int]] = -1, []  # the queue's head is looked up again and again

    def of(self, request: int) -> list[int]:
        if self._latest[0] != request:
            self._latest = request, self._make(request)
        return self._latest[1]

    def _make(self, request: int) -> list[int]:
        prefixes = self._requests.prefixes
        if prefixes is None:
            return []
        parts, keys = prefixes.block_tokens // self._tokens, list[int]()
        for position, of in enumerate(prefixes.of(request).tolist()):
            first = (of << 32 | position) * parts
            keys += range(first, first + parts)
        return keys[: int(self._requests.input_tokens[request]) // self._tokens]


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
    return int(seen_before(requests.prefixes).sum()), len(requests.prefixes.hashes)


def seen_before(prefixes: Prefixes) -> np.ndarray:
    """Which hashes (m,) an earlier request has at the same place."""
    hashes, first = prefixes.hashes, prefixes.first
    position = np.arange(len(hashes)) - np.repeat(first[:-1], np.diff(first))
    order = np.lexsort((position, hashes))  # equal ones stay in order
    same = (hashes[order[1:]] == hashes[order[:-1]]) & (position[order[1:]] == position[order[:-1]])
    again = np.zeros(len(hashes), bool)
    again[order[1:]] = same
    return again
