"""What every engine of a replica is given and shows."""

from dataclasses import dataclass
from typing import NamedTuple

from twotower_sim.latency import Prefill
from twotower_sim.schedule import Sequence


@dataclass(frozen=True)
class Limits:
    """What bounds a replica. Tokens count per round; memory is what all sequences share.

    ``prefill``: "mixed" rounds carry prompts beside decoding sequences; "first": a round that can prefill does only
    that; "last": prompts wait until nothing decodes.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_blocks: int
    kv_block_tokens: int
    state_slots: int
    chunked_prefill: bool = True
    prefill: str = "mixed"

    @property
    def seats(self) -> int:
        return min(self.max_num_seqs, self.state_slots)


class PromptChunks:
    """The prompt chunks of a round, added up within a budget of tokens; ``parts``: (request, from, to) of each."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.parts: list[tuple[int, int, int]] = []
        self.tokens = self._pairs = self._context = self._sequences = 0

    def add(self, seq: Sequence) -> bool:
        """As much of the rest of a prompt as is left; returns whether that was all of it."""
        done = seq.position
        chunk = min(seq.length - done, self.left)
        self.left -= chunk
        self.tokens += chunk
        self._pairs += chunk * done + chunk * (chunk + 1) // 2
        self._sequences += 1
        seq.position += chunk
        self._context += seq.position
        self.parts.append((seq.request, done, seq.position))
        return seq.position == seq.length

    @property
    def shape(self) -> Prefill:
        return self.tokens, self._pairs, self._context, self._sequences


class Round(NamedTuple):
    """One round as an observer sees it; of towers in tandem, one pass of one ``server``."""

    start_ns: int
    end_ns: int
    denoiser_s: float
    context_s: float
    decoding: int
    extending: int
    prefill: Prefill
    waiting: int
    kv_blocks: int
    server: int = 0  # context servers first
    in_turn: bool = False  # the context forward came first
