"""The prefix cache against a naive one, under random use; and the rules of checkpoints on paper."""

import random
from collections import Counter

import numpy as np
import pytest

from twotower_sim.errors import InputError
from twotower_sim.kv_cache import KvCache, PrefixCache, check_block_tokens, infinite_hits
from twotower_sim.requests import Prefixes, Requests

BLOCK = 4


def requests_of(prompts: list[list[int]], lengths: list[int], block_tokens: int = BLOCK) -> Requests:
    first = np.concatenate(([0], np.cumsum([len(prompt) for prompt in prompts])))
    hashes = np.array([h for prompt in prompts for h in prompt], np.int64)
    n = np.array(lengths)
    return Requests(np.zeros(len(n), np.int64), n, np.full(len(n), 50), Prefixes(first, hashes, block_tokens))


class Block(dict):
    """Compared by identity."""

    __eq__, __hash__ = object.__eq__, object.__hash__


class Naive:
    """Blocks and states as lists of records, oldest first; everything is looked for by scanning."""

    def __init__(self, capacity: int, every: int | None, slots: int, drafts: bool) -> None:
        self.capacity, self.every, self.slots, self.drafts = capacity, every, slots, drafts
        self.blocks: list[Block] = []  # {key, users, freed}: key None is not registered
        self.states: list[tuple] = []  # keys of the blocks that end where a state is kept
        self.holds: dict[int, list[Block]] = {}
        self.clock = self.blocks_evicted = self.states_evicted = 0

    def used(self) -> int:
        return sum(block["users"] > 0 for block in self.blocks)

    def key(self, request: int, prompt: list[int], index: int, length: int):
        return ("hash", prompt[index], index) if (index + 1) * BLOCK <= length else ("own", request, index)

    def hits(self, request: int, prompt: list[int], inputs: int, length: int) -> list[Block]:
        found: list[Block] = []
        for index in range((length - 1) // BLOCK):
            copies = [b for b in self.blocks if b["key"] == self.key(request, prompt, index, inputs)]
            if not copies:
                break
            found.append(copies[0])
        if self.drafts:
            found = found[:-1]
        while self.every and found and found[-1]["key"] not in self.states:
            found.pop()
        return found

    def admit(self, request: int, found: list[Block]) -> None:
        for block in found:
            block["users"] += 1
        self.holds[request] = list(found)
        if self.every:
            if found:
                self.states.append(self.states.pop(self.states.index(found[-1]["key"])))
            if len(self.holds) + len(self.states) > self.slots:
                self.states.pop(0)
                self.states_evicted += 1

    def grow(self, request: int, prompt: list[int], inputs: int, tokens: int, computed: int) -> None:
        mine = self.holds[request]
        while len(mine) * BLOCK < tokens:
            if len(self.blocks) == self.capacity:
                unused = [b for b in self.blocks if not b["users"]]
                self.blocks.remove(min(unused, key=lambda b: b["freed"]))
                self.blocks_evicted += 1
            mine.append(Block(key=None, users=1, freed=-1))
            self.blocks.append(mine[-1])
        for index in range(computed // BLOCK):
            if mine[index]["key"] is None:
                mine[index]["key"] = self.key(request, prompt, index, inputs)
                self.blocks.remove(mine[index])  # copies of a key are told apart by when they got it
                self.blocks.append(mine[index])
                if self.every and (index + 1) * BLOCK % self.every == 0 and (index + 1) * BLOCK <= inputs:
                    self.keep(mine[index]["key"])

    def keep(self, key: tuple) -> None:
        if key in self.states:
            self.states.remove(key)
        elif len(self.holds) + len(self.states) == self.slots:
            if not self.states:
                return
            self.states.pop(0)
            self.states_evicted += 1
        self.states.append(key)

    def release(self, request: int) -> None:
        for block in reversed(self.holds.pop(request)):
            block["users"] -= 1
            self.clock += 1
            block["freed"] = self.clock
            if not block["users"] and block["key"] is None:
                self.blocks.remove(block)


def random_use(seed: int, every: int | None, slots: int, drafts: bool) -> Counter[str]:
    """Use both in the same way and compare them after each step; returns what the cache counted."""
    rng = random.Random(seed)
    number, capacity = 30, rng.choice([12, 20, 60])
    texts = [[rng.randrange(3) for _ in range(6)] for _ in range(4)]  # few, so that prefixes meet
    lengths = [rng.randint(1, 24) for _ in range(number)]
    prompts = [texts[rng.randrange(4)][: -(-length // BLOCK)] for length in lengths]
    cache = PrefixCache(capacity, BLOCK, requests_of(prompts, lengths), every, slots, drafts)
    naive = Naive(capacity, every, slots, drafts)
    tokens: dict[int, int] = {}
    reused: dict[int, int] = {}
    looked_up = hit = at_first = asked_at_first = 0
    for _ in range(300):
        running = tokens and (len(tokens) == slots or rng.random() < 0.6)
        request = rng.choice(list(tokens)) if running else rng.randrange(number)
        prompt, inputs = prompts[request], lengths[request]
        if request not in tokens:
            length = inputs + rng.choice([0, 0, 5])  # as if it had been preempted after five tokens
            found = naive.hits(request, prompt, inputs, length)
            assert cache.hits(request, length) == len(found) * BLOCK
            active = sum(block["users"] > 0 for block in found)
            fits = -(-length // BLOCK) - active <= capacity - naive.used()
            assert cache.fits(request, length) == fits
            if fits:
                naive.admit(request, found)
                assert cache.admit(request, length) == len(found) * BLOCK
                looked_up, hit = looked_up + (length - 1) // BLOCK, hit + len(found)
                if request not in reused:
                    at_first, asked_at_first = at_first + len(found) * BLOCK, asked_at_first + length
                reused[request] = tokens[request] = len(found) * BLOCK
        elif rng.random() < 0.7:
            more = tokens[request] + rng.randint(1, 6)
            new = max(0, -(-more // BLOCK) - len(naive.holds[request]))
            assert cache.missing(request, more) == new
            if new <= capacity - naive.used():
                computed = more - 1 if drafts else more
                naive.grow(request, prompt, inputs, more, computed)
                cache.grow(request, more, computed)
                tokens[request] = more
        else:
            naive.release(request)
            cache.release(request)
            del tokens[request]
        assert cache.used == naive.used()
        cache.check()
    counts = cache.counts
    assert (counts["blocks_looked_up"], counts["blocks_hit"]) == (looked_up, hit)
    assert (counts["blocks_evicted"], counts["states_evicted"]) == (naive.blocks_evicted, naive.states_evicted)
    assert (counts["tokens_reused_at_first"], counts["tokens_asked_at_first"]) == (at_first, asked_at_first)
    assert cache.reused_tokens == reused
    return counts


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(("every", "slots"), [(None, 99), (BLOCK, 3), (BLOCK, 12), (2 * BLOCK, 5)])
def test_random_use_equals_the_naive_cache(every, slots, drafts):
    counts = Counter[str]()
    for seed in range(40):
        counts.update(random_use(seed, every, slots, drafts))
    assert counts["blocks_hit"] > 100
    assert counts["blocks_evicted"] > 100
    assert counts["states_evicted"] > 100 or not every


def test_counted_blocks():
    cache = KvCache(3, BLOCK)
    assert (cache.hits(0, 9), cache.admit(0, 9), cache.fits(0, 12), cache.fits(0, 13)) == (0, 0, True, False)
    cache.grow(0, 5)
    assert (cache.used, cache.free, cache.missing(0, 8), cache.missing(0, 9)) == (2, 1, 0, 1)
    cache.release(0)
    assert cache.used == 0


def resumed(cache: PrefixCache, request: int, length: int) -> int:
    """Admit, prefill and release; returns the tokens that were hit."""
    hits = cache.admit(request, length)
    cache.grow(request, length)
    cache.check()
    cache.release(request)
    return hits


def test_checkpoints_go_least_recently_used_first():
    """Three prompts of 16 tokens with states every 8; three slots, one of which a running sequence takes."""
    requests = requests_of([[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4]], [16, 16, 16])
    cache = PrefixCache(100, BLOCK, requests, state_every=8, state_slots=3)
    assert resumed(cache, 0, 16) == 0  # states after 8 and 16 tokens of the first text
    assert resumed(cache, 2, 16) == 8  # both are there
    assert cache.counts["states_evicted"] == 0
    assert resumed(cache, 1, 16) == 0  # needs both places
    assert resumed(cache, 2, 16) == 0  # and so does this
    assert cache.counts["states_evicted"] == 4


def test_a_sequence_takes_the_slot_of_a_checkpoint_and_a_checkpoint_never_that_of_a_sequence():
    requests = requests_of([[1, 2], [3, 4], [5, 6]], [8, 8, 8])
    cache = PrefixCache(100, BLOCK, requests, state_every=4, state_slots=3)
    assert resumed(cache, 0, 8) == 0  # keeps two states
    cache.admit(1, 8)
    cache.admit(2, 8)  # the older of the two goes
    assert cache.counts["states_evicted"] == 1
    cache.check()
    assert cache.hits(0, 8) == 0  # it ended at the only block that can be hit
    cache.grow(1, 8)  # one place: the state after 8 tokens takes it from the one after 4, which took it before
    assert cache.counts["states_evicted"] == 3
    cache.check()


def test_a_sequence_goes_on_in_the_slot_of_the_state_that_it_resumes_if_no_other_is_left():
    requests = requests_of([[1, 2], [3, 4], [1, 2], [1, 2]], [8, 8, 8, 8])
    cache = PrefixCache(100, BLOCK, requests, state_every=4, state_slots=2)
    cache.admit(0, 8)
    cache.grow(0, 4)  # keeps a state
    cache.release(0)
    cache.admit(1, 8)
    assert cache.admit(2, 8) == 4
    assert cache.counts["states_evicted"] == 1
    cache.check()
    cache.release(1)
    assert cache.hits(3, 8) == 0


def test_the_state_that_is_resumed_stays_where_another_can_go():
    requests = requests_of([[1, 2], [3, 4], [1, 2], [1, 2], [3, 4]], [8, 8, 8, 8, 8])
    cache = PrefixCache(100, BLOCK, requests, state_every=4, state_slots=3)
    for request in (0, 1):
        cache.admit(request, 8)
        cache.grow(request, 4)
        cache.release(request)
    cache.admit(2, 8)  # resumes the older state, which is the younger from now on
    cache.admit(3, 8)
    assert (cache.reused_tokens[2], cache.reused_tokens[3], cache.hits(4, 8)) == (4, 4, 0)


def test_a_look_up_is_renewed_when_blocks_come_and_go():
    requests = requests_of([[1, 2, 3], [1, 2, 3], [7, 8, 9]], [12, 12, 12])
    cache = PrefixCache(3, BLOCK, requests)
    assert cache.hits(1, 12) == 0
    cache.admit(0, 12)
    cache.grow(0, 4)
    assert (cache.hits(1, 12), cache.fits(1, 12)) == (4, True)  # two more, of two
    cache.grow(0, 12)
    assert (cache.hits(1, 12), cache.fits(1, 12)) == (8, False)
    cache.release(0)
    assert (cache.hits(1, 12), cache.fits(1, 12)) == (8, True)  # nobody uses them, so that they are not spared
    cache.admit(2, 12)
    cache.grow(2, 4)  # takes the last
    assert cache.hits(1, 12) == 8
    cache.grow(2, 5)  # takes the second, and is not full yet
    assert cache.hits(1, 12) == 4


def test_a_state_without_its_blocks_is_useless():
    requests = requests_of([[1, 2, 3, 4], [9, 9, 9, 9]], [16, 16])
    cache = PrefixCache(4, BLOCK, requests, state_every=8, state_slots=9)
    assert resumed(cache, 0, 16) == 0
    assert resumed(cache, 1, 16) == 0  # takes all blocks
    assert resumed(cache, 0, 16) == 0


def test_a_hash_covers_whole_kv_blocks():
    requests = requests_of([[1], [1]], [7, 8], block_tokens=8)
    check_block_tokens(requests.prefixes, 4)
    with pytest.raises(InputError, match=r"memory.kv_block_tokens: found 3; .* cover 8 tokens each"):
        check_block_tokens(requests.prefixes, 3)
    cache = PrefixCache(9, BLOCK, requests)
    assert resumed(cache, 0, 7) == 0
    assert resumed(cache, 1, 8) == 4  # the first half of the block that both begin with
    assert infinite_hits(requests) == (1, 2)
