"""The naive engine: one round at a time, loops over the batch, every sequence steps by itself.

It is the oracle of the fast engine and shares no code with it beyond the latency model. It also logs the
moment at which every token (autoregressive) or block (two towers) becomes visible.
"""

from dataclasses import dataclass, field


@dataclass
class NaiveSequence:
    request: int
    input_tokens: int
    output_tokens: int
    steps: list[int] | None  # denoise steps of each block; None: autoregressive
    tokens: int = 0  # autoregressive: generated
    block: int = 0  # two towers: the block under work
    step: int = 0
    extending: bool = False  # the block's tokens are known, its extend pass is due
    computed: int = 0  # tokens in the cache
    target: int = 0  # tokens to prefill
    held: int = 0  # KV blocks
    fresh: bool = True  # in prefill
    done: bool = False


@dataclass
class NaiveEngine:
    driven = True
    latency: object
    limits: object
    block_size: int | None  # None: autoregressive
    shortest_prompt: bool = False
    clock_ns: int = 0
    waiting: list = field(default_factory=list)
    running: list = field(default_factory=list)
    visible: dict = field(default_factory=dict)  # (request, unit) -> time
    admit: dict = field(default_factory=dict)
    finish: dict = field(default_factory=dict)
    nfe: dict = field(default_factory=dict)
    preemptions: int = 0
    rounds: int = 0
    kv_peak: int = 0
    used: int = 0
    on_finish: object = None
    in_flight: tuple | None = None  # (decodes, chunks) of the round that ends at clock_ns

    def submit(self, seq, now):
        self.settle(now)
        if not self.running and not self.waiting:
            self.clock_ns = max(self.clock_ns, now)
        self.waiting.append(seq)
        self.sort()

    def sort(self):
        if self.shortest_prompt:
            self.waiting.sort(key=lambda s: (s.input_tokens, s.request))

    def settle(self, now):
        self.advance(now)
        if self.clock_ns <= now:
            self.end_round()

    @property
    def idle(self):
        return not self.running and not self.waiting

    def advance(self, until):
        while self.clock_ns < until:
            self.end_round()
            if self.idle:
                break
            self.round()

    # ------------------------------------------------------------------

    def blocks(self, tokens):
        return -(-tokens // self.limits.kv_block_tokens)

    def size(self, s):
        """Tokens whose keys and values a restart has to recompute."""
        if s.steps is None:
            return s.input_tokens + s.tokens
        return s.input_tokens + (s.block + s.extending) * self.block_size

    def grow(self, s, tokens):
        """Hold the blocks of `tokens`; preempt from the tail on shortage; False if `s` itself had to go."""
        while self.used + self.blocks(tokens) - s.held > self.limits.kv_blocks:
            victim = self.running.pop()
            self.preempted = True
            self.preemptions += 1
            self.used -= victim.held
            if victim.extending:
                victim.block, victim.extending = victim.block + 1, False
            victim.held = victim.computed = victim.step = 0
            victim.fresh = True
            self.waiting.insert(0, victim)
            self.sort()
            if victim is s:
                return False
        self.used += self.blocks(tokens) - s.held
        s.held = self.blocks(tokens)
        return True

    def round(self):
        self.preempted = False
        chunks, decodes = [], []
        if self.limits.prefill == "first":
            self.prefill(self.limits.max_num_batched_tokens, chunks)
        if not chunks:
            budget = self.limits.max_num_batched_tokens
            for s in list(self.running):
                if s not in self.running or budget <= 0:
                    continue
                if s.fresh:
                    if self.limits.prefill == "mixed" or all(other.fresh for other in self.running):
                        budget -= self.chunk(s, budget, chunks)
                elif s.steps is None:
                    if self.grow(s, self.size(s)):
                        decodes.append(s)
                        budget -= 1
                elif not s.extending or self.grow(s, s.computed + self.block_size):
                    decodes.append(s)
                    budget -= self.block_size
            alone = all(s.fresh for s in self.running)
            if not self.preempted and (self.limits.prefill == "mixed" or (self.limits.prefill == "last" and alone)):
                self.admit_from_queue(budget, chunks)
        self.run(decodes, chunks)

    def prefill(self, budget, chunks):
        for s in list(self.running):
            if s.fresh:
                budget -= self.chunk(s, budget, chunks)
        self.admit_from_queue(budget, chunks)

    def chunk(self, s, budget, chunks):
        c = min(s.target - s.computed, budget)
        if not c or not self.grow(s, s.computed + c):
            return 0
        chunks.append((s, s.computed, c))
        s.computed += c
        return c

    def admit_from_queue(self, budget, chunks):
        seats = min(self.limits.max_num_seqs, self.limits.state_slots)
        while self.waiting and budget > 0 and len(self.running) < seats:
            s = self.waiting[0]
            if self.blocks(self.size(s)) > self.limits.kv_blocks - self.used:
                break
            if not self.limits.chunked_prefill and self.size(s) > budget:
                break
            self.waiting.pop(0)
            self.running.append(s)
            self.admit.setdefault(s.request, self.clock_ns)
            s.target, s.computed, s.fresh = self.size(s), 0, True
            budget -= self.chunk(s, budget, chunks)

    def run(self, decodes, chunks):
        self.kv_peak = max(self.kv_peak, self.used)
        n = x = ne = xe = 0
        for s in decodes:
            if s.extending:
                ne, xe = ne + 1, xe + s.computed
            elif s.steps is None:
                n, x = n + 1, x + self.size(s)
            else:
                n, x = n + 1, x + s.computed
                self.nfe[s.request] = self.nfe.get(s.request, 0) + 1
        tokens = sum(c for _, _, c in chunks)
        pairs = sum(p + 1 for _, at, c in chunks for p in range(at, at + c))
        reads = sum(at + c for _, at, c in chunks)
        self.clock_ns += int(self.latency.round(n, x, ne, xe, (tokens, pairs, reads, len(chunks)))[2] * 1e9 + 0.5)
        self.rounds += 1
        self.in_flight = decodes, chunks

    def end_round(self):
        if self.in_flight is None:
            return
        (decodes, chunks), self.in_flight = self.in_flight, None
        for s in decodes:
            if s.steps is None:
                s.computed += 1
                self.emit(s)
            elif s.extending:
                s.computed += self.block_size
                s.block, s.step, s.extending = s.block + 1, 0, False
            else:
                s.step += 1
                if s.step == s.steps[s.block]:
                    self.visible[s.request, s.block] = self.clock_ns
                    s.extending = True
                    s.done = s.block == len(s.steps) - 1
        for s, _, _ in chunks:
            if s.computed == s.target:
                s.fresh = False
                if s.steps is None:
                    self.emit(s)
        for s in list(self.running):  # in the order of admission
            if s.done:
                self.running.remove(s)
                self.used -= s.held
                self.finish[s.request] = self.clock_ns
                if self.on_finish:
                    self.on_finish(s.request, self.clock_ns)

    def emit(self, s):
        self.visible[s.request, s.tokens] = self.clock_ns
        s.tokens += 1
        s.done = s.tokens == s.output_tokens

    # ------------------------------------------------------------------ what routers see

    @property
    def outstanding_requests(self):
        return len(self.running) + len(self.waiting)

    @property
    def outstanding_tokens(self):
        """Tokens to prefill, and the context of decoding sequences with what the round in flight adds to it."""
        total = sum(self.size(s) for s in self.waiting)
        for s in self.running:
            total += s.target if s.fresh else self.size(s) if s.steps is None else s.computed
        for s in self.in_flight[0] if self.in_flight else ():
            total += 1 if s.steps is None else self.block_size * s.extending
        return total
