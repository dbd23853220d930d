"""What decoding sequences do in the rounds of ``rounds.py``: single tokens, bursts of drafts, or blocks of masks."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from twotower_sim.latency import Cost, Latency
from twotower_sim.plan import Bursts
from twotower_sim.policy import Policy
from twotower_sim.records import Records
from twotower_sim.replica import PromptChunks
from twotower_sim.rounds import Task


class _Decoder:
    """What decoders have in common."""

    def read(self, latency: Latency, chunks: PromptChunks, now_ns: int) -> Cost:
        return latency.round(0, 0, 0, 0, chunks.shape)


class TokenDecoder(_Decoder):
    """One token a round: autoregressive, where prefill ends with the first token, or mock-AR, where it does not."""

    pass_tokens, at_once, in_turn, blocks, idle_forwards = 1, False, False, False, 0

    def __init__(self, kv_block_tokens: int, prefill_gives_token: bool) -> None:
        self.sequences: dict[int, Task] = {}
        self.context = 0  # sum over sequences of input + tokens so far, the newest of which is read in this round
        self._kv_block, self._first = kv_block_tokens, int(prefill_gives_token)
        self._growing: list[Task] = []

    def prefill_length(self, seq: Task) -> int:
        return seq.input_tokens + seq.done

    def claims(self) -> Iterator[tuple[Task, int]]:
        growing, self._growing = self._growing, []
        for seq in growing:
            yield seq, seq.input_tokens + seq.done

    def start(self, seq: Task, now_ns: int) -> bool:
        seq.done += self._first
        self.context += seq.input_tokens + seq.done
        if (seq.input_tokens + seq.done) % self._kv_block <= 1:
            self._growing.append(seq)
        return seq.done == seq.output_tokens

    def finish(self, seq: Task) -> None:
        self.context -= seq.input_tokens + seq.done

    lift = finish

    def cost(self, latency: Latency, chunks: PromptChunks, waiting: int, now_ns: int) -> tuple[int, int, Cost]:
        n, context = len(self.sequences), self.context
        self.context += n
        return n, 0, self._run(latency, context, chunks, now_ns)

    def _run(self, latency: Latency, context: int, chunks: PromptChunks, now_ns: int) -> Cost:
        return latency.round(len(self.sequences), context, 0, 0, chunks.shape)

    def end(self, now_ns: int) -> list[Task]:
        finished = []
        for seq in self.sequences.values():
            seq.done += 1
            if seq.done == seq.output_tokens:
                finished.append(seq)
            elif (seq.input_tokens + seq.done) % self._kv_block <= 1:  # fills a block, or needs the next
                self._growing.append(seq)
        return finished


class BurstDecoder(_Decoder):
    """Speculative decoding: in a round the drafts of every sequence are verified, and bring a burst of tokens. The last
    token of a burst is read in the next round; a prompt that is complete joins the round at once, as in DynoSim.
    ``level`` counts a sequence's bursts."""

    pass_tokens, at_once, in_turn, blocks, idle_forwards = 1, True, False, False, 0

    def __init__(self, kv_block_tokens: int, bursts: Bursts, records: Records) -> None:
        self.sequences: dict[int, Task] = {}
        self.context = 0
        self._kv_block, self._bursts, self._records = kv_block_tokens, bursts, records

    def prefill_length(self, seq: Task) -> int:
        return seq.input_tokens + seq.done

    def start(self, seq: Task, now_ns: int) -> bool:
        self.context += seq.input_tokens + seq.done
        seq.ready_ns, seq.plan = now_ns, self._bursts.of(seq.request)
        return False

    def claims(self) -> Iterator[tuple[Task, int]]:
        for seq in self.sequences.values():
            assert seq.plan is not None
            seq.left = min(seq.plan[seq.level], seq.output_tokens - seq.done)
            tokens = seq.input_tokens + seq.done
            if -tokens // self._kv_block != -(tokens + seq.left) // self._kv_block:
                yield seq, tokens + seq.left

    def finish(self, seq: Task) -> None:
        self.context -= seq.input_tokens + seq.done

    lift = finish

    def cost(self, latency: Latency, chunks: PromptChunks, waiting: int, now_ns: int) -> tuple[int, int, Cost]:
        n, context = len(self.sequences), self.context
        self.context += sum(seq.left for seq in self.sequences.values())
        return n, 0, latency.round(n, context, 0, 0, chunks.shape)

    def end(self, now_ns: int) -> list[Task]:
        finished = []
        for seq in self.sequences.values():
            self._records.log(seq.request, seq.level, seq.left, seq.ready_ns, now_ns)
            seq.level += 1
            seq.done += seq.left
            seq.ready_ns = now_ns
            if seq.done == seq.output_tokens:
                finished.append(seq)
        return finished


class Luck(Protocol):
    """Denoise steps of the blocks of a request, should they be denoised at the gamma of a level."""

    def steps(self, request: int, level: int) -> list[int]: ...


class BlockRound(NamedTuple):
    """What a round does to blocks."""

    denoising: list[Task]
    context: int  # tokens that their passes attend to
    extending: list[Task]
    extend_context: int
    chunks: PromptChunks


class BlockDecoder(_Decoder):
    """Blocks of masks: denoise passes until all is committed, then an extend pass, which the last block does not need.

    A block's gamma is chosen when its first pass is formed: ``level(request, waiting requests)``.
    """

    at_once, blocks = False, True

    def __init__(
        self,
        block_size: int,
        policy: Policy,
        steps_per_round: int,
        max_extends: int | None,
        luck: Luck,
        level: Callable[[int, int], int],
        records: Records,
    ) -> None:
        self.sequences: dict[int, Task] = {}
        self.context = 0
        self.pass_tokens, self.in_turn = block_size, policy.in_turn
        self.idle_forwards = 0  # passes in which a sequence whose block was done kept its place
        self._most_passes, self._most_extends = policy.most_passes(steps_per_round), max_extends
        self._luck, self._level, self._records = luck, level, records
        self._due: dict[int, Task] = {}  # whose block is done and has to be extended, longest waiting first
        self._extending: list[Task] = []
        self._denoising: list[Task] = []
        self._forwards = 0

    def prefill_length(self, seq: Task) -> int:
        return seq.input_tokens + seq.done * self.pass_tokens

    def start(self, seq: Task, now_ns: int) -> bool:
        self.context += self.prefill_length(seq)
        seq.left, seq.ready_ns = 0, now_ns
        return False

    def claims(self) -> Iterator[tuple[Task, int]]:
        extending: list[Task] = []
        for seq in list(self._due.values()):
            if len(extending) == self._most_extends:
                break
            if seq.request in self._due:  # else one before it took its memory
                yield seq, self.prefill_length(seq) + self.pass_tokens
            extending = [of for of in (*extending, seq) if of.request in self._due]
        self._extending = extending

    def lift(self, seq: Task) -> None:
        """A block whose extend pass is due is done."""
        self.context -= self.prefill_length(seq)
        seq.done += self._due.pop(seq.request, None) is not None

    def finish(self, seq: Task) -> None:
        self.context -= self.prefill_length(seq)

    def cost(self, latency: Latency, chunks: PromptChunks, waiting: int, now_ns: int) -> tuple[int, int, Cost]:
        due, size, extending = self._due, self.pass_tokens, self._extending
        extend_context = sum(map(self.prefill_length, extending))
        context = self.context - sum(map(self.prefill_length, due.values()))
        if self.in_turn and extending:
            self._extend(extending, now_ns)
            context += extend_context + size * len(extending)
        denoising = [seq for seq in self.sequences.values() if seq.request not in due]
        for seq in denoising:
            if not seq.left:
                self._open(seq, waiting)
        work = BlockRound(denoising, context, extending, extend_context, chunks)
        self._forwards, cost = self._run(latency, work, now_ns)
        self.context += size * len(extending)
        self._denoising = denoising
        return len(denoising), len(extending), cost

    def _run(self, latency: Latency, work: BlockRound, now_ns: int) -> tuple[int, Cost]:
        """How many denoise passes the round takes, and what it costs."""
        denoising, context, extending, extend_context, chunks = work
        n, n_extend, prefill = len(denoising), len(extending), chunks.shape
        forwards = min(self._most_passes, max(seq.left for seq in denoising)) if n else 0
        if self.in_turn or forwards > 1:
            sent = n_extend * self.pass_tokens + prefill[0]
            return forwards, latency.forwards(
                forwards, self.in_turn, n, context, n_extend, extend_context, prefill, sent
            )
        return forwards, latency.round(n, context, n_extend, extend_context, prefill)

    def _open(self, seq: Task, waiting: int) -> None:
        """A block starts."""
        seq.level = self._level(seq.request, waiting)
        seq.left = self._luck.steps(seq.request, seq.level)[seq.done]

    def _extend(self, extending: list[Task], now_ns: int) -> None:
        for seq in extending:
            del self._due[seq.request]
            seq.done += 1
            seq.ready_ns = now_ns

    def end(self, now_ns: int) -> list[Task]:
        finished, forwards = [], self._forwards
        if not self.in_turn:
            self._extend(self._extending, now_ns)
        for seq in self._denoising:
            took = min(seq.left, forwards)
            seq.left -= took
            self._records.nfe[seq.request] += took
            self.idle_forwards += forwards - took
            if not seq.left and self._is_done(seq, now_ns):
                finished.append(seq)
        self._extending, self._denoising = [], []
        return finished

    def _is_done(self, seq: Task, now_ns: int) -> bool:
        """A block is done; returns whether it was the last."""
        steps = self._luck.steps(seq.request, seq.level)
        self._records.log(seq.request, seq.done, steps[seq.done], seq.ready_ns, now_ns, seq.level)
        if seq.done == len(steps) - 1:
            return True
        self._due[seq.request] = seq
        return False
