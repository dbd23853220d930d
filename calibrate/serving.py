"""A serving engine for the real decoder: the simulated engine's rules, and the model's passes in wall-clock time.

Admission, memory, prompt chunks, preemption and the order of a round are those of ``twotower_sim.rounds``, the very
code. What is real: a decoder runs the passes of a round instead of asking a latency model, finds out as it goes when a
block is done, and a round lasts from the end of the one before it (or the arrival that ended an idle time) until its
results are on the host, everything in between included. Requests arrive by the clock and are seen when a round starts.

Answers are as long as the workload says, whatever the text: EOS ends nothing.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop

import torch
from torch import Tensor

from calibrate.generate import GREEDY, Blocks
from calibrate.graphs import Passes
from calibrate.model import Segment, TwoTower
from twotower_sim.decoders import BlockDecoder, BlockRound, TokenDecoder
from twotower_sim.kv_cache import KvCache
from twotower_sim.latency import Cost, Latency
from twotower_sim.recorded import RoundLog, Shape
from twotower_sim.records import Records
from twotower_sim.replica import PromptChunks
from twotower_sim.rounds import RoundEngine, Task


class Slots(KvCache):
    """The simulated memory, which also says in which slot of the model's cache a sequence is."""

    def __init__(self, blocks: int, block_tokens: int, slots: int) -> None:
        super().__init__(blocks, block_tokens)
        self.of: dict[int, int] = {}
        self._spare = list(range(slots))

    def admit(self, request: int, length: int) -> int:
        self.of[request] = self._spare.pop()
        return super().admit(request, length)

    def release(self, request: int) -> None:
        self._spare.append(self.of.pop(request))
        super().release(request)


class Clock:
    """Nanoseconds since it was started, pauses left out."""

    def __init__(self) -> None:
        self._start_ns = time.perf_counter_ns()

    @property
    def now_ns(self) -> int:
        return time.perf_counter_ns() - self._start_ns

    @contextmanager
    def paused(self) -> Iterator[None]:
        start_ns = time.perf_counter_ns()
        yield
        self._start_ns += time.perf_counter_ns() - start_ns

    def wait_until(self, at_ns: int) -> None:
        if (left_ns := at_ns - self.now_ns) > 0:
            time.sleep(left_ns / 1e9)


class Probe:
    """How fast the machine is at the moment: now and then a denoise pass of one sequence without context, for which the
    clock stands still. Shared machines change their speed by tens of percent within seconds."""

    def __init__(self, model: TwoTower, every_ns: int = 100_000_000) -> None:
        size = model.config.block_size
        self._blocks, self._passes = Blocks(model, 1, 0.5, size), Passes(model, model.cache(2, size))
        self._rows, self._every_ns, self._at_ns = torch.zeros(1, dtype=torch.int64, device=model.device), every_ns, 0
        self.seconds: list[float] = []
        self._pass()  # the first of a kind takes longer

    def _pass(self) -> float:
        self._blocks.start(self._rows)
        start = time.perf_counter()
        for column in self._blocks.denoise(self._rows, self._passes, GREEDY):
            column.tolist()
        return time.perf_counter() - start

    def take(self, clock: Clock) -> None:
        """Unless it is too early for another."""
        if clock.now_ns >= self._at_ns:
            with clock.paused():
                self.seconds.append(self._pass())
            self._at_ns = clock.now_ns + self._every_ns

    @property
    def mean_s(self) -> float:
        return sum(self.seconds) / len(self.seconds)


class Served:
    """The model as decoders use it: its caches by slot, the text of every request, and the log of rounds."""

    def __init__(self, passes: Passes, slots: Slots, sequences: int, prompts: Sequence[Tensor]) -> None:
        """``sequences`` at a time, for which the caches of ``passes`` have room; ``prompts`` by request, int64 (T,)."""
        self.model, self.passes, self.slots, self.sequences = passes.model, passes, slots, sequences
        self.clock, self.probe = Clock(), Probe(passes.model)
        self.text = [prompt.tolist() for prompt in prompts]  # prompts, and what is committed
        self.rounds: list[RoundLog] = []

    def rows(self, sequences: Sequence[Task]) -> Tensor:
        """Slots (B,) of sequences."""
        return torch.tensor([self.slots.of[seq.request] for seq in sequences], device=self.model.device)

    def chunks(self, chunks: PromptChunks) -> list[Segment]:
        """Prompt chunks as segments. Who starts anew forgets what its slot held."""
        device, out = self.model.device, []
        for request, low, high in chunks.parts:
            row = torch.tensor([self.slots.of[request]], device=device)
            if low == 0:
                self.passes.caches.context.reset(row)
            out.append(Segment(row, torch.tensor([self.text[request][low:high]], device=device)))
        return out

    @contextmanager
    def timed(self) -> Iterator[list[float]]:
        """Seconds of what is inside, until the device is done with it."""
        took: list[float] = []
        start = time.perf_counter()
        yield took
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        took.append(time.perf_counter() - start)

    def ended(self, start_ns: int, shape: Shape, forwards: int, denoiser_s: float, context_s: float) -> Cost:
        """Log a round that ends now."""
        end_ns = self.clock.now_ns
        self.rounds.append(RoundLog(start_ns, end_ns, *shape, forwards, denoiser_s, context_s))
        return denoiser_s, context_s, (end_ns - start_ns) / 1e9

    def warm_up(self, work: Callable[[Tensor], object]) -> None:
        """Do ``work`` of every batch that is a CUDA graph of its own, or of the smallest and the largest; and read
        prompts, alone and beside others."""
        device, caches = self.model.device, self.passes.caches
        rows = torch.arange(self.sequences, device=device)
        for n in range(1, self.sequences + 1) if device.type == "cuda" else (1, self.sequences):
            work(rows[:n])
            caches.context.reset(rows)
        ids = torch.ones(1, caches.context.tokens // 2, dtype=torch.int64, device=device)
        for others in ([], [Segment(rows[1:], torch.ones_like(rows[1:, None]))] if self.sequences > 1 else []):
            self.model.last_logits([*others, Segment(rows[:1], ids)], caches)
        caches.context.reset(rows)


class ServedTokens(TokenDecoder):
    """Autoregressive: the latest tokens and prompt chunks share a forward of the context tower."""

    def __init__(self, kv_block_tokens: int, served: Served) -> None:
        super().__init__(kv_block_tokens, prefill_gives_token=True)
        self._served = served

    def warm_up(self) -> None:
        self._served.warm_up(lambda rows: self._served.passes.decode(torch.ones_like(rows), rows))

    def read(self, latency: Latency, chunks: PromptChunks, now_ns: int) -> Cost:
        return self._forward([], 0, chunks, now_ns)

    def _run(self, latency: Latency, context: int, chunks: PromptChunks, now_ns: int) -> Cost:
        return self._forward(list(self.sequences.values()), context, chunks, now_ns)

    def _forward(self, decoding: list[Task], context: int, chunks: PromptChunks, now_ns: int) -> Cost:
        served = self._served
        whole = [request for request, _, high in chunks.parts if high == len(served.text[request])]
        with served.timed() as took:
            tokens = GREEDY.choose(self._logits(decoding, chunks))[0].tolist()
        requests = [seq.request for seq in decoding] + [request for request, _, _ in chunks.parts]
        for request, token in zip(requests, tokens, strict=True):
            if request in whole or request in self.sequences:
                served.text[request].append(token)
        shape = len(decoding), context, 0, 0, chunks.shape
        return served.ended(now_ns, shape, int(bool(decoding)), 0.0, took[0])

    def _logits(self, decoding: list[Task], chunks: PromptChunks) -> Tensor:
        """Of the decoding sequences, then of every chunk's last position: (B, V)."""
        served, model = self._served, self._served.model
        latest = torch.tensor([served.text[seq.request][-1] for seq in decoding], device=model.device)
        if not chunks.parts:
            return served.passes.decode(latest, served.rows(decoding))
        segments = [Segment(served.rows(decoding), latest[:, None])] if decoding else []
        return model.last_logits(segments + served.chunks(chunks), served.passes.caches)


class Written:
    """The commits of every request as they come, in the place of a simulated request's luck."""

    def __init__(self, output_tokens: Sequence[int], block_size: int) -> None:
        self.sizes: list[list[list[int]]] = [[[] for _ in range(0, tokens, block_size)] for tokens in output_tokens]

    def steps(self, request: int, level: int) -> list[int]:
        return [len(block) for block in self.sizes[request]]


class ServedBlocks(BlockDecoder):
    """Two towers: denoise passes until blocks are done, extends and prompt chunks in one forward of the context tower.

    Blocks that are done keep their place in the batch until the round ends.
    """

    def __init__(
        self, served: Served, written: Written, gammas: Sequence[float], steps_per_block: int, *rules, records: Records
    ) -> None:
        """``gammas`` by level; ``rules``: policy, steps_per_round, max_extends and level of ``BlockDecoder``."""
        policy, steps_per_round, max_extends, level = rules
        size = served.model.config.block_size
        super().__init__(size, policy, steps_per_round, max_extends, written, level, records)
        self._served, self._written, self._gammas = served, written, gammas
        self._blocks = Blocks(served.model, served.sequences, gammas[0], min(steps_per_block, size))
        self._opened: list[Task] = []

    def warm_up(self) -> None:
        def work(rows: Tensor) -> None:
            self._blocks.start(rows)
            self._blocks.denoise(rows, self._served.passes, GREEDY)
            self._served.passes.extend(self._blocks.ids[rows], rows)

        self._served.warm_up(work)

    def read(self, latency: Latency, chunks: PromptChunks, now_ns: int) -> Cost:
        context_s = self._context_pass([], chunks)
        return self._served.ended(now_ns, (0, 0, 0, 0, chunks.shape), 0, 0.0, context_s)

    def _open(self, seq: Task, waiting: int) -> None:
        seq.level = self._level(seq.request, waiting)
        seq.left = 1  # at least
        self._written.sizes[seq.request][seq.done] = []
        self._opened.append(seq)

    def _run(self, latency: Latency, work: BlockRound, now_ns: int) -> tuple[int, Cost]:
        denoising, context, extending, extend_context, chunks = work
        context_s = self._context_pass(extending, chunks) if self.in_turn else 0.0
        with self._served.timed() as took:
            forwards = self._denoise(denoising) if denoising else 0
        if not self.in_turn:
            context_s = self._context_pass(extending, chunks)
        shape = len(denoising), context, len(extending), extend_context, chunks.shape
        return forwards, self._served.ended(now_ns, shape, forwards, took[0] if forwards else 0.0, context_s)

    def _denoise(self, denoising: list[Task]) -> int:
        """Denoise until all blocks are done, or the round has had its passes; returns how many it took."""
        self._start_blocks()
        served, sizes = self._served, self._written.sizes
        rows, forwards, is_done = served.rows(denoising), 0, [False]
        while forwards < self._most_passes and not all(is_done):
            found = self._blocks.denoise(rows, served.passes, GREEDY)
            committed, is_done = (column.tolist() for column in found)
            forwards += 1
            for seq, size, done in zip(denoising, committed, is_done, strict=True):
                if size:
                    sizes[seq.request][seq.done].append(size)
                    seq.left = forwards if done else forwards + 1  # of this round, or more
        ids = self._blocks.ids[rows].tolist()
        for seq, block, done in zip(denoising, ids, is_done, strict=True):
            if done:
                served.text[seq.request][seq.input_tokens + seq.done * self.pass_tokens :] = block
        return forwards

    def _start_blocks(self) -> None:
        if self._opened:
            rows = self._served.rows(self._opened)
            self._blocks.start(rows, [self._gammas[seq.level] for seq in self._opened])
            self._opened.clear()

    def _context_pass(self, extending: list[Task], chunks: PromptChunks) -> float:
        """Append finished blocks and prompt chunks to the cache; seconds."""
        served = self._served
        if not extending and not chunks.parts:
            return 0.0
        with served.timed() as took:
            rows = served.rows(extending)
            if not chunks.parts:
                served.passes.extend(self._blocks.ids[rows], rows)
            else:
                segments = [Segment(rows, self._blocks.ids[rows])] if extending else []
                served.model.context_pass(segments + served.chunks(chunks), served.passes.caches)
        return took[0]


Arrivals = list[tuple[int, int]]
"""A heap of (nanoseconds, request)."""


def serve(engine: RoundEngine, served: Served, arrivals: Arrivals, arrive: Callable[[int, int], Task]) -> None:
    """Run until all requests are answered. ``arrive(request, at_ns)`` makes the sequence of a request; completions may
    bring more arrivals."""

    def submit(until_ns: int) -> None:
        while arrivals and arrivals[0][0] <= until_ns:
            at_ns, request = heappop(arrivals)
            engine.submit(arrive(request, at_ns), at_ns)

    gc.collect()
    gc.disable()  # its pauses are no part of what is measured
    try:
        served.clock = Clock()
        while True:
            submit(engine.clock_ns)
            engine.settle(engine.clock_ns)
            if engine.idle and arrivals:
                served.clock.wait_until(arrivals[0][0])
                submit(max(engine.clock_ns, arrivals[0][0]))
            submit(engine.clock_ns)
            if engine.idle:
                return
            engine.advance(engine.clock_ns + 1)
            served.probe.take(served.clock)
    finally:
        gc.enable()
