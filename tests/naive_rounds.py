"""The naive engine of rounds for every policy and decoder: one sequence at a time, everything looked for by scanning.

Written from the texts of ``rounds.py``, ``policy.py`` and ``decoders.py``; shares nothing with them but the latency.
"""

from dataclasses import dataclass, field


@dataclass(eq=False)
class Seq:
    request: int
    input_tokens: int
    output_tokens: int
    tokens: int = 0  # generated, or in whole blocks of the cache
    burst: int = 0  # bursts so far
    block: int = 0
    left: int = 0  # denoise steps of the open block; 0: none is open
    level: int = 0
    due: int = -1  # since which round its block waits for the extend pass; -1: it does not
    ready: int = 0
    computed: int = 0
    target: int = 0
    held: int = 0
    state: str = "waiting"  # prefill, decoding


@dataclass
class NaiveRounds:
    latency: object
    limits: object
    kind: str  # token, mock, burst, block
    block_size: int = 0
    bursts: dict = field(default_factory=dict)  # by request
    steps: object = None  # (request, level) to the steps of its blocks
    level: object = None  # (request, waiting) to a level
    lockstep: bool = False
    steps_per_round: int = 1
    max_extends: int | None = None
    shortest_prompt: bool = False
    clock: int = 0
    rounds: int = 0
    preemptions: int = 0
    idle: int = 0  # passes of sequences whose block was done
    peak: int = 0

    def __post_init__(self):
        self.waiting, self.running = [], []
        self.admit, self.prefilled, self.finish, self.nfe, self.visible = {}, {}, {}, {}, []
        self.flight = None

    def simulate(self, arrivals):
        """Arrivals are (time, Seq) in order."""
        arrivals = list(arrivals)
        while arrivals or self.waiting or self.running:
            if not self.waiting and not self.running:
                self.clock = max(self.clock, arrivals[0][0])
            while arrivals and arrivals[0][0] <= self.clock:
                self.queue(arrivals.pop(0)[1], back=True)
            self.round()
            self.end()

    def queue(self, s, back):
        self.waiting.insert(len(self.waiting) if back else 0, s)
        if self.shortest_prompt:
            self.waiting.sort(key=lambda s: (s.input_tokens, s.request))

    # ------------------------------------------------------------------ memory

    def blocks(self, tokens):
        return -(-tokens // self.limits.kv_block_tokens)

    def used(self):
        return sum(s.held for s in self.running)

    def length(self, s):
        return s.input_tokens + (s.block * self.block_size if self.kind == "block" else s.tokens)

    def preempt_last(self):
        s = self.running.pop()
        self.preempted = True
        self.preemptions += 1
        if s.due >= 0:
            s.block += 1
        s.due, s.left, s.held, s.computed, s.state = -1, 0, 0, 0, "waiting"
        self.queue(s, back=False)
        return s

    def grow(self, s, tokens):
        if self.blocks(tokens) <= s.held:
            return True
        while self.used() - s.held + max(self.blocks(tokens), s.held) > self.limits.kv_blocks:
            if self.preempt_last() is s:
                return False
        s.held = max(s.held, self.blocks(tokens))
        return True

    # ------------------------------------------------------------------ a round

    def round(self):
        self.preempted, self.chunks, self.complete = False, [], []
        decoding = [s for s in self.running if s.state == "decoding"]
        budget = self.limits.max_num_batched_tokens
        if self.limits.prefill == "first":
            self.prefill(budget)
            if self.chunks:
                return self.go([], [], 0)
        budget -= len(decoding) * (self.block_size if self.kind == "block" else 1)
        chosen = self.claim(decoding)
        prefill = self.limits.prefill
        if not self.preempted and (prefill == "mixed" or (prefill == "last" and not decoding)):
            self.prefill(budget)
        if self.kind == "burst":
            self.join_and_reserve()
        decoding = [s for s in self.running if s.state == "decoding"]
        if self.kind != "block":
            return self.go(decoding, [], 1)
        chosen = [s for s in chosen if s in self.running]
        if self.lockstep:
            for s in chosen:
                self.extended(s)
        denoising = [s for s in decoding if s.due < 0]
        for s in denoising:
            if not s.left:
                s.level = self.level(s.request, len(self.waiting))
                s.left = self.steps(s.request, s.level)[s.block]
        longest = max((s.left for s in denoising), default=0)
        return self.go(denoising, chosen, longest if self.lockstep else min(longest, self.steps_per_round))

    def claim(self, decoding):
        """KV blocks for what decodes; of blocks, those that extend in this round."""
        if self.kind in ("token", "mock"):
            for s in decoding:
                if s in self.running:
                    self.grow(s, s.input_tokens + s.tokens)
        if self.kind != "block":
            return []
        due = sorted((s for s in decoding if s.due >= 0), key=lambda s: s.due)  # stable: ties in order of admission
        chosen = []
        for s in due:
            chosen = [c for c in chosen if c in self.running]
            if len(chosen) != self.max_extends and s in self.running and self.grow(s, self.length(s) + self.block_size):
                chosen.append(s)
        return chosen

    def prefill(self, budget):
        for s in list(self.running):
            if s.state == "prefill":
                chunk = min(s.target - s.computed, budget)
                if chunk and self.grow(s, s.computed + chunk):
                    budget -= self.chunk(s, chunk)
        while self.waiting and budget > 0 and not self.preempted and len(self.running) < self.limits.seats:
            s = self.waiting[0]
            whole = self.length(s)
            if self.blocks(whole) > self.limits.kv_blocks - self.used():
                break
            if whole > budget and not self.limits.chunked_prefill:
                break
            self.waiting.pop(0)
            self.running.append(s)
            self.admit.setdefault(s.request, self.clock)
            s.target, s.computed, s.state = whole, 0, "prefill"
            self.grow(s, min(whole, budget))
            budget -= self.chunk(s, min(whole, budget))

    def chunk(self, s, tokens):
        self.chunks.append((s, s.computed, tokens))
        s.computed += tokens
        if s.computed == s.target:
            self.complete.append(s)
        return tokens

    def join_and_reserve(self):
        for s, _, _ in self.chunks:
            if s.computed == s.target:
                self.start(s)
        self.give = {}
        for s in self.running:
            if s.state == "decoding":
                self.give[s] = min(self.bursts[s.request][s.burst], s.output_tokens - s.tokens)
        while True:
            ready = [s for s in self.running if s.state == "decoding"]
            more = sum(self.blocks(self.length(s) + self.give[s]) - s.held for s in ready)
            if self.used() + more <= self.limits.kv_blocks:
                break
            self.preempt_last()
        for s in ready:
            s.held = self.blocks(self.length(s) + self.give[s])

    def start(self, s):
        s.state, s.ready = "decoding", self.clock

    def extended(self, s):
        s.block, s.due, s.ready = s.block + 1, -1, self.clock

    # ------------------------------------------------------------------ its cost and its end

    def go(self, decoding, extending, forwards):
        assert decoding or extending or self.chunks
        self.peak = max(self.peak, self.used())
        tokens = sum(c for _, _, c in self.chunks)
        pairs = sum(c * at + c * (c + 1) // 2 for _, at, c in self.chunks)
        reads = sum(at + c for _, at, c in self.chunks)
        prefill = tokens, pairs, reads, len(self.chunks)
        x, xe = sum(map(self.length, decoding)), sum(map(self.length, extending))
        n, ne = len(decoding), len(extending)
        if self.lockstep:
            xe -= self.block_size * ne  # they were extended already
            before = self.latency.round(0, 0, ne, xe, prefill)
            each = self.latency.round(n, x, 0, 0, (0, 0, 0, 0))
            sent = self.latency.transfer(ne + len(self.chunks), ne * self.block_size + tokens)
            seconds = self.latency.host.around(max, before[1] + sent + forwards * (each[0] + each[1]))
        elif forwards > 1:
            d, c, _ = self.latency.round(n, x, ne, xe, prefill)
            each = self.latency.round(n, x, 0, 0, (0, 0, 0, 0))
            d, c = d + (forwards - 1) * each[0], c + (forwards - 1) * each[1]
            c += self.latency.transfer(ne + len(self.chunks), ne * self.block_size + tokens)
            seconds = self.latency.host.around(max, max(d, c) if self.latency.side_by_side else d + c)
        else:
            seconds = self.latency.round(n, x, ne, xe, prefill)[2]
        self.clock += int(seconds * 1e9 + 0.5)
        self.rounds += 1
        self.flight = decoding, extending, forwards

    def end(self):
        (decoding, extending, forwards), done = self.flight, []
        for s in self.complete:
            self.prefilled.setdefault(s.request, self.clock)
        if not self.lockstep:
            for s in extending:
                self.extended(s)
        for s in decoding:
            if self.kind == "block":
                self.denoised(s, forwards, done)
                continue
            given = self.give[s] if self.kind == "burst" else 1
            self.visible.append((s.request, s.burst, given, s.ready, self.clock, 0))
            s.tokens, s.burst, s.ready = s.tokens + given, s.burst + 1, self.clock
            if s.tokens == s.output_tokens:
                done.append(s)
        for s in [s for s, _, _ in self.chunks if s.state == "prefill" and s.computed == s.target]:
            self.start(s)
            if self.kind == "token":
                self.visible.append((s.request, s.burst, 1, s.ready, self.clock, 0))
                s.tokens, s.burst = s.tokens + 1, s.burst + 1
                if s.tokens == s.output_tokens:
                    done.append(s)
        for s in done:
            self.running.remove(s)
            self.finish[s.request] = self.clock

    def denoised(self, s, forwards, done):
        took = min(forwards, s.left)
        self.nfe[s.request] = self.nfe.get(s.request, 0) + took
        self.idle += forwards - took
        s.left -= took
        if s.left:
            return
        steps = self.steps(s.request, s.level)
        self.visible.append((s.request, s.block, steps[s.block], s.ready, self.clock, s.level))
        if s.block == len(steps) - 1:
            done.append(s)
        else:
            s.due = self.rounds
