"""The engine of rounds against the fast one, wherever that applies."""

import pytest
from test_engine_equals_naive import Case

from twotower_sim.admission import ADMISSION
from twotower_sim.decoders import BlockDecoder, TokenDecoder
from twotower_sim.engine import FOREVER_NS
from twotower_sim.kv_cache import KvCache, PrefixCache
from twotower_sim.policy import POLICIES
from twotower_sim.records import Records
from twotower_sim.rounds import RoundEngine, Task
from twotower_sim.visible import Ticks, block_times, logged_times


class Plain:
    """Luck of one gamma."""

    def __init__(self, plans):
        self.plans = plans

    def steps(self, request, level):
        return self.plans.steps(request)


def rounds_of(case: Case, records: Records, cached: bool) -> RoundEngine:
    limits = case.limits
    if case.autoregressive:
        decoder = TokenDecoder(limits.kv_block_tokens, prefill_gives_token=True)
    else:
        luck = Plain(case.plans)
        decoder = BlockDecoder(case.block_size, POLICIES["fdfo"], 1, None, luck, lambda r, w: 0, records)
    cache = KvCache(limits.kv_blocks, limits.kv_block_tokens)
    if cached:
        cache = PrefixCache(limits.kv_blocks, limits.kv_block_tokens, case.requests, 1 << 30, limits.state_slots)
    return RoundEngine(0, case.latency, decoder, limits, ADMISSION[case.admission](), cache, records)


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_rounds_equal_the_fast_engine(first):
    for seed in range(first, first + 50):
        case = Case(seed)
        number = len(case.inputs)
        ours, theirs = Records(number), Records(number)
        cached = seed % 2 == 0  # a cache that nothing can hit changes nothing
        slow, fast = rounds_of(case, ours, cached), case.engine(0, theirs)
        for request, at in enumerate(case.requests.arrival_ns.tolist()):
            slow.submit(Task(request, case.inputs[request], case.outputs[request]), at)
            fast.submit(case.sequence(request), at)
            assert slow.outstanding_tokens == fast.outstanding_tokens
        slow.advance(FOREVER_NS)
        fast.advance(FOREVER_NS)
        for column in ("admit_ns", "prefilled_ns", "finish_ns", "preemptions"):
            assert getattr(ours, column) == getattr(theirs, column), (seed, column)
        for figure in ("rounds", "preemptions", "busy_ns", "kv_peak", "seats_peak"):
            assert getattr(slow, figure) == getattr(fast, figure), (seed, figure)
        assert slow.cache.used == slow.queued_tokens == slow.decoder.context == 0
        assert not slow.decoder.sequences
        if case.autoregressive:
            assert decodes(ours, slow) == decodes(theirs, fast)
        else:
            assert_same_blocks(case, ours, theirs, fast)


def decodes(records: Records, engine) -> list[tuple]:
    """Request, start, and the times at which it took tokens, of every segment."""
    ends = engine.tick_end_ns
    return [(row[0], row[5], ends[row[2] : row[3]].tolist()) for row in records.segments().tolist()]


def assert_same_blocks(case: Case, ours: Records, theirs: Records, fast) -> None:
    expected = block_times(theirs.segments(), Ticks([fast.tick_end_ns]), case.plans)
    for found, wanted in zip(logged_times(ours.units(), ours.nfe), expected, strict=True):
        for mine, his in zip(found, wanted, strict=True):
            assert (mine == his).all() if hasattr(his, "all") else mine == his
