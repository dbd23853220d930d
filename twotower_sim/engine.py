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

These are the rules of vLLM-like engines. With ``prefill_first``, a round that can prefill does only that.

**Exactness.** The tick (index of a round in which sequences decode) is a virtual clock: see
``schedule.py``. A round therefore costs O(1) whatever the batch, and stretches of rounds in which only
time passes are computed as one array operation (``_glide``). The clock counts integer nanoseconds, so
sums do not depend on their order and a tie is a tie. The tests hold the result bit for bit against a
naive engine that loops over the batch.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from twotower_sim.admission import Queue
from twotower_sim.latency import Latency
from twotower_sim.records import Records
from twotower_sim.schedule import Rings, Schedule, Sequence

GLIDE_ROUNDS = 24
"""Shortest stretch that is worth an array operation (about 15 us, ten single rounds)."""
GLIDE_AT_MOST = 4096
FOREVER_NS = 1 << 62


@dataclass(frozen=True)
class Limits:
    """What bounds a replica. Tokens count per round; memory is what all sequences share."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_blocks: int
    kv_block_tokens: int
    state_slots: int
    chunked_prefill: bool = True
    prefill_first: bool = False


class Prefill(NamedTuple):
    """The prompt side of a round: tokens, query-key pairs, sequences."""

    tokens: int = 0
    pairs: int = 0
    sequences: int = 0


NO_PREFILL = Prefill()


class Round(NamedTuple):
    """One round as an observer sees it."""

    start_ns: int
    end_ns: int
    denoiser_s: float
    context_s: float
    decoding: int
    extending: int
    prefill: Prefill
    waiting: int
    kv_blocks: int


class Engine:
    """See the module's text. ``submit`` and ``advance`` are the only ways in; time passes in ``advance``."""

    __slots__ = (
        "index", "clock_ns", "tick", "idle", "running", "queue", "decoding", "context", "queued_tokens",
        "kv_used", "kv_peak", "seats_peak", "tick_end_ns", "rounds", "preemptions", "busy_ns", "denoiser_s",
        "context_s", "_latency", "_schedule", "_limits", "_records", "_on_finish", "_observe", "_seats",
        "_rings", "_views", "_ending", "_started", "_partial", "_blocked", "_admissions", "_last_round_ns",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        latency: Latency,
        schedule: Schedule,
        limits: Limits,
        queue: Queue,
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
        self._seats = min(limits.max_num_seqs, limits.state_slots)
        self._rings = Rings.of(longest_decode_ticks)
        self._views = self._rings.views()
        self._ending: list[tuple[int, int, Sequence]] = []  # heap of (finish tick, admission, sequence)
        self._started: list[Sequence] = []  # completed their prefill in the latest round
        self._partial: Sequence | None = None  # the one prompt in progress, last in `running`
        self._blocked = False  # the head waits for a seat or memory: useless to look before something leaves
        self._admissions = 0
        self._last_round_ns = FOREVER_NS

    # ------------------------------------------------------------------ from outside

    @property
    def outstanding_requests(self) -> int:
        return len(self.running) + len(self.queue)

    @property
    def outstanding_tokens(self) -> int:
        """Tokens to prefill plus tokens in the context of decoding sequences: all that a router may know."""
        return self.queued_tokens + self.context

    def submit(self, seq: Sequence, now_ns: int) -> None:
        self.settle(now_ns)
        if self.idle:
            self.idle, self.clock_ns = False, now_ns
        head = self.queue.head() if len(self.queue) else None
        self.queue.push(seq)
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
            self._end_round()
            if self.idle:
                return
            if not self._glide(until_ns):
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
        self.idle = not self.running and not len(self.queue)

    def _round(self) -> None:
        limits, tick = self._limits, self.tick & self._rings.mask
        prefill = NO_PREFILL
        if limits.prefill_first:
            prefill = self._prefill(limits.max_num_batched_tokens)
            if prefill.tokens:
                return self._run(0, 0, 0, 0, prefill)
        budget = limits.max_num_batched_tokens - self._schedule.pass_tokens * self.decoding
        if not self._take_kv(tick, budget) and not limits.prefill_first:
            prefill = self._prefill(budget)
        n_extend, extend_context = self._rings.extends[tick], self._rings.extend_context[tick]
        self._rings.extends[tick] = self._rings.extend_context[tick] = 0
        self._run(self.decoding - n_extend, self.context - extend_context, n_extend, extend_context, prefill)
        self.tick += 1
        self.tick_end_ns.append(self.clock_ns)
        self.context += self._schedule.growth * self.decoding + self._schedule.pass_tokens * n_extend

    def _run(self, n: int, context: int, n_extend: int, extend_context: int, prefill: Prefill) -> None:
        start_ns = self.clock_ns
        denoiser_s, context_s, round_s = self._latency.one(n, context, n_extend, extend_context, *prefill)
        round_ns = int(round_s * 1e9 + 0.5)
        self.clock_ns = start_ns + round_ns
        self.rounds += 1
        self.busy_ns += round_ns
        self._last_round_ns = round_ns
        self.denoiser_s += denoiser_s
        shared = n if self._schedule.growth else n_extend
        self.context_s[(shared > 0) + 2 * (prefill.tokens > 0)] += context_s
        if self._observe is not None:
            round_ = Round(start_ns, self.clock_ns, denoiser_s, context_s, n, n_extend, prefill, len(self.queue), self.kv_used)
            self._observe(self.index, round_)

    def _take_kv(self, tick: int, budget: int) -> bool:
        """Give decoding sequences the KV blocks they need now; returns whether it had to preempt."""
        growth, preempted = self._rings.kv_growth, False
        while self.kv_used + growth[tick] + self._chunk_blocks(budget) > self._limits.kv_blocks:
            self._preempt()
            preempted = True
        self._hold(growth[tick])
        growth[tick] = 0
        return preempted

    def _prefill(self, budget: int) -> Prefill:
        """Go on with the prompt in progress, then admit from the queue, within a budget of tokens."""
        tokens = pairs = sequences = 0
        while budget > tokens:
            seq = self._partial or self._admit(budget - tokens, alone=not tokens)
            if seq is None:
                break
            chunk = min(seq.length - seq.position, budget - tokens)
            self._hold(self._blocks(seq.position + chunk) - self._blocks(seq.position))
            tokens += chunk
            pairs += chunk * seq.position + chunk * (chunk + 1) // 2
            sequences += 1
            seq.position += chunk
            self._partial = seq if seq.position < seq.length else None
            if self._partial is None:
                self._started.append(seq)
        return Prefill(tokens, pairs, sequences) if tokens else NO_PREFILL

    def _admit(self, budget: int, alone: bool) -> Sequence | None:
        """The queue's head, if there are seats and memory for it (and budget, where prompts are not chunked)."""
        if self._blocked or not len(self.queue):
            return None
        seq = self.queue.head()
        length = self._schedule.prefill_length(seq)
        if len(self.running) >= self._seats or self._blocks(length) > self._limits.kv_blocks - self.kv_used:
            self._blocked = True
            return None
        if length > budget and not self._limits.chunked_prefill:
            self._blocked = alone  # in company it may fit into the next round
            return None
        self.queue.pop()
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
        if self._schedule.emits_at_prefill:
            seq.done += 1
        seq.start_tick, seq.start_ns = self.tick, self.clock_ns
        self._schedule.place(seq, self._rings)
        self.decoding += 1
        self.context += self._schedule.context(seq, self.tick)
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
        self.queue.push_back(seq)
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

    # ------------------------------------------------------------------ many rounds

    def _glide(self, until_ns: int) -> bool:
        """Run a stretch of rounds in which nothing but time passes, as one array operation.

        False where there is none that is worth it: the next round is then run alone.
        """
        if self._partial or (len(self.queue) and not self._blocked) or self._observe or not self._ending:
            return False
        ahead = self._ending[0][0] - self.tick
        if ahead < GLIDE_ROUNDS or until_ns - self.clock_ns < GLIDE_ROUNDS * self._last_round_ns:
            return False
        at = self.tick & self._rings.mask
        rounds = min(ahead, GLIDE_AT_MOST, self._rings.mask + 1 - at)
        rounds = min(rounds, (until_ns - self.clock_ns) * 5 // (4 * self._last_round_ns or 1) + 8)
        due = slice(at, at + rounds)
        extends, extend_context, growth = (view[due] for view in self._views)
        if self._schedule.growth:
            context = self.context + self.decoding * _INDEX[:rounds]
        else:
            context = self.context + self._schedule.pass_tokens * (np.cumsum(extends) - extends)
        denoiser_s, context_s, round_s = self._latency.many(
            self.decoding - extends, context - extend_context, extends, extend_context
        )
        clock_ns = np.cumsum(np.concatenate(((self.clock_ns,), (round_s * 1e9 + 0.5).astype(np.int64))))
        kv_used = self.kv_used + np.cumsum(growth)
        run = int(np.searchsorted(clock_ns[:-1], until_ns))
        if kv_used[-1] > self._limits.kv_blocks:
            run = min(run, int(np.searchsorted(kv_used, self._limits.kv_blocks, side="right")))
        if run == 0:
            return False
        self._hold(int(kv_used[run - 1]) - self.kv_used)
        self.context = int(context[run - 1]) + self._schedule.growth * self.decoding
        self.context += self._schedule.pass_tokens * int(extends[run - 1])
        for ring in (extends, extend_context, growth):
            ring[:run] = 0
        self.tick_end_ns.frombytes(clock_ns[1 : run + 1].tobytes())
        self.busy_ns += int(clock_ns[run]) - self.clock_ns
        self.denoiser_s += float(denoiser_s[:run].sum())
        self.context_s[1] += float(context_s[:run].sum())
        self._last_round_ns = int(clock_ns[run] - clock_ns[run - 1])
        self.clock_ns = int(clock_ns[run])
        self.tick += run
        self.rounds += run
        return True


_INDEX = np.arange(GLIDE_AT_MOST)
