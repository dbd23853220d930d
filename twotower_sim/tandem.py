"""A replica whose towers are servers in tandem: context servers and denoiser servers, each with a batch of its own.

A sequence goes from its context server to a denoiser server and back, block by block:

- a *context server* runs one pass after the other, each a forward of extends (longest waiting first) and prompt chunks.
  It admits requests as ``rounds.py`` does, and owns their keys, values and states until they finish;
- when a prompt is prefilled or a block extended, the Mamba state and the keys and values that the denoiser lacks go
  over the server's link, one after the other. A *blocking* transfer keeps the server from its next pass;
- a *denoiser server* runs one denoise pass after the other over all blocks that are there; a sequence whose block is
  done leaves at once (``fdfo``), for the extend or for good. The way back carries token ids and takes no time.

Each sequence is a transfer of its own; one that is preempted on its way still occupies the link. A sequence's denoiser
is the one with the fewest sequences (*sticky*: that stay there; *free*: with a block there or on the way) among those
with room, ties to where it is, then by index; free ones choose again for every block, and bring all their keys and
values where they are new. Without room anywhere a sequence waits; those who wait try again in their order before passes
start, once a denoiser has given memory back, and who becomes ready in between may find room first. The gamma of a block
is chosen when it arrives at its denoiser. On shortage a server preempts the latest admitted sequence that it holds; it
loses its memory on both sides. As many requests are admitted as the denoisers have seats, on each context server as
many as it has state slots; ``max_num_seqs`` bounds the sequences of one pass.

Order of events at one instant: passes and transfers that end, in the order in which they began; requests that arrive;
then passes that start, on context servers first, each kind by its index. Time is integer nanoseconds on SimPy's clock.
"""

from array import array
from collections.abc import Callable
from typing import Any

import simpy
from simpy.events import Event, EventPriority

from twotower_sim.decoders import Luck
from twotower_sim.kv_cache import PrefixCache
from twotower_sim.latency import NO_PREFILL, Latency, Prefill
from twotower_sim.records import Records
from twotower_sim.replica import Limits, PromptChunks, Round
from twotower_sim.requests import LATEST_NS
from twotower_sim.rounds import Task
from twotower_sim.servers import ContextServer, DenoiserServer, TandemTask

STARTS = EventPriority(2)  # after SimPy's own 0 and 1
ENDS = EventPriority(0)


class Tandem:
    """See the module's text. Runs by itself on a SimPy environment; ``submit`` is the only way in."""

    driven = False  # by its own events, not by the fleet

    def __init__(
        self,
        env: simpy.Environment,
        index: int,
        latency: Latency,
        limits: Limits,
        block_size: int,
        contexts: list[ContextServer],
        denoisers: list[DenoiserServer],
        luck: Luck,
        level: Callable[[int, int], int],
        records: Records,
        *,
        blocking: bool,
        sticky: bool,
        max_extends: int | None,
        on_finish: Callable[[int, int], None] | None = None,
        observe: Callable[[int, Round], None] | None = None,
    ) -> None:
        self.env, self.index = env, index
        self.contexts, self.denoisers = contexts, denoisers
        self.rounds = self.preemptions = self.kv_peak = 0
        self.busy_ns = 0  # while it has requests
        self.denoiser_s, self.context_s = 0.0, [0.0, 0.0, 0.0, 0.0]
        self.busy_context_ns = self.busy_denoiser_ns = 0
        self.tick_end_ns = array("q")  # ends of the segments of decodes
        self._latency, self._limits, self._size = latency, limits, block_size
        self._luck, self._level, self._records = luck, level, records
        self._blocking, self._sticky = blocking, sticky
        most = limits.max_num_batched_tokens // block_size
        self._most = min(limits.max_num_seqs, most, max_extends or most)
        self._on_finish, self._observe = on_finish, observe
        self._seats = sum(server.seats for server in denoisers)
        self._waiting: dict[int, TandemTask] = {}  # ready to be denoised, no denoiser has room
        self._admissions = 0
        self._since_ns = 0
        self._awake = self._freed = False

    # ------------------------------------------------------------------ from outside

    @property
    def clock_ns(self) -> int:
        return int(self.env.now)

    @property
    def running_requests(self) -> int:
        return sum(len(server.running) for server in self.contexts)

    @property
    def prefix_caches(self) -> list[PrefixCache]:
        return [server.cache for server in self.contexts if isinstance(server.cache, PrefixCache)]

    @property
    def outstanding_requests(self) -> int:
        return sum(len(server.running) + len(server.queue) for server in self.contexts)

    @property
    def outstanding_tokens(self) -> int:
        decoding = (seq for server in self.contexts for seq in server.running.values() if seq.start_tick >= 0)
        return sum(server.queued_tokens for server in self.contexts) + sum(map(self._tokens, decoding))

    @property
    def idle(self) -> bool:
        return not self.outstanding_requests

    @property
    def seats_peak(self) -> int:
        return max(server.seats_peak for server in self.contexts)

    def settle(self, now_ns: int) -> None:
        """Nothing to catch up with: events keep it up to date."""

    advance = settle

    def submit(self, seq: TandemTask, now_ns: int) -> None:
        """``seq`` goes to the context server with the fewest requests."""
        if self.idle:
            self._since_ns = now_ns
        seq.home = min(self.contexts, key=lambda server: len(server.running) + len(server.queue))
        seq.home.queue.add(seq)
        seq.home.queued_tokens += self._tokens(seq)
        self._wake()

    # ------------------------------------------------------------------ events

    def _at(self, delay_ns: int, priority: EventPriority, happen: Callable[..., None], *args: Any) -> None:
        if self.env.now > LATEST_NS:
            raise OverflowError
        event = Event(self.env)
        event._ok, event._value = True, None
        assert event.callbacks is not None
        event.callbacks.append(lambda _: happen(*args))
        self.env.schedule(event, priority=priority, delay=delay_ns)

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            self._at(0, STARTS, self._start_passes)

    def _ended(self) -> None:
        """The last thing that the end of a pass or transfer does: start passes now if this was all of this instant."""
        if self.env.peek() > self.env.now:
            self._start_passes()
        else:
            self._wake()

    def _start_passes(self) -> None:
        self._awake = False
        if self._freed:
            self._freed = False
            self._try_waiting()
        for context in self.contexts:
            sending = self._blocking and context.link_free_ns > self.clock_ns
            if not (context.busy or sending) and (context.due or context.partial or context.queue):
                self._context_pass(context)
        for denoiser in self.denoisers:
            if denoiser.present and not denoiser.busy:
                self._denoise_pass(denoiser)

    # ------------------------------------------------------------------ context servers

    def _context_pass(self, at: ContextServer) -> None:
        before = self.preemptions
        extends = [(seq, seq.order) for seq in self._extends(at)]
        prefill: Prefill = NO_PREFILL
        prompts: list[tuple[TandemTask, int]] = []
        if self.preemptions == before:
            prefill, prompts = self._prefill(at, self._limits.max_num_batched_tokens - len(extends) * self._size)
        if not extends and not prefill[0]:
            return
        context = sum(self._tokens(seq) for seq, _ in extends)
        context_s = self._latency.round(0, 0, len(extends), context, prefill)[1]
        length_ns = int(self._latency.host.around(max, context_s) * 1e9 + 0.5)
        at.busy = True
        self.rounds += 1
        self.kv_peak = max(self.kv_peak, at.cache.used)
        self.context_s[bool(extends) + 2 * (prefill[0] > 0)] += context_s
        self.busy_context_ns += length_ns
        self._at(length_ns, ENDS, self._context_pass_ends, at, extends, prompts)
        self._show(at, length_ns, context_s=context_s, extending=len(extends), prefill=prefill)

    def _extends(self, at: ContextServer) -> list[TandemTask]:
        """Blocks to append to the cache in the next pass, with memory for them, longest waiting first."""
        chosen: list[TandemTask] = []
        for seq in list(at.due.values()):
            if len(chosen) == self._most:
                break
            tokens = self._tokens(seq) + self._size
            while seq.request in at.due and at.cache.missing(seq.request, tokens) > at.cache.free:
                self._preempt(next(reversed(at.running.values())))
            if seq.request in at.due:
                at.cache.grow(seq.request, tokens)
            chosen = [of for of in (*chosen, seq) if of.request in at.due]
        for seq in chosen:
            del at.due[seq.request]
        return chosen

    def _prefill(self, at: ContextServer, budget: int) -> tuple[Prefill, list[tuple[TandemTask, int]]]:
        """Prompt chunks of the next pass, and the prompts it completes."""
        chunks, complete = PromptChunks(budget), []
        seq = at.partial
        if seq and at.cache.missing(seq.request, min(seq.length, seq.position + budget)) > at.cache.free:
            self._preempt(seq)
            return NO_PREFILL, []
        while chunks.left > 0:
            seq = at.partial or (self._admit(at, chunks.left) if at.queue else None)
            if seq is None:
                break
            whole = chunks.add(seq)
            at.cache.grow(seq.request, seq.position)
            at.partial = None if whole else seq
            if whole:
                complete.append((seq, seq.order))
        return chunks.shape, complete

    def _admit(self, at: ContextServer, budget: int) -> TandemTask | None:
        seq, cache = at.queue.head(), at.cache
        length, running = self._tokens(seq), sum(len(server.running) for server in self.contexts)
        if running >= self._seats or len(at.running) >= self._limits.state_slots or not cache.fits(seq.request, length):
            return None
        if not self._limits.chunked_prefill and length - cache.hits(seq.request, length) > budget:
            return None
        at.queue.take()
        at.running[seq.request] = seq
        at.seats_peak = max(at.seats_peak, len(at.running))
        seq.order, seq.length, seq.position = self._admissions, length, cache.admit(seq.request, length)
        self._admissions += 1
        self._records.admit(seq.request, self.clock_ns, self.index)
        return seq

    def _context_pass_ends(self, at: ContextServer, extends: list, prompts: list) -> None:
        now, at.busy = self.clock_ns, False
        ready = []
        for seq, order in extends:
            if seq.order == order:
                seq.extending = False
                seq.done += 1
                ready.append(seq)
        for seq, order in prompts:
            if seq.order == order:
                at.queued_tokens -= seq.length
                self._records.prefilled(seq.request, now)
                seq.start_tick, seq.start_ns = 0, now
                ready.append(seq)
        for seq in ready:
            seq.ready_ns = now
            if seq.order >= 0:  # else one before it took its memory
                self._send(seq)
        self._ended()

    # ------------------------------------------------------------------ from context to denoiser

    def _send(self, seq: TandemTask) -> None:
        """``seq`` is ready for its next block: choose a denoiser and send what that lacks, or wait for room."""
        to = self._choose(seq)
        if to is None:
            self._waiting[seq.request] = seq
            return
        tokens = self._tokens(seq)
        lacking = self._size if seq.desk is to and seq.request in to.holds else tokens
        if seq.desk is not None and seq.desk is not to:
            self._forget(seq)
        seq.desk = to
        to.assigned[seq.request] = to.holds[seq.request] = seq
        while seq.request in to.holds and to.cache.missing(seq.request, tokens) > to.cache.free:
            self._preempt(max(to.holds.values(), key=lambda other: other.order))
        if seq.request not in to.holds:
            return
        to.cache.grow(seq.request, tokens)
        assert seq.home is not None
        sent_ns = int(self._latency.transfer(1, lacking) * 1e9 + 0.5)
        seq.home.link_free_ns = max(seq.home.link_free_ns, self.clock_ns) + sent_ns
        self.busy_context_ns += self._blocking * sent_ns
        self._at(seq.home.link_free_ns - self.clock_ns, ENDS, self._arrives, seq, seq.order)

    def _choose(self, seq: TandemTask) -> DenoiserServer | None:
        here = seq.desk
        if here is not None and self._sticky:
            return here
        tokens = self._tokens(seq)

        def has_room(server: DenoiserServer) -> bool:
            return server is here or (
                len(server.holds) < server.seats and server.cache.missing(seq.request, tokens) <= server.cache.free
            )

        able = [server for server in self.denoisers if has_room(server)]
        return min(able, key=lambda server: (len(server.assigned), server is not here, server.index), default=None)

    def _arrives(self, seq: TandemTask, order: int) -> None:
        if seq.order == order and seq.desk is not None:
            seq.level = self._level(seq.request, sum(len(server.queue) for server in self.contexts))
            seq.left = self._luck.steps(seq.request, seq.level)[seq.done]
            seq.desk.present[seq.request] = seq
            seq.desk.context += self._tokens(seq)
        self._ended()

    def _forget(self, seq: TandemTask) -> None:
        """Its denoiser gives back what it holds of ``seq``."""
        desk, seq.desk = seq.desk, None
        if desk is not None:
            self._freed = True
            desk.cache.release(seq.request)
            desk.holds.pop(seq.request, None)
            desk.assigned.pop(seq.request, None)
            if desk.present.pop(seq.request, None):
                desk.context -= self._tokens(seq)

    def _try_waiting(self) -> None:
        """Memory was given back: those who wait for a denoiser try again, in their order."""
        waiting, self._waiting = self._waiting, {}
        for seq in waiting.values():
            if seq.order >= 0:  # else one before it took its memory
                self._send(seq)

    # ------------------------------------------------------------------ denoiser servers

    def _denoise_pass(self, at: DenoiserServer) -> None:
        batch = [(seq, seq.order) for seq in at.present.values()]
        denoiser_s = self._latency.decode(len(batch), at.context, 0, 0)[0]
        length_ns = int(self._latency.host.around(max, denoiser_s) * 1e9 + 0.5)
        at.busy = True
        self.rounds += 1
        self.kv_peak = max(self.kv_peak, at.cache.used)
        self.denoiser_s += denoiser_s
        self.busy_denoiser_ns += length_ns
        self._at(length_ns, ENDS, self._denoise_pass_ends, at, batch)
        self._show(at, length_ns, denoiser_s, decoding=len(batch))

    def _denoise_pass_ends(self, at: DenoiserServer, batch: list) -> None:
        at.busy = False
        for seq, order in batch:
            self._records.nfe[seq.request] += 1
            if seq.order == order:
                seq.left -= 1
                if not seq.left:
                    self._block_is_done(seq, at)
        self._ended()

    def _block_is_done(self, seq: TandemTask, at: DenoiserServer) -> None:
        steps = self._luck.steps(seq.request, seq.level)
        self._records.log(seq.request, seq.done, steps[seq.done], seq.ready_ns, self.clock_ns, seq.level)
        del at.present[seq.request]
        at.context -= self._tokens(seq)
        if seq.done == len(steps) - 1:
            self._finish(seq)
            return
        if not self._sticky:
            del at.assigned[seq.request]
        assert seq.home is not None
        seq.extending = True
        seq.home.due[seq.request] = seq

    # ------------------------------------------------------------------ a sequence leaves, is sent back

    def _tokens(self, seq: Task) -> int:
        """Prompt and whole blocks: what the next denoise pass attends to."""
        return seq.input_tokens + seq.done * self._size

    def _finish(self, seq: TandemTask) -> None:
        self._leave(seq)
        self._records.finish(seq.request, self.clock_ns)
        if self.idle:
            self.busy_ns += self.clock_ns - self._since_ns
        if self._on_finish is not None:
            self._on_finish(seq.request, self.clock_ns)

    def _leave(self, seq: TandemTask) -> None:
        home = seq.home
        assert home is not None
        del home.running[seq.request]
        home.due.pop(seq.request, None)
        home.cache.release(seq.request)
        self._forget(seq)
        self._waiting.pop(seq.request, None)
        if seq.start_tick >= 0:
            end = len(self.tick_end_ns)
            self.tick_end_ns.append(self.clock_ns)
            self._records.add_segment(seq.request, seq.done, end, end + 1, self.index, seq.start_ns)
            seq.start_tick = -1

    def _preempt(self, seq: TandemTask) -> None:
        """Send ``seq`` back to its queue; it keeps its tokens, and a block whose extend pass is not done counts."""
        home = seq.home
        assert home is not None
        if home.partial is seq:
            home.partial = None
        if seq.start_tick >= 0:
            self._leave(seq)
            seq.done += seq.extending
            home.queued_tokens += self._tokens(seq)
        else:
            self._leave(seq)
        seq.extending, seq.order = False, -1
        home.queue.give_back(seq)
        self.preemptions += 1
        self._records.preemptions[seq.request] += 1
        self._wake()

    def _show(
        self,
        at: ContextServer | DenoiserServer,
        length_ns: int,
        denoiser_s: float = 0.0,
        context_s: float = 0.0,
        decoding: int = 0,
        extending: int = 0,
        prefill: Prefill = NO_PREFILL,
    ) -> None:
        if self._observe is None:
            return
        now, waiting = self.clock_ns, sum(len(of.queue) for of in self.contexts)
        server = at.index + (len(self.contexts) if isinstance(at, DenoiserServer) else 0)
        passes = denoiser_s, context_s, decoding, extending, prefill
        self._observe(self.index, Round(now, now + length_ns, *passes, waiting, at.cache.used, server))
