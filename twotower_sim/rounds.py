"""One replica's engine, a round at a time, with loops over the batch: for every policy, cache and way to decode.

``engine.py`` is fast where each sequence takes one pass a round and the future of a sequence is known when it starts;
where that does not hold (several passes a round, drafts, a gamma that follows the load, shared KV blocks), this one
runs. The order of a round that starts at ``t``:

1. the round before it ends: tokens become visible, sequences finish, completed prefills start to decode;
2. arrivals with time <= t are in the queue;
3. decoding sequences take the KV blocks they need now (in admission order; those that extend in the order in which
   their blocks were done, as many as a round may extend), then the prompt in progress those of its next chunk; on
   shortage the latest admitted sequence is preempted, as in ``engine.py``;
4. unless something was preempted, the queue's head is admitted while seats, budget and memory for its whole prompt are
   there, what a prefix cache holds of it counted;
5. the decoder forms the round's passes, and the round takes what the latency model says.

What a decoder does in a round is in ``decoders.py``, how many passes it takes in ``policy.py``.
"""

from array import array
from collections.abc import Callable, Iterable
from typing import Protocol

from twotower_sim.admission import Queue
from twotower_sim.kv_cache import Cache, PrefixCache
from twotower_sim.latency import Cost, Latency, Prefill
from twotower_sim.records import Records
from twotower_sim.replica import Limits, PromptChunks, Round
from twotower_sim.schedule import Sequence


class Task(Sequence):
    """A request inside this engine."""

    __slots__ = ("left", "level", "ready_ns")

    def __init__(self, request: int, input_tokens: int, output_tokens: int) -> None:
        super().__init__(request, input_tokens, output_tokens, None)
        self.left = 0  # of its open block: denoise steps until it is done, 0 before its first; of a burst: its tokens
        self.level = 0  # which gamma its open block has
        self.ready_ns = 0  # since when what it works on could start


class Passes(Protocol):
    """What decoding sequences do in a round, as ``decoders.py`` says."""

    pass_tokens: int  # of a round's token budget, for each decoding sequence
    blocks: bool  # decodes by blocks that extend passes append to the cache
    at_once: bool  # a prompt that is complete decodes in the same round
    in_turn: bool  # the context forward comes before the denoise passes
    sequences: dict[int, Task]  # that decode, by request, in admission order
    idle_forwards: int  # denoise passes in which a sequence whose block was done kept its place
    context: int  # tokens that their passes attend to, with what the round in flight adds

    def prefill_length(self, seq: Task) -> int: ...
    def claims(self) -> Iterable[tuple[Task, int]]:
        """Sequences that take KV blocks before the round, and the tokens they then hold, one after the other."""
        ...

    def start(self, seq: Task, now_ns: int) -> bool:
        """The prompt of ``seq`` is in the cache; returns whether that was all it asked for."""
        ...

    def finish(self, seq: Task) -> None: ...
    def lift(self, seq: Task) -> None:
        """``seq`` loses its cache; what it has done stays."""
        ...

    def cost(self, latency: Latency, chunks: PromptChunks, waiting: int, now_ns: int) -> tuple[int, int, Cost]:
        """Form the round's passes: sequences that denoise (or decode), that extend, and what the round costs."""
        ...

    def read(self, latency: Latency, chunks: PromptChunks, now_ns: int) -> Cost:
        """What a round costs that does nothing but prefill."""
        ...

    def end(self, now_ns: int) -> list[Task]:
        """The round has ended; returns those that finish, in admission order."""
        ...


class RoundEngine:
    """See the module's text. ``submit`` and ``advance`` are the only ways in; time passes in ``advance``."""

    driven = True

    def __init__(
        self,
        index: int,
        latency: Latency,
        decoder: Passes,
        limits: Limits,
        queue: Queue[Task],
        cache: Cache,
        records: Records,
        on_finish: Callable[[int, int], None] | None = None,
        observe: Callable[[int, Round], None] | None = None,
    ) -> None:
        self.index = index
        self.clock_ns = 0
        self.idle = True
        self.running: dict[int, Task] = {}  # by request, in admission order: decoding or in prefill
        self.queue = queue
        self.cache = cache
        self.decoder = decoder
        self.queued_tokens = 0
        self.seats_peak = self.kv_peak = 0
        self.tick_end_ns = array("q")  # of every round in which sequences decode
        self.rounds = self.preemptions = self.busy_ns = 0
        self.denoiser_s = 0.0
        self.context_s = [0.0, 0.0, 0.0, 0.0]
        self._latency, self._limits, self._records = latency, limits, records
        self._on_finish, self._observe = on_finish, observe
        self._wake_ns = round(latency.host.wake_s * 1e9)
        self._partial: Task | None = None
        self._started: list[Task] = []
        self._prefilled: list[int] = []  # requests whose prompt the round in flight completes
        self._in_flight = self._decoded = False
        self._admissions = 0

    # ------------------------------------------------------------------ from outside

    @property
    def running_requests(self) -> int:
        return len(self.running)

    @property
    def prefix_caches(self) -> list[PrefixCache]:
        return [self.cache] if isinstance(self.cache, PrefixCache) else []

    @property
    def outstanding_requests(self) -> int:
        return len(self.running) + len(self.queue)

    @property
    def outstanding_tokens(self) -> int:
        return self.queued_tokens + self.decoder.context

    def submit(self, seq: Task, now_ns: int) -> None:
        self.settle(now_ns)
        if self.idle:
            slept = now_ns > self.clock_ns
            self.idle, self.clock_ns = False, now_ns + slept * self._wake_ns
        self.queue.add(seq)
        self.queued_tokens += self.decoder.prefill_length(seq)

    def settle(self, now_ns: int) -> None:
        """Show the state at ``now_ns``: rounds that start before it have run, one that ends at it has ended."""
        self.advance(now_ns)
        if self.clock_ns <= now_ns:
            self._end_round()

    def advance(self, until_ns: int) -> None:
        """Run every round that starts before ``until_ns``."""
        while self.clock_ns < until_ns:
            self._end_round()
            if self.idle:
                return
            self._round()

    # ------------------------------------------------------------------ one round

    def _end_round(self) -> None:
        if not self._in_flight:
            return
        self._in_flight = False
        for request in self._prefilled:
            self._records.prefilled(request, self.clock_ns)
        self._prefilled.clear()
        if self._decoded:
            self._decoded = False
            self.tick_end_ns.append(self.clock_ns)
            for seq in self.decoder.end(self.clock_ns):
                self._finish(seq)
        self._start_all()
        self.idle = not self.running and not self.queue

    def _round(self) -> None:
        limits, decoder = self._limits, self.decoder
        if limits.prefill == "first":
            chunks = self._prefill(limits.max_num_batched_tokens)
            if chunks.tokens:
                self._run(0, 0, decoder.read(self._latency, chunks, self.clock_ns), chunks.shape)
                return
        budget = limits.max_num_batched_tokens - decoder.pass_tokens * len(decoder.sequences)
        preempted = False if decoder.at_once else self._take(decoder.claims())
        mixes = not preempted and self._mixes() and self._has_room(budget)
        chunks = self._prefill(budget if mixes else 0)
        if decoder.at_once:
            self._start_all()
            self._reserve(decoder.claims())
        n, n_extend, cost = decoder.cost(self._latency, chunks, len(self.queue), self.clock_ns)
        self._decoded = n + n_extend > 0
        self._run(n, n_extend, cost, chunks.shape)

    def _mixes(self) -> bool:
        """Whether prompts may share the round with what decodes."""
        prefill = self._limits.prefill
        return prefill == "mixed" or (prefill == "last" and not self.decoder.sequences)

    def _run(self, n: int, n_extend: int, cost: Cost, prefill: Prefill) -> None:
        start_ns, (denoiser_s, context_s, round_s) = self.clock_ns, cost
        assert n or n_extend or prefill[0], "a round in which nothing happens"
        round_ns = int(round_s * 1e9 + 0.5)
        self.clock_ns = start_ns + round_ns
        self.rounds += 1
        self.kv_peak = max(self.kv_peak, self.cache.used)
        self.busy_ns += round_ns
        self.denoiser_s += denoiser_s
        shared = n_extend if self.decoder.blocks and not self._latency.one_forward else n + n_extend
        self.context_s[(shared > 0) + 2 * (prefill[0] > 0)] += context_s
        self._in_flight = True
        if self._observe is not None:
            passes = denoiser_s, context_s, n, n_extend, prefill
            state = len(self.queue), self.cache.used
            in_turn = self.decoder.in_turn
            self._observe(self.index, Round(start_ns, self.clock_ns, *passes, *state, in_turn=in_turn))

    def _take(self, claims: Iterable[tuple[Task, int]]) -> bool:
        """Give sequences the KV blocks they claim; returns whether something had to be preempted."""
        before, cache = self.preemptions, self.cache
        for seq, tokens in claims:
            while seq.request in self.running and cache.missing(seq.request, tokens) > cache.free:
                self._preempt()
            if seq.request in self.running:
                cache.grow(seq.request, tokens)
        return self.preemptions > before

    def _reserve(self, claims: Iterable[tuple[Task, int]]) -> None:
        """Give all sequences together what they claim."""
        left = list(claims)
        while sum(self.cache.missing(seq.request, tokens) for seq, tokens in left) > self.cache.free:
            self._preempt()
            left = [(seq, tokens) for seq, tokens in left if seq.request in self.running]
        for seq, tokens in left:  # the last token of a burst is computed in the next round
            self.cache.grow(seq.request, tokens, tokens - 1)

    def _has_room(self, budget: int) -> bool:
        """Room for the next chunk of the prompt in progress, which otherwise is preempted."""
        seq = self._partial
        if seq is None:
            return True
        if self.cache.missing(seq.request, min(seq.length, seq.position + budget)) <= self.cache.free:
            return True
        self._preempt()
        return False

    def _prefill(self, budget: int) -> PromptChunks:
        """Go on with the prompt in progress, then admit from the queue, within a budget of tokens."""
        chunks = PromptChunks(budget)
        while chunks.left > 0:
            seq = self._partial or (self._admit(chunks.left) if self.queue else None)
            if seq is None:
                break
            whole = chunks.add(seq)
            self.cache.grow(seq.request, seq.position)
            self._partial = None if whole else seq
            if whole:
                self._started.append(seq)
                self._prefilled.append(seq.request)
        return chunks

    def _admit(self, budget: int) -> Task | None:
        """The queue's head, if there are seats and memory for it (and budget, where prompts are not chunked)."""
        seq, cache = self.queue.head(), self.cache
        length = self.decoder.prefill_length(seq)
        if len(self.running) >= self._limits.seats or not cache.fits(seq.request, length):
            return None
        if not self._limits.chunked_prefill and length - cache.hits(seq.request, length) > budget:
            return None
        self.queue.take()
        self.running[seq.request] = seq
        self.seats_peak = max(self.seats_peak, len(self.running))
        seq.order, seq.length, seq.position = self._admissions, length, cache.admit(seq.request, length)
        self._admissions += 1
        self._records.admit(seq.request, self.clock_ns, self.index)
        return seq

    # ------------------------------------------------------------------ a sequence comes, leaves, is sent back

    def _start_all(self) -> None:
        for seq in self._started:
            self._start(seq)
        self._started.clear()

    def _start(self, seq: Task) -> None:
        self.queued_tokens -= seq.length
        seq.start_tick, seq.start_ns = len(self.tick_end_ns), self.clock_ns
        self.decoder.sequences[seq.request] = seq
        if self.decoder.start(seq, self.clock_ns):
            self._finish(seq)

    def _finish(self, seq: Task) -> None:
        self.decoder.finish(seq)
        self._leave(seq)
        self._records.finish(seq.request, self.clock_ns)
        if self._on_finish is not None:
            self._on_finish(seq.request, self.clock_ns)

    def _leave(self, seq: Task) -> None:
        del self.running[seq.request]
        del self.decoder.sequences[seq.request]
        self.cache.release(seq.request)
        times = seq.start_tick, len(self.tick_end_ns)
        self._records.add_segment(seq.request, seq.done, *times, self.index, seq.start_ns)

    def _preempt(self) -> None:
        """Send the latest admitted sequence back to the queue; it keeps its tokens and loses its cache."""
        seq = next(reversed(self.running.values()))
        if seq.request in self.decoder.sequences:
            self.decoder.lift(seq)
            self._leave(seq)
            self.queued_tokens += self.decoder.prefill_length(seq)
        else:
            del self.running[seq.request]
            self.cache.release(seq.request)
            if seq is self._partial:
                self._partial = None
        seq.order = -1
        self.queue.give_back(seq)
        self.preemptions += 1
        self._records.preemptions[seq.request] += 1
