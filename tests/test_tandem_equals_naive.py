"""The towers in tandem against the naive ones, bit for bit, on random configurations, in open and closed loops."""

import math
from collections import Counter

import numpy as np
import pytest
from naive_tandem import ARRIVES, NaiveTandem, Seq, Server
from test_engine_equals_naive import STEPS, Case

from twotower_sim.admission import ADMISSION
from twotower_sim.fleet import Fleet
from twotower_sim.kv_cache import KvCache
from twotower_sim.latency import Host, Latency
from twotower_sim.records import Records
from twotower_sim.replica import Limits
from twotower_sim.servers import ContextServer, DenoiserServer, TandemTask
from twotower_sim.tandem import Tandem


class TandemCase(Case):
    """A random case with servers of both kinds."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng, size, kv_block = self.rng, self.block_size, self.limits.kv_block_tokens
        self.blocks = [-(-output // size) for output in self.outputs]
        peaks = [tokens + (blocks - 1) * size for tokens, blocks in zip(self.inputs, self.blocks, strict=True)]
        need = max(-(-peak // kv_block) for peak in peaks)
        self.m, self.n = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3])
        self.kv_context, self.kv_denoiser = (
            rng.choice([1 << 40, need, need + 1, int(need * 1.3) + 1, need * 3]) for _ in "cd"
        )
        self.seats, self.slots = rng.choice([1, 2, 5, 40]), rng.choice([1, 3, 8, 1 << 30])
        self.blocking, self.sticky = rng.random() < 0.5, rng.random() < 0.5
        self.max_extends, self.waiting_for = rng.choice([None, None, 1, 2]), rng.choice([1, 3, 1000])
        chunked, budget = rng.random() < 0.7, size * rng.choice([1, 2, 8]) + rng.choice([0, 1, 50])
        self.limits = Limits(
            max_num_seqs=rng.choice([1, 3, 40]),
            max_num_batched_tokens=budget if chunked else max(budget, *peaks),
            kv_blocks=self.kv_context,
            kv_block_tokens=kv_block,
            state_slots=self.slots,
            chunked_prefill=chunked,
        )
        self.concurrency, self.think_ns = rng.choice([1, 3, 20]), rng.choice([0, 2_000_000])

    def _length(self, median: int) -> int:
        return min(super()._length(median), 160)

    def _latency(self) -> Latency:
        a, b, c, d, e = (self.rng.random() * 1e-3 for _ in range(5))
        apart = self.rng.choice([0, 1e-4, 3e-3])  # a state's transfer
        unit = self.rng.choice([1e-9, 1e-3])  # coarse, so that ties occur

        def coarse(seconds: float) -> float:
            return math.ceil(seconds / unit) * unit

        def cost(n, context, n_extend, extend_context, tokens=0, pairs=0, reads=0, n_prefill=0):
            u = a + b * n + 1e-6 * context
            v = c + d * n_extend + 1e-6 * (extend_context + reads) + 1e-9 * pairs + 1e-5 * tokens + e * n_prefill
            return coarse(u), coarse(v), coarse(u) + coarse(v)

        def transfer(states: int, tokens: int) -> float:
            return coarse(apart * (states + tokens / 100)) if apart else 0.0

        host = Host(self.rng.choice([0.0, 2e-4]), self.rng.random() < 0.5)
        return Latency(cost, cost, cost, side_by_side=True, host=host, transfer=transfer)

    def steps(self, request: int, level: int) -> list[int]:
        return [(request * 7919 + b * 104729 + level * 31) % STEPS + 1 for b in range(self.blocks[request])]

    def level(self, request: int, waiting: int) -> int:
        return int(waiting >= self.waiting_for)

    def tandem(self, env, records: Records, on_finish) -> Tandem:
        queue, kv_block = ADMISSION[self.admission], self.limits.kv_block_tokens
        contexts = [ContextServer(i, queue(), KvCache(self.kv_context, kv_block)) for i in range(self.m)]
        denoisers = [DenoiserServer(i, KvCache(self.kv_denoiser, kv_block), self.seats) for i in range(self.n)]
        servers = self.block_size, contexts, denoisers
        return Tandem(
            env, 0, self.latency, self.limits, *servers, self, self.level, records,
            blocking=self.blocking, sticky=self.sticky, max_extends=self.max_extends, on_finish=on_finish,
        )  # fmt: skip

    def oracle(self) -> NaiveTandem:
        contexts = [Server(i, self.kv_context, self.slots) for i in range(self.m)]
        denoisers = [Server(i, self.kv_denoiser, self.seats) for i in range(self.n)]
        return NaiveTandem(
            self.latency, self.limits, self.block_size, contexts, denoisers, self.steps, self.level, self.blocking,
            self.sticky, self.max_extends, self.admission == "shortest_prompt",
        )  # fmt: skip

    def task(self, request: int) -> TandemTask:
        return TandemTask(request, self.inputs[request], self.outputs[request])

    def arrive(self, oracle: NaiveTandem, request: int) -> None:
        oracle.arrive(Seq(request, self.inputs[request], self.blocks[request]))


def simulate(case: TandemCase, closed: bool) -> tuple[Records, Tandem, list[tuple[int, int, int]]]:
    """What the fleet's one replica did, and (request, time, outstanding tokens before it) of every arrival."""
    records, seen = Records(len(case.inputs)), []
    fleet = Fleet(
        "least_outstanding_tokens",
        case.seed,
        case.task,
        lambda request, now: seen.append((request, now, fleet.replicas[0].outstanding_tokens)),
        live=closed,
    )
    tandem = case.tandem(fleet.env, records, fleet.completed if closed else None)
    fleet.add(tandem)
    ids = np.arange(len(case.inputs))
    if closed:
        fleet.run_closed(ids, case.concurrency, case.think_ns, progress=lambda done: None)
    else:
        fleet.run_open(case.requests, ids, progress=lambda done: None)
    return records, tandem, seen


def simulate_naively(case: TandemCase, closed: bool) -> NaiveTandem:
    oracle = case.oracle()
    if not closed:
        for request, at in enumerate(case.requests.arrival_ns.tolist()):
            oracle.at(at, ARRIVES, case.arrive, oracle, request)
        oracle.run()
        return oracle
    left = list(range(len(case.inputs)))

    def next_request() -> None:
        if left:
            case.arrive(oracle, left.pop(0))

    oracle.on_finish = lambda request: oracle.at(oracle.clock + case.think_ns, ARRIVES, next_request)
    for _ in range(case.concurrency):
        oracle.at(0, ARRIVES, next_request)
    oracle.run()
    return oracle


def assert_equal(case: TandemCase, records: Records, tandem: Tandem, oracle: NaiveTandem) -> None:
    n = range(len(case.inputs))
    assert list(records.admit_ns) == [oracle.admit[r] for r in n]
    assert list(records.prefilled_ns) == [oracle.prefilled[r] for r in n]
    assert records.units().tolist() == sorted(map(list, oracle.visible), key=lambda row: row[:2])
    assert list(records.finish_ns) == [oracle.finish[r] for r in n]
    assert list(records.nfe) == [oracle.nfe[r] for r in n]
    assert list(records.preemptions) == [oracle.preemptions.get(r, 0) for r in n]
    assert (tandem.rounds, tandem.kv_peak) == (oracle.rounds, oracle.peak)
    assert tandem.outstanding_tokens == 0
    assert not any(server.cache.used for server in (*tandem.contexts, *tandem.denoisers))


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("first", range(0, 160, 80))
def test_every_moment_is_that_of_the_naive_tandem(first, closed):
    hard: Counter[str] = Counter()
    for seed in range(first, first + 80):
        case = TandemCase(seed)
        records, tandem, seen = simulate(case, closed)
        oracle = simulate_naively(case, closed)
        assert seen == oracle.seen, seed
        assert_equal(case, records, tandem, oracle)
        hard["waits for a denoiser"] += oracle.waits
        hard["moves under free assignment"] += oracle.moves
        hard["preempted by a denoiser"] += oracle.lost
        hard["preempted by a context server"] += tandem.preemptions - oracle.lost
        hard["blocks at another level"] += sum(level for *_, level in oracle.visible)
    assert min(hard.values()) >= 10, hard
