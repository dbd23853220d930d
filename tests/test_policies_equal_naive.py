"""The engine of rounds against the naive one, bit for bit, for every policy and decoder on random configurations."""

from collections import Counter

import numpy as np
from naive_rounds import NaiveRounds, Seq
from test_engine_equals_naive import STEPS, Case

from twotower_sim.admission import ADMISSION
from twotower_sim.decoders import BlockDecoder, BurstDecoder, TokenDecoder
from twotower_sim.engine import FOREVER_NS
from twotower_sim.kv_cache import KvCache
from twotower_sim.latency import Host, Latency
from twotower_sim.policy import POLICIES
from twotower_sim.records import Records
from twotower_sim.replica import Limits
from twotower_sim.rounds import RoundEngine, Task

TICK = 2.0**-30
"""Costs are whole numbers of these, so that sums of seconds are exact in any order."""
KINDS = ("mock", "burst", "block", "block", "block")


class PolicyCase(Case):
    """A random case with a policy and a decoder of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = self.rng
        self.known: dict[tuple[int, int], list[int]] = {}
        self.kind = rng.choice(KINDS)
        self.steps_per_round = rng.choice([1, 2, 3, 5])
        self.policy = rng.choice(["fdfo", "fdfo", "lockstep"])
        self.max_extends = rng.choice([None, None, 1, 2])
        self.waiting_for = rng.choice([1, 3, 1000])  # from so many on, blocks take another level
        longest = max(
            -(-peak // self.limits.kv_block_tokens) for peak in (self._peak(i) for i in range(len(self.inputs)))
        )
        blocks = rng.choice([1 << 40, longest, longest, int(longest * 1.3) + 1])
        seqs = self.limits.max_num_seqs
        budget = seqs * (self.block_size if self.kind == "block" else 1) + rng.choice([0, 1, 50, 2000])
        if not self.limits.chunked_prefill:
            budget = max(budget, *(self._peak(i) for i in range(len(self.inputs)))) + self.block_size
        of = self.limits
        self.limits = Limits(
            seqs, budget, blocks, of.kv_block_tokens, of.state_slots, of.chunked_prefill, of.prefill
        )  # fmt: skip
        self.bursts = [
            [int(n) for n in np.random.default_rng((seed, i)).integers(1, 5, self.outputs[i])]
            for i in range(len(self.outputs))
        ]

    def _peak(self, i: int) -> int:
        return self.inputs[i] + -(-self.outputs[i] // self.block_size) * self.block_size

    def steps(self, request: int, level: int) -> list[int]:
        if (request, level) not in self.known:
            blocks = range(-(-self.outputs[request] // self.block_size))
            self.known[request, level] = [(request * 7919 + b * 104729 + level * 31) % STEPS + 1 for b in blocks]
        return self.known[request, level]

    def level(self, request: int, waiting: int) -> int:
        return int(waiting >= self.waiting_for)

    def _latency(self) -> Latency:
        rng = self.rng
        a, b, c, d, e = (rng.randrange(1, 1 << 20) * TICK for _ in range(5))
        host = Host(rng.choice([0, 1 << 18]) * TICK, rng.random() < 0.5)
        apart, one = rng.random() < 0.5, rng.random() < 0.3

        def transfer(states, tokens):
            return states * 4096 * TICK + tokens * TICK if apart and not one else 0.0

        def cost(n, context, n_extend, extend_context, tokens=0, pairs=0, reads=0, n_prefill=0):
            u = (n > 0) * a + n * b / 16 + context * TICK
            v = (
                (n_extend + tokens > 0) * c
                + n_extend * d / 16
                + tokens * TICK
                + extend_context * TICK
                + n_prefill * e / 64
            )
            if one:
                return 0.0, u + v, host.around(max, u + v)
            sent = v + transfer(n_extend + n_prefill, n_extend * self.block_size + tokens)
            return u, v, host.around(max, max(u, sent) if apart else u + sent)

        return Latency(cost, cost, cost, side_by_side=apart and not one, host=host, transfer=transfer, one_forward=one)

    def rounds(self, records: Records) -> RoundEngine:
        kv_block = self.limits.kv_block_tokens
        if self.kind == "mock":
            decoder = TokenDecoder(kv_block, prefill_gives_token=False)
        elif self.kind == "burst":
            decoder = BurstDecoder(kv_block, _Listed(self.bursts), records)
        else:
            limits = self.steps_per_round, self.max_extends
            decoder = BlockDecoder(self.block_size, POLICIES[self.policy], *limits, self, self.level, records)
        cache = KvCache(self.limits.kv_blocks, kv_block)
        return RoundEngine(0, self.latency, decoder, self.limits, ADMISSION[self.admission](), cache, records)

    def oracle(self) -> NaiveRounds:
        lockstep = self.kind == "block" and self.policy == "lockstep"
        size = self.block_size if self.kind == "block" else 0
        return NaiveRounds(
            self.latency, self.limits, self.kind, size, dict(enumerate(self.bursts)), self.steps, self.level, lockstep,
            self.steps_per_round, self.max_extends, self.admission == "shortest_prompt",
        )  # fmt: skip


class _Listed:
    def __init__(self, bursts: list[list[int]]) -> None:
        self.of = bursts.__getitem__


def both(seed: int):
    case = PolicyCase(seed)
    number = len(case.inputs)
    records = Records(number)
    engine, oracle = case.rounds(records), case.oracle()
    arrivals = case.requests.arrival_ns.tolist()
    for request, at in enumerate(arrivals):
        engine.submit(Task(request, case.inputs[request], case.outputs[request]), at)
    engine.advance(FOREVER_NS)
    oracle.simulate((at, Seq(r, case.inputs[r], case.outputs[r])) for r, at in enumerate(arrivals))
    return case, records, engine, oracle


def test_every_policy_and_decoder():
    """And the cases are hard: preemptions under each, passes of blocks that were done, blocks at both levels."""
    preempted: Counter[str] = Counter()
    idle, levels = 0, set()
    for seed in range(200):
        case, records, engine, oracle = both(seed)
        assert_equal(case, records, engine, oracle)
        preempted[f"{case.kind} {case.policy}" if case.kind == "block" else case.kind] += engine.preemptions
        idle += engine.decoder.idle_forwards
        levels |= set(records.units()[:, 5].tolist())
    assert len(preempted) == 4
    assert min(preempted.values()) > 5, preempted
    assert idle > 1000
    assert levels == {0, 1}


def assert_equal(case: PolicyCase, records: Records, engine: RoundEngine, oracle: NaiveRounds) -> None:
    n = range(len(case.inputs))
    for column, expected in (
        (records.admit_ns, oracle.admit),
        (records.prefilled_ns, oracle.prefilled),
        (records.finish_ns, oracle.finish),
    ):
        assert list(column) == [expected[r] for r in n], case.seed
    assert (engine.rounds, engine.preemptions, engine.kv_peak) == (oracle.rounds, oracle.preemptions, oracle.peak)
    assert engine.decoder.idle_forwards == oracle.idle
    if case.kind == "block":
        assert list(records.nfe) == [oracle.nfe[r] for r in n]
    if case.kind == "mock":
        ends = engine.tick_end_ns
        found = [(row[0], at) for row in records.segments().tolist() for at in ends[row[2] : row[3]]]
        assert sorted(found) == sorted((row[0], row[4]) for row in oracle.visible)
    else:
        assert records.units().tolist() == sorted(map(list, oracle.visible), key=lambda row: row[:2])
    assert engine.cache.used == engine.decoder.context == engine.queued_tokens == 0
