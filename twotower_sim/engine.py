"""One replica's engine: continuous batching of two-tower or autoregressive decoding, exact and fast.

In every round each decoding sequence takes one pass (a denoise or extend pass, or one autoregressive
token) and prompts are prefilled in chunks beside them. The order of a round that starts at time ``t``:

1. the round before it ends: sequences finish, completed prefills start to decode;
2. arrivals with time <= t are in the queue;
3. decoding sequences take the KV blocks they need now, in admission order, then the prompt in progress
   takes those of its next chunk; on shortage the latest admitted sequence is preempted: it frees
   everything, keeps its tokens, and is recomputed when it is admitted again;
4. unless something was preempted, the queue's head is admitted while seats, token budget and memory
   for its whole prompt are there;
5. the round takes what the latency model says.

These are the rules of vLLM-like engines. With ``prefill`` "first", a round that can prefill does only that; with
"last", prompts wait until nothing decodes.

**Exactness.** The tick (index of a round in which sequences decode) is a virtual clock: see
``schedule.py``. A round therefore costs O(1) whatever the batch, and stretches of rounds in which only
time passes are computed as one array operation (``_glide``). The clock counts integer nanoseconds, so
sums do not depend on their order and a tie is a tie. The tests hold the result bit for bit against a
naive engine that loops over the batch.
"""

from array import array
from collections.abc import Callable
from heapq import heappop, heappush

import numpy as np

from twotower_sim.admission import Queue
from twotower_sim.latency import NO_PREFILL, Latency, Prefill
from twotower_sim.records import Records
from twotower_sim.replica import Limits, PromptChunks, Round
from twotower_sim.schedule import EXTEND_CONTEXT, EXTEND_SHIFT, Rings, Schedule, Sequence

GLIDE_ROUNDS = 24
"""Shortest stretch that is worth an array operation, which costs as much as a dozen single rounds or so."""
GLIDE_AT_MOST = 4096
FOREVER_NS = 1 << 62


class Engine:
    """See the module's text. ``submit`` and ``advance`` are the only ways in; time passes in ``advance``."""

    driven = True
    prefix_caches = ()

    __slots__ = (
        "index", "clock_ns", "tick", "idle", "running", "queue", "decoding", "context", "queued_tokens",
        "kv_used", "kv_peak", "seats_peak", "tick_end_ns", "rounds", "preemptions", "busy_ns", "denoiser_s",
        "context_s", "_latency", "_schedule", "_limits", "_records", "_on_finish", "_observe", "_seats",
        "_last", "_wake_ns", "_rings", "_ending", "_started", "_partial", "_blocked", "_admissions", "_decode_round_ns",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        latency: Latency,
        schedule: Schedule,
        limits: Limits,
        queue: Queue[Sequence],
        records: Records,
        longest_decode_ticks: int,
        on_finish: Callable[[int, int], None] | None = None,
        observe: Callable[[int, Round], None] | None = None,
    ) -> None:
        self.index = index
        self.clock_ns = 0  # end of the latest round, start of the next
        self.tick = 0  # of the next decode round
        self.idle = True
        self.running: dict[int, Sequence] = {}  # by request, in admission order: decoding or in prefill
        self.queue = queue
        self.decoding = 0
        self.context = 0  # tokens that one pass of every decoding sequence attends to
        self.queued_tokens = 0  # tokens to prefill, of waiting sequences and of those in prefill
        self.kv_used = self.kv_peak = self.seats_peak = 0
        self.tick_end_ns = array("q")  # of every tick
        self.rounds = 0
        self.preemptions = 0
        self.busy_ns = 0
        self.denoiser_s = 0.0
        self.context_s = [0.0, 0.0, 0.0, 0.0]  # by what shares the forward: see latency.PASS_NAMES
        self._latency, self._schedule, self._limits, self._records = latency, schedule, limits, records
        self._on_finish, self._observe = on_finish, observe
        self._wake_ns = round(latency.host.wake_s * 1e9)
        self._seats, self._last = limits.seats, limits.prefill == "last"
        self._rings = Rings(longest_decode_ticks, schedule.blocks_per_extend)
        self._ending: list[tuple[int, int, Sequence]] = []  # heap of (finish tick, admission, sequence)
        self._started: list[Sequence] = []  # completed their prefill in the latest round
        self._partial: Sequence | None = None  # the one prompt in progress, last in `running`
        self._blocked = False  # the head waits for a seat or memory: useless to look before something leaves
        self._admissions = 0
        self._decode_round_ns = FOREVER_NS  # latest round without prompts: how far a stretch may reach

    # ------------------------------------------------------------------ from outside

    @property
    def running_requests(self) -> int:
        return len(self.running)

    @property
    def outstanding_requests(self) -> int:
        return len(self.running) + len(self.queue)

    @property
    def outstanding_tokens(self) -> int:
        """Tokens to prefill, plus the context of decoding sequences with what the round in flight adds to it: all that
        a router may know."""
        return self.queued_tokens + self.context

    def submit(self, seq: Sequence, now_ns: int) -> None:
        self.settle(now_ns)
        if self.idle:
            slept = now_ns > self.clock_ns
            self.idle, self.clock_ns = False, now_ns + slept * self._wake_ns
        head = self.queue.head() if self.queue else None
        self.queue.add(seq)
        if self.queue.head() is not head:
            self._blocked = False
        self.queued_tokens += self._schedule.prefill_length(seq)

    def settle(self, now_ns: int) -> None:
        """Show the state at ``now_ns``: rounds that start before it have run, one that ends at it has ended."""
        self.advance(now_ns)
        if self.clock_ns <= now_ns:
            self._end_round()

    def advance(self, until_ns: int) -> None:
        """Run every round that starts before ``until_ns``."""
        while self.clock_ns < until_ns:
            if self.idle or self._started or (self._ending and self._ending[0][0] <= self.tick):
                self._end_round()
                if self.idle:
                    return
            prompts = self._partial or (self.queue and not self._blocked and (not self._last or not self.decoding))
            if prompts or not self._ending or self._observe or not self._decode(until_ns):
                self._round()

    # ------------------------------------------------------------------ one round

    def _end_round(self) -> None:
        ending = self._ending
        while ending and ending[0][0] <= self.tick:
            _, admission, seq = heappop(ending)
            if seq.order == admission:  # else it was preempted since
                self._finish(seq)
        for seq in self._started:
            self._start(seq)
        self._started.clear()
        self.idle = not self.running and not self.queue

    def _round(self) -> None:
        limits, schedule, at = self._limits, self._schedule, self.tick & self._rings.mask
        prefill = NO_PREFILL
        if limits.prefill == "first":
            prefill = self._prefill(limits.max_num_batched_tokens)
            if prefill[0]:
                self._run(0, 0, 0, 0, prefill)
                return
        budget = limits.max_num_batched_tokens - schedule.pass_tokens * self.decoding
        mixes = limits.prefill == "mixed" or (self._last and not self.decoding)
        if not self._take_kv(at, budget if mixes else 0) and mixes:
            prefill = self._prefill(budget)
        due = self._rings.passes[at]
        n_extend, extend_context = due >> EXTEND_SHIFT, due & EXTEND_CONTEXT
        self._rings.passes[at] = self._rings.growth[at] = 0
        self._run(self.decoding - n_extend, self.context - extend_context, n_extend, extend_context, prefill)
        self.tick += 1
        self.tick_end_ns.append(self.clock_ns)
        self.context += schedule.growth * self.decoding + schedule.pass_tokens * n_extend

    def _run(self, n: int, context: int, n_extend: int, extend_context: int, prefill: Prefill) -> None:
        start_ns = self.clock_ns
        denoiser_s, context_s, round_s = self._latency.round(n, context, n_extend, extend_context, prefill)
        round_ns = int(round_s * 1e9 + 0.5)
        self.clock_ns = start_ns + round_ns
        self.rounds += 1
        self.busy_ns += round_ns
        if not prefill[0]:
            self._decode_round_ns = round_ns
        self.denoiser_s += denoiser_s
        shared = n_extend if self._schedule.blocks and not self._latency.one_forward else n + n_extend
        self.context_s[(shared > 0) + 2 * (prefill[0] > 0)] += context_s
        if self._observe is not None:
            passes = denoiser_s, context_s, n, n_extend, prefill
            self._observe(self.index, Round(start_ns, self.clock_ns, *passes, len(self.queue), self.kv_used))

    def _take_kv(self, at: int, budget: int) -> bool:
        """Give decoding sequences the KV blocks they need now, with room left for the prompt in progress; returns
        whether it had to preempt."""
        preempted = False
        while self.kv_used + (blocks := self._due_blocks(at)) + self._chunk_blocks(budget) > self._limits.kv_blocks:
            self._preempt()
            preempted = True
        self._hold(blocks)
        return preempted

    def _due_blocks(self, at: int) -> int:
        rings = self._rings
        return rings.growth[at] + rings.blocks_per_extend * (rings.passes[at] >> EXTEND_SHIFT)

    def _prefill(self, budget: int) -> Prefill:
        """Go on with the prompt in progress, then admit from the queue, within a budget of tokens."""
        chunks = PromptChunks(budget)
        while chunks.left > 0:
            seq = self._partial
            if seq is None and self.queue and not self._blocked:
                seq = self._admit(chunks.left, alone=not chunks.tokens)
            if seq is None:
                break
            done = seq.position
            whole = chunks.add(seq)
            self._hold(self._blocks(seq.position) - self._blocks(done))
            self._partial = None if whole else seq
            if whole:
                self._started.append(seq)
        return chunks.shape

    def _admit(self, budget: int, alone: bool) -> Sequence | None:
        """The queue's head, if there are seats and memory for it (and budget, where prompts are not chunked)."""
        seq = self.queue.head()
        length = self._schedule.prefill_length(seq)
        if len(self.running) >= self._seats or self._blocks(length) > self._limits.kv_blocks - self.kv_used:
            self._blocked = True
            return None
        if length > budget and not self._limits.chunked_prefill:
            self._blocked = alone  # in company it may fit into the next round
            return None
        self.queue.take()
        self.running[seq.request] = seq
        self.seats_peak = max(self.seats_peak, len(self.running))
        seq.order, seq.length, seq.position = self._admissions, length, 0
        self._admissions += 1
        self._records.admit(seq.request, self.clock_ns, self.index)
        return seq

    # ------------------------------------------------------------------ a sequence comes, leaves, is sent back

    def _start(self, seq: Sequence) -> None:
        """The prompt is in the cache: decode from this tick on."""
        self.queued_tokens -= seq.length
        self._records.prefilled(seq.request, self.clock_ns)
        if not self._schedule.blocks:  # the prefill's last position gives the first token
            seq.done += 1
        seq.start_tick, seq.start_ns = self.tick, self.clock_ns
        self._schedule.place(seq, self._rings)
        self.decoding += 1
        self.context += seq.length + self._schedule.growth
        if seq.finish_tick == self.tick:
            self._finish(seq)
        else:
            heappush(self._ending, (seq.finish_tick, seq.order, seq))

    def _finish(self, seq: Sequence) -> None:
        tokens = self._schedule.peak_tokens(seq.input_tokens, seq.output_tokens)
        self.kv_used -= self._blocks(tokens)
        self.context -= tokens + self._schedule.growth
        self._leave(seq)
        self._records.finish(seq.request, self.clock_ns)
        if self._on_finish is not None:
            self._on_finish(seq.request, self.clock_ns)

    def _preempt(self) -> None:
        """Send the latest admitted sequence back to the queue; it keeps its tokens and loses its cache."""
        seq = next(reversed(self.running.values()))
        if seq is self._partial:
            self.kv_used -= self._blocks(seq.position)
            self._partial = None
            del self.running[seq.request]
            self._blocked = False
        else:
            self.kv_used -= self._blocks(self._schedule.kv_tokens(seq, self.tick))
            self.context -= self._schedule.context(seq, self.tick)
            self._schedule.lift(seq, self._rings, self.tick)
            self._leave(seq)
            seq.done = self._schedule.progress(seq, self.tick)
            self.queued_tokens += self._schedule.prefill_length(seq)
        seq.order = -1
        self.queue.give_back(seq)
        self.preemptions += 1
        self._records.preemptions[seq.request] += 1

    def _leave(self, seq: Sequence) -> None:
        del self.running[seq.request]
        self.decoding -= 1
        self._blocked = False
        self._records.add_segment(seq.request, seq.done, seq.start_tick, self.tick, self.index, seq.start_ns)

    # ------------------------------------------------------------------ memory

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._limits.kv_block_tokens)

    def _chunk_blocks(self, budget: int) -> int:
        """KV blocks that the next chunk of the prompt in progress takes."""
        seq = self._partial
        if seq is None:
            return 0
        return self._blocks(min(seq.length, seq.position + budget)) - self._blocks(seq.position)

    def _hold(self, blocks: int) -> None:
        self.kv_used += blocks
        if self.kv_used > self.kv_peak:
            self.kv_peak = self.kv_used

    # ------------------------------------------------------------------ rounds in which only time passes

    def _decode(self, until_ns: int) -> bool:
        """Run rounds without prompts until something changes; False if the next one lacks memory."""
        ahead = self._ending[0][0] - self.tick
        left_ns, round_ns = until_ns - self.clock_ns, self._decode_round_ns
        if ahead < GLIDE_ROUNDS or left_ns < GLIDE_ROUNDS * round_ns:
            return self._step(ahead, until_ns)
        to_edge = self._rings.mask + 1 - (self.tick & self._rings.mask)
        return self._glide(min(ahead, to_edge, GLIDE_AT_MOST, left_ns * 5 // (4 * round_ns or 1) + 8), until_ns)

    def _step(self, ahead: int, until_ns: int) -> bool:
        """The next ``ahead`` rounds at most, one by one."""
        decode, ended, free = self._latency.decode, self.tick_end_ns.append, self._limits.kv_blocks - self.kv_used
        passes, growth, mask = self._rings.passes, self._rings.growth, self._rings.mask
        per_extend, pass_tokens = self._rings.blocks_per_extend, self._schedule.pass_tokens
        n, context, clock_ns, gained = self.decoding, self.context, self.clock_ns, self._schedule.growth * self.decoding
        denoised_s = context_s = 0.0
        taken, start, tick = 0, self.tick, self.tick
        while clock_ns < until_ns and tick < start + ahead:
            at = tick & mask
            due, blocks = passes[at], growth[at]
            n_extend, extend_context = due >> EXTEND_SHIFT, due & EXTEND_CONTEXT
            if due or blocks:
                taken += blocks + per_extend * n_extend
                if taken > free:
                    taken -= blocks + per_extend * n_extend
                    break
                passes[at] = growth[at] = 0
            denoise_s, forward_s, round_s = decode(n - n_extend, context - extend_context, n_extend, extend_context)
            clock_ns += int(round_s * 1e9 + 0.5)
            ended(clock_ns)
            context += gained + pass_tokens * n_extend
            denoised_s += denoise_s
            context_s += forward_s
            tick += 1
        if tick == start:
            return False
        self._hold(taken)
        self._decode_round_ns = (clock_ns - self.clock_ns) // (tick - start)
        self._passed(tick - start, clock_ns, context, denoised_s, context_s)
        return True

    def _glide(self, rounds: int, until_ns: int) -> bool:
        """The next ``rounds`` rounds at most, as one array operation: as far as the latency model knows them."""
        at = self.tick & self._rings.mask
        passes, context = self._schedule.ahead(self._rings, at, rounds, self.context, self.decoding)
        denoiser_s, context_s, round_s = self._latency.decode_many(*passes)
        unknown = np.isnan(round_s)
        if unknown[0]:  # and likely more: looking ahead again for every round would be dear
            return self._step(rounds, until_ns)
        if unknown.any():
            rounds = int(unknown.argmax())
        clock_ns = np.empty(rounds + 1, np.int64)
        clock_ns[0], clock_ns[1:] = self.clock_ns, round_s[:rounds] * 1e9 + 0.5
        np.add.accumulate(clock_ns, out=clock_ns)
        if clock_ns.min() < self.clock_ns:
            raise OverflowError
        run = int(clock_ns[:-1].searchsorted(until_ns))
        kv_blocks = self._rings.kv_blocks(at, run)
        blocks, free = int(kv_blocks.sum()), self._limits.kv_blocks - self.kv_used
        if blocks > free:
            run = int(kv_blocks.cumsum().searchsorted(free, side="right"))
            blocks = int(kv_blocks[:run].sum())
        if not run:
            return False
        self._hold(blocks)
        self._rings.clear(at, run)
        self.tick_end_ns.frombytes(clock_ns[1 : run + 1].tobytes())
        self._decode_round_ns = int(clock_ns[run] - clock_ns[run - 1])
        denoised_s = float(np.sum(denoiser_s[:run])) if np.ndim(denoiser_s) else 0.0
        self._passed(run, int(clock_ns[run]), int(context[run - 1]), denoised_s, float(context_s[:run].sum()))
        return True

    def _passed(self, rounds: int, clock_ns: int, context: int, denoiser_s: float, context_s: float) -> None:
        self.busy_ns += clock_ns - self.clock_ns
        self.clock_ns, self.context = clock_ns, context
        self.tick += rounds
        self.rounds += rounds
        self.denoiser_s += denoiser_s
        self.context_s[1] += context_s
