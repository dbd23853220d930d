"""The fast engine against the naive one, bit for bit, on random configurations."""

import math
import random

import numpy as np
import pytest
from naive import NaiveEngine, NaiveSequence
from profiles import grid

from twotower_sim.admission import ADMISSION
from twotower_sim.engine import FOREVER_NS, Engine
from twotower_sim.errors import InputError
from twotower_sim.fleet import Fleet
from twotower_sim.latency import Host, Latency
from twotower_sim.measured import Hull, autoregressive_measured, two_tower_measured
from twotower_sim.plan import BlockPlans
from twotower_sim.profile import AXES, MeasuredLatency
from twotower_sim.records import Records
from twotower_sim.replica import Limits
from twotower_sim.requests import Requests
from twotower_sim.router import ROUTERS
from twotower_sim.schedule import BlockSchedule, Sequence, TokenSchedule
from twotower_sim.visible import Ticks, block_times, second_tokens, token_gaps

STEPS = 8


class RandomSteps:
    """A commit law of uniform steps, so that plans are not smoother than reality."""

    def __init__(self, block_size):
        self.block_size = block_size

    def steps(self, seed, requests, blocks):
        return (requests * 7919 + blocks * 104729 + seed) % 97 * STEPS // 97 + 1


class Case:
    """A random engine configuration and workload."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.seed, self.autoregressive = seed, rng.random() < 0.5
        self.block_size = rng.choice([4, 16, 32])
        n, kv_block, seqs = rng.choice([5, 40, 150]), rng.choice([1, 4, 16, 48, 512]), rng.choice([1, 3, 8, 40])
        self.inputs = [self._length(rng.choice([5, 100, 900])) for _ in range(n)]
        self.outputs = [self._length(rng.choice([3, 60, 400])) for _ in range(n)]
        arrivals = sorted(int(1e9 * rng.random() * rng.choice([0.1, 3, 60])) for _ in range(n))
        if rng.random() < 0.4:  # bunched, so that ties occur
            arrivals = [at // 125_000_000 * 125_000_000 for at in arrivals]
        self.requests = Requests(np.array(arrivals), np.array(self.inputs), np.array(self.outputs))
        blocks = BlockSchedule(kv_block, self.block_size, STEPS)
        self.schedule = TokenSchedule(kv_block) if self.autoregressive else blocks
        self.plans = BlockPlans(RandomSteps(self.block_size), seed, self.requests.output_tokens)
        self.admission = rng.choice(sorted(ADMISSION))
        self.limits = self._limits(kv_block, seqs)
        self.latency = self._latency()
        self.longest = max(self.schedule.ticks(output) for output in self.outputs)

    def _length(self, median: int) -> int:
        return max(1, int(self.rng.lognormvariate(math.log(median), 1)))

    def _limits(self, kv_block: int, seqs: int) -> Limits:
        rng, schedule = self.rng, self.schedule
        peaks = [schedule.peak_tokens(*tokens) for tokens in zip(self.inputs, self.outputs, strict=True)]
        need = max(-(-peak // kv_block) for peak in peaks)
        chunked, budget = rng.random() < 0.8, seqs * schedule.pass_tokens + rng.choice([0, 1, 50, 2000])
        return Limits(
            max_num_seqs=seqs,
            max_num_batched_tokens=budget if chunked else max(budget, *peaks) + self.block_size,
            kv_blocks=rng.choice([1 << 40, need, int(need * 1.3) + 1, need * 3]),
            kv_block_tokens=kv_block,
            state_slots=rng.choice([1 << 30, max(1, seqs - 1)]),
            chunked_prefill=chunked,
            prefill=rng.choice(["mixed", "mixed", "first", "last"]),
        )

    def _latency(self) -> Latency:
        a, b, c, d, e, f, g = (self.rng.random() * 1e-3 for _ in range(7))

        def cost(n, context, n_extend, extend_context, tokens=0, pairs=0, reads=0, n_prefill=0):
            u = a * n + 1e-6 * b * context
            v = (
                c * (16 * n_extend + tokens)
                + 1e-6 * d * extend_context
                + 1e-9 * pairs
                + 1e-6 * f * reads
                + g * n_prefill
            )
            return u, (u + v if self.autoregressive else v), u + v + e

        return Latency(cost, cost, cost, side_by_side=False)

    def engine(self, index: int, records: Records, on_finish=None) -> Engine:
        queue = ADMISSION[self.admission]()
        return Engine(
            index, self.latency, self.schedule, self.limits, queue, records, self.longest, on_finish=on_finish
        )  # fmt: skip

    def naive(self, on_finish=None) -> NaiveEngine:
        size = None if self.autoregressive else self.block_size
        return NaiveEngine(
            self.latency, self.limits, size, self.admission == "shortest_prompt", on_finish=on_finish
        )  # fmt: skip

    def sequence(self, request: int) -> Sequence:
        plan = None if self.autoregressive else self.plans.of(request)
        return Sequence(request, self.inputs[request], self.outputs[request], plan)

    def naive_sequence(self, request: int) -> NaiveSequence:
        steps = None if self.autoregressive else self.plans.blocks(request, request + 1).steps.tolist()
        return NaiveSequence(request, self.inputs[request], self.outputs[request], steps)


def assert_equal(case: Case, records: Records, engines: list[Engine], naive: list[NaiveEngine]) -> None:
    n = len(case.inputs)
    finish, admit, visible, nfe = ({k: v for e in naive for k, v in getattr(e, name).items()} for name in (
        "finish", "admit", "visible", "nfe"
    ))  # fmt: skip
    assert [records.finish_ns[r] for r in range(n)] == [finish[r] for r in range(n)]
    assert [records.admit_ns[r] for r in range(n)] == [admit[r] for r in range(n)]
    for fast, slow in zip(engines, naive, strict=True):
        assert (fast.preemptions, fast.rounds, fast.kv_peak) == (slow.preemptions, slow.rounds, slow.kv_peak)
        assert fast.kv_used == fast.context == fast.decoding == fast.queued_tokens == 0
        assert not any(fast._rings.passes)
        assert not any(fast._rings.growth)
    ticks, segments = Ticks([engine.tick_end_ns for engine in engines]), records.segments()
    if case.autoregressive:
        assert_tokens_equal(n, segments, ticks, visible)
    else:
        assert_blocks_equal(case, segments, ticks, visible, nfe)


def assert_tokens_equal(n: int, segments, ticks: Ticks, visible: dict) -> None:
    second = [visible.get((r, 1), -1) for r in range(n)]
    assert second_tokens(segments, ticks, n).tolist() == second
    gaps: dict[int, int] = {}
    for (request, token), at in visible.items():
        if token:
            gap = at - visible[request, token - 1]
            gaps[gap] = gaps.get(gap, 0) + 1
    found: dict[int, int] = {}
    for gap_ns, sharing in token_gaps(segments, ticks):
        for gap, count in zip(gap_ns.tolist(), sharing.tolist(), strict=True):
            if count:
                found[gap] = found.get(gap, 0) + count
    assert found == gaps


def assert_blocks_equal(case: Case, segments, ticks: Ticks, visible: dict, nfe: dict) -> None:
    found, forwards = {}, []
    for chunk in block_times(segments, ticks, case.plans):
        keys = zip(chunk.request.tolist(), chunk.block.tolist(), strict=True)
        found |= dict(zip(keys, chunk.visible_ns.tolist(), strict=True))
        forwards += chunk.nfe.tolist()
    assert found == visible
    assert forwards == [nfe[r] for r in range(len(case.inputs))]


@pytest.mark.parametrize("first", range(0, 400, 20))
def test_one_replica(first):
    for seed in range(first, first + 20):
        case = Case(seed)
        records = Records(len(case.inputs))
        fast, slow = case.engine(0, records), case.naive()
        for request, at in enumerate(case.requests.arrival_ns.tolist()):
            fast.submit(case.sequence(request), at)
            slow.submit(case.naive_sequence(request), at)
        fast.advance(FOREVER_NS)
        slow.advance(FOREVER_NS)
        assert_equal(case, records, [fast], [slow])


class MeasuredCase(Case):
    """With a latency measured on random grids that often end before what the engine asks for."""

    def _latency(self) -> Latency:
        rng, seqs = self.rng, self.limits.max_num_seqs

        def axis(first: int, most: int) -> list[int]:
            return sorted({first, *(rng.randint(first, max(first, most)) for _ in range(3)), max(first + 1, most)})

        points = {
            "block_size": [self.block_size],
            "sequences": axis(1, int(seqs * rng.choice([0.7, 1, 1]))),
            "context": axis(0, int(max(self.inputs) * rng.choice([0.5, 3, 50]))),
            "tokens": axis(1, int(self.limits.max_num_batched_tokens * rng.choice([0.5, 1, 1, 1]))),
        }
        grids = {name: grid(name, points, factor=0.1) for name in AXES}
        for of in grids.values():  # noise makes times fall here and there
            of |= {"median_s": [rng.uniform(0.8, 1) * s for s in of["median_s"]], "p20_s": [], "p80_s": []}
        of = MeasuredLatency.model_validate({"transfer": grids.pop("transfer"), "passes": grids})
        hull, end = Hull("random", rng.random() < 0.6), (Host(1e-4), seqs, self.limits.prefill != "first")
        if self.autoregressive:
            return autoregressive_measured(of, hull, *end)
        return two_tower_measured(of, hull, self.block_size, rng.random() < 0.5, *end)


def finished(case: Case, engine, sequence) -> tuple[str, dict]:
    """Run to the end: the error that stopped it, and the rounds that were extrapolated."""
    case.latency.extrapolated.clear()
    said = ""
    for request, at in enumerate(case.requests.arrival_ns.tolist()):
        try:
            engine.submit(sequence(request), at)
        except InputError as error:
            return str(error), {}
    try:
        engine.advance(FOREVER_NS)
    except InputError as error:
        said = str(error)
    return said, dict(case.latency.extrapolated)


def test_with_a_measured_latency_whose_look_ahead_leaves_what_was_measured():
    stopped = counted = whole = 0
    for seed in range(2000, 2100):
        case = MeasuredCase(seed)
        records = Records(len(case.inputs))
        fast, slow = case.engine(0, records), case.naive()
        outcome = finished(case, fast, case.sequence)
        assert outcome == finished(case, slow, case.naive_sequence)
        if not outcome[0]:
            assert_equal(case, records, [fast], [slow])
        stopped += bool(outcome[0])
        counted += bool(outcome[1])
        whole += outcome == ("", {})
    assert min(stopped, counted, whole) > 10


def test_the_random_cases_are_hard():
    """Otherwise the equality above says little: there are preemptions of both modes, ties, glides and steps."""
    preempted = {True: 0, False: 0}
    for seed in range(400):
        case = Case(seed)
        fast = case.engine(0, Records(len(case.inputs)))
        for request, at in enumerate(case.requests.arrival_ns.tolist()):
            fast.submit(case.sequence(request), at)
        fast.advance(FOREVER_NS)
        preempted[case.autoregressive] += fast.preemptions
    assert min(preempted.values()) > 60


@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("closed", [False, True])
def test_a_fleet_is_the_same_lazy_or_live_fast_or_naive(router, closed):
    for seed in range(1000, 1012):
        case = Case(seed)
        runs = [
            fleet_of(case, router, closed, live=live, naive=False) for live in ({True} if closed else {False, True})
        ]
        _, _, slow = fleet_of(case, router, closed, live=True, naive=True)
        for records, engines, _ in runs:
            assert_equal(case, records, engines, slow)


def fleet_of(case: Case, router: str, closed: bool, live: bool, naive: bool):
    records = Records(len(case.inputs))
    fleet = Fleet(
        router,
        case.seed,
        case.naive_sequence if naive else case.sequence,
        records.arrival_ns.__setitem__,
        live=live,
    )
    hear = fleet.completed if closed else None
    replicas = [case.naive(hear) if naive else case.engine(index, records, hear) for index in range(3)]
    for replica in replicas:
        fleet.add(replica)
    ids = np.arange(len(case.inputs))
    if closed:
        fleet.run_closed(ids, concurrency=4, think_ns=case.seed % 2 * 1_000_000, progress=lambda done: None)
    else:
        fleet.run_open(case.requests, ids, progress=lambda done: None)
    return records, replicas, replicas
