"""The naive towers in tandem: a heap of events, and everything about a server is looked for among all sequences.

Written from the text of ``tandem.py``; shares nothing with it but the latency.
"""

from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

ENDS, ARRIVES, STARTS = range(3)  # order of events at one instant


@dataclass(eq=False)
class Server:
    index: int
    kv_blocks: int
    seats: int
    busy: bool = False
    queue: list = field(default_factory=list)  # of a context server
    link_free: int = 0  # of a context server


@dataclass(eq=False)
class Seq:
    request: int
    input_tokens: int
    blocks: int
    state: str = "queued"  # prefill, ready, waiting, sent, denoise, due, extend
    order: int = -1  # of its latest admission
    block: int = 0  # under work
    left: int = 0
    level: int = 0
    ready: int = 0
    computed: int = 0
    target: int = 0
    home: Server | None = None
    held: int = 0  # KV blocks at home
    desk: Server | None = None
    lent: int = 0  # KV blocks at the desk


@dataclass
class NaiveTandem:
    latency: object
    limits: object
    block_size: int
    contexts: list
    denoisers: list
    steps: object  # (request, level) to the steps of its blocks
    level: object  # (request, waiting) to a level
    blocking: bool
    sticky: bool
    max_extends: int | None
    shortest_prompt: bool
    on_finish: object = None
    clock: int = 0
    rounds: int = 0
    peak: int = 0
    waits: int = 0  # for a denoiser
    moves: int = 0  # from one denoiser to another
    lost: int = 0  # preemptions for want of memory on a denoiser

    def __post_init__(self):
        self.events, self.number, self.admissions = [], count(), count()
        self.everyone = []  # that arrived and have not finished, in the order in which they came to their state
        self.admit, self.prefilled, self.finish, self.nfe, self.preemptions = {}, {}, {}, {}, {}
        self.visible, self.seen = [], []
        self.starting = self.preempted = False

    # ------------------------------------------------------------------ events

    def at(self, time, kind, happen, *args):
        heappush(self.events, (time, kind, next(self.number), happen, args))

    def run(self):
        while self.events:
            self.clock, kind, _, happen, args = heappop(self.events)
            happen(*args)
            if kind != STARTS:
                self.look_for_work()

    def look_for_work(self):
        if not self.starting:
            self.starting = True
            self.at(self.clock, STARTS, self.start)

    def arrive(self, s):
        self.seen.append((s.request, self.clock, sum(map(self.tokens, self.everyone))))
        load = [len(at.queue) + len(self.running(at)) for at in self.contexts]
        s.home = self.contexts[load.index(min(load))]
        self.everyone.append(s)
        self.enqueue(s, back=True)

    def enqueue(self, s, back):
        queue = s.home.queue
        queue.insert(len(queue) if back else 0, s)
        if self.shortest_prompt:
            queue.sort(key=lambda s: (s.input_tokens, s.request))

    # ------------------------------------------------------------------ who is where

    def tokens(self, s):
        return s.input_tokens + s.block * self.block_size

    def kv(self, tokens):
        return -(-tokens // self.limits.kv_block_tokens)

    def running(self, at):
        return sorted((s for s in self.everyone if s.home is at and s.order >= 0), key=lambda s: s.order)

    def holds(self, at):
        return [s for s in self.everyone if s.desk is at]

    def load(self, at):
        return sum(self.sticky or s.state in ("sent", "denoise") for s in self.holds(at))

    def used(self, at):
        return sum(s.held for s in self.everyone if s.home is at) + sum(s.lent for s in self.holds(at))

    def becomes(self, s, state):
        s.state = state
        self.everyone.remove(s)
        self.everyone.append(s)

    def those(self, state):
        return [s for s in self.everyone if s.state == state]

    # ------------------------------------------------------------------ passes start

    def start(self):
        self.starting = False
        for s in self.those("waiting"):
            if s.state == "waiting":
                self.send(s)
        for at in self.contexts:
            if not at.busy and not (self.blocking and at.link_free > self.clock):
                self.context_pass(at)
        for at in self.denoisers:
            batch = [s for s in self.those("denoise") if s.desk is at]
            if batch and not at.busy:
                context = sum(map(self.tokens, batch))
                seconds = self.latency.decode(len(batch), context, 0, 0)[0]
                self.go(at, seconds, self.denoised, [(s, s.order) for s in batch])

    def go(self, at, seconds, ends, *args):
        length = int(self.latency.host.around(max, seconds) * 1e9 + 0.5)
        at.busy = True
        self.rounds += 1
        self.peak = max(self.peak, self.used(at))
        self.at(self.clock + length, ENDS, ends, at, *args)

    def context_pass(self, at):
        self.preempted = False
        extends, chunks = self.extends(at), []
        budget = self.limits.max_num_batched_tokens - len(extends) * self.block_size
        if not self.preempted:
            for s in [s for s in self.running(at) if s.state == "prefill" and s.computed < s.target]:
                if self.grow(s, min(s.target, s.computed + budget)):
                    budget -= self.chunk(s, budget, chunks)
        if not self.preempted:
            self.admit_from_queue(at, budget, chunks)
        if extends or chunks:
            self.context_go(at, extends, chunks)

    def context_go(self, at, extends, chunks):
        for s in extends:
            self.becomes(s, "extend")
        tokens = sum(c for _, _, c in chunks)
        pairs = sum(p + 1 for _, done, c in chunks for p in range(done, done + c))
        reads = sum(done + c for _, done, c in chunks)
        context = sum(map(self.tokens, extends))
        seconds = self.latency.round(0, 0, len(extends), context, (tokens, pairs, reads, len(chunks)))[1]
        complete = [s for s, _, _ in chunks if s.computed == s.target]
        self.go(at, seconds, self.context_done, [(s, s.order) for s in extends], complete)

    def extends(self, at):
        limits = self.limits
        most = min(limits.max_num_seqs, limits.max_num_batched_tokens // self.block_size)
        most = min(most, self.max_extends or most)
        chosen = []
        for s in [s for s in self.those("due") if s.home is at]:
            chosen = [c for c in chosen if c.state == "due"]
            if len(chosen) < most and s.state == "due" and self.grow(s, self.tokens(s) + self.block_size):
                chosen.append(s)
        return [c for c in chosen if c.state == "due"]

    def grow(self, s, tokens):
        """Memory at home; whether ``s`` still is there."""
        at = s.home
        while self.used(at) + self.kv(tokens) - s.held > at.kv_blocks:
            victim = self.running(at)[-1]
            self.preempt(victim)
            if victim is s:
                return False
        s.held = self.kv(tokens)
        return True

    def chunk(self, s, budget, chunks):
        tokens = min(s.target - s.computed, budget)
        if tokens:
            chunks.append((s, s.computed, tokens))
            s.computed += tokens
        return tokens

    def admit_from_queue(self, at, budget, chunks):
        seats = sum(server.seats for server in self.denoisers)
        while at.queue and budget > 0:
            s = at.queue[0]
            whole = self.tokens(s)
            if sum(len(self.running(of)) for of in self.contexts) >= seats or len(self.running(at)) >= at.seats:
                break
            if self.used(at) + self.kv(whole) > at.kv_blocks:
                break
            if whole > budget and not self.limits.chunked_prefill:
                break
            at.queue.pop(0)
            self.becomes(s, "prefill")
            s.order, s.computed, s.target = next(self.admissions), 0, whole
            self.admit.setdefault(s.request, self.clock)
            self.grow(s, min(whole, budget))
            budget -= self.chunk(s, budget, chunks)

    # ------------------------------------------------------------------ passes and transfers end

    def context_done(self, at, extends, complete):
        at.busy = False
        ready = []
        for s, order in extends:
            if s.order == order:
                s.block += 1
                ready.append((s, order))
        for s in complete:
            self.prefilled.setdefault(s.request, self.clock)
            ready.append((s, s.order))
        for s, _ in ready:
            self.becomes(s, "ready")
            s.ready = self.clock
        for s, order in ready:
            if s.order == order:
                self.send(s)

    def send(self, s):
        to = self.choose(s)
        if to is None:
            self.waits += s.state == "ready"
            self.becomes(s, "waiting")
            return
        lacking = self.block_size if s.desk is to else self.tokens(s)
        if s.desk not in (None, to):
            self.moves += 1
            s.lent = 0
        s.desk = to
        self.becomes(s, "sent")
        while self.used(to) + self.kv(self.tokens(s)) - s.lent > to.kv_blocks:
            victim = max(self.holds(to), key=lambda other: other.order)
            self.lost += 1
            self.preempt(victim)
            if victim is s:
                return
        s.lent = self.kv(self.tokens(s))
        seconds = self.latency.transfer(1, lacking)
        s.home.link_free = max(s.home.link_free, self.clock) + int(seconds * 1e9 + 0.5)
        self.at(s.home.link_free, ENDS, self.arrives, s, s.order)

    def choose(self, s):
        if self.sticky and s.desk:
            return s.desk
        best = None
        for at in self.denoisers:
            there = s.desk is at
            room = len(self.holds(at)) < at.seats and self.used(at) + self.kv(self.tokens(s)) <= at.kv_blocks
            if there or room:
                rank = self.load(at), not there, at.index
                best = min(best, (rank, at)) if best else (rank, at)
        return best and best[1]

    def arrives(self, s, order):
        if s.order != order:
            return
        self.becomes(s, "denoise")
        s.level = self.level(s.request, sum(len(at.queue) for at in self.contexts))
        s.left = self.steps(s.request, s.level)[s.block]

    def denoised(self, at, batch):
        at.busy = False
        for s, order in batch:
            self.nfe[s.request] = self.nfe.get(s.request, 0) + 1
            if s.order == order:
                s.left -= 1
                if not s.left:
                    self.block_is_done(s)

    def block_is_done(self, s):
        steps = self.steps(s.request, s.level)[s.block]
        self.visible.append((s.request, s.block, steps, s.ready, self.clock, s.level))
        if s.block < s.blocks - 1:
            self.becomes(s, "due")
            return
        self.everyone.remove(s)
        self.finish[s.request] = self.clock
        if self.on_finish:
            self.on_finish(s.request)

    def preempt(self, s):
        if s.state in ("due", "extend"):
            s.block += 1
        s.held = s.lent = s.computed = 0
        s.order, s.desk = -1, None
        self.becomes(s, "queued")
        self.enqueue(s, back=False)
        self.preemptions[s.request] = self.preemptions.get(s.request, 0) + 1
        self.preempted = True
        self.look_for_work()
