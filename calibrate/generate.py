"""Generation with the real model: by blocks of two towers, by mock-AR, and autoregressively; batched and exact.

Every sequence has its own position, context length and step: one that resolves its block extends and goes on while the
others still denoise, so that a batch gives each sequence the tokens that it would get alone. Tokens past EOS, and past
the limit, are discarded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibrate.graphs import Passes
from calibrate.kernels import commit, confidence
from calibrate.model import TwoTower


@dataclass
class Generated:
    """What one sequence gave."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)  # sizes of the commits of every step, by block
    forwards: int = 0  # denoiser forwards; autoregressive: context tower steps after the prefill


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0. Confidence is the probability of the chosen token at temperature 1."""

    temperature: float = 0.0
    generator: torch.Generator | None = None

    def choose(self, logits: Tensor, banned: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (rows,) int64 and their probabilities (rows,) fp32 from logits (rows, V), ``banned`` excluded."""
        if not self.temperature:
            return confidence(logits, -1 if banned is None else banned)
        logits = logits.float()
        if banned is not None:
            logits = logits.index_fill(-1, torch.tensor([banned], device=logits.device), -torch.inf)
        tokens = torch.multinomial((logits / self.temperature).softmax(-1), 1, generator=self.generator)
        return tokens[:, 0], logits.softmax(-1).gather(-1, tokens)[:, 0]


GREEDY = Sampling()


class Blocks:
    """The blocks that a batch of sequences has under work; the decoding rule of arXiv 2606.26493."""

    def __init__(
        self, model: TwoTower, sequences: int, gamma: float, steps_per_block: int, block_size: int | None = None
    ) -> None:
        """``block_size`` None: the model's."""
        config, device = model.config, model.denoiser_device
        self._mask, self._steps = config.mask_token_id, steps_per_block
        self.ids = torch.full((sequences, block_size or config.block_size), self._mask, device=device)
        self._step = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._gamma = torch.full((sequences,), gamma, device=device)

    def start(self, rows: Tensor, gammas: Sequence[float] | None = None) -> None:
        """Blocks of masks; ``gammas`` (B,) None: as before."""
        self.ids[rows] = self._mask
        self._step[rows] = 0
        if gammas is not None:
            self._gamma[rows] = torch.tensor(gammas, device=self.ids.device)

    def denoise(self, rows: Tensor, passes: Passes, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """One step of the blocks of ``rows`` (B,): how many positions each committed, and whether it is done (B,)."""
        ids = self.ids[rows]
        masked = (ids == self._mask).sum(-1)
        logits = passes.denoise(ids, rows, masked / ids.shape[1])
        tokens, sure = sampling.choose(logits.flatten(0, 1), banned=self._mask)
        steps_left = (self._steps - self._step[rows]).clamp(min=1)  # a block that is done may be taken along
        committed = commit(ids, tokens.view_as(ids), sure.view_as(ids), self._gamma[rows], steps_left, self._mask)
        self.ids[rows] = ids
        self._step[rows] += 1
        return committed, committed == masked


def two_tower(
    model: TwoTower,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    gamma: float,
    steps_per_block: int,
    sampling: Sampling = GREEDY,
    graphs: bool = True,
) -> list[Generated]:
    """Generate by blocks. ``prompts`` are int64 (T,), each at least one token long."""
    size, eos, device = model.config.block_size, model.config.eos_token_id, model.denoiser_device
    passes, out = _prefilled(model, prompts, max_new_tokens, graphs)[0], [Generated() for _ in prompts]
    blocks = Blocks(model, len(prompts), gamma, min(steps_per_block, size))
    for sequence in out:
        sequence.blocks.append([])
    working = list(range(len(prompts)))
    while working:
        rows = torch.tensor(working, device=device)
        committed, done = (column.tolist() for column in blocks.denoise(rows, passes, sampling))
        for row, size_of_commit in zip(working, committed, strict=True):
            out[row].blocks[-1].append(size_of_commit)
            out[row].forwards += 1
        resolved = [row for row, is_done in zip(working, done, strict=True) if is_done]
        ended = set()
        for row in resolved:
            fresh = blocks.ids[row].tolist()
            out[row].tokens += fresh
            if len(out[row].tokens) >= max_new_tokens or eos in fresh:
                ended.add(row)
        if going_on := [row for row in resolved if row not in ended]:
            rows = torch.tensor(going_on, device=device)
            passes.extend(blocks.ids[rows].to(model.device), rows.to(model.device))
            blocks.start(rows)
            for row in going_on:
                out[row].blocks.append([])
        working = [row for row in working if row not in ended]
    return _cut(out, max_new_tokens, eos)


def autoregressive(
    model: TwoTower,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    graphs: bool = True,
) -> list[Generated]:
    """Generate with the context tower alone, a token a step."""
    return _token_by_token(model, prompts, max_new_tokens, sampling, graphs, mock=False)


def mock_ar(
    model: TwoTower, prompts: Sequence[Tensor], max_new_tokens: int, sampling: Sampling = GREEDY
) -> list[Generated]:
    """Generate with the denoiser in the autoregressive model's place; the context tower reads every token after it."""
    return _token_by_token(model, prompts, max_new_tokens, sampling, graphs=True, mock=True)


def _token_by_token(
    model: TwoTower, prompts: Sequence[Tensor], max_new_tokens: int, sampling: Sampling, graphs: bool, mock: bool
) -> list[Generated]:
    # the mock predicts from the last token of the prompt, which the cache must not hold yet
    passes, logits = _prefilled(model, [p[:-1] for p in prompts] if mock else prompts, max_new_tokens, graphs)
    out, eos = [Generated() for _ in prompts], model.config.eos_token_id
    working = list(range(len(prompts)))
    latest = torch.stack([p[-1] for p in prompts]).to(model.device)
    while working:
        rows = torch.tensor(working, device=model.device)
        if mock:
            logits = model.mock_decode(latest, rows, passes.caches)
            passes.extend(latest[:, None], rows)
        tokens = sampling.choose(logits)[0].to(model.device)
        going_on = []
        for i, (row, token) in enumerate(zip(working, tokens.tolist(), strict=True)):
            out[row].tokens.append(token)
            out[row].forwards += mock
            if len(out[row].tokens) < max_new_tokens and token != eos:
                going_on.append(i)
        working, latest = [working[i] for i in going_on], tokens[going_on]
        if working and not mock:
            logits = passes.decode(latest, torch.tensor(working, device=model.device))
            for row in working:
                out[row].forwards += 1
    return _cut(out, max_new_tokens, eos)


def _prefilled(model: TwoTower, prompts: Sequence[Tensor], max_new_tokens: int, graphs: bool) -> tuple[Passes, Tensor]:
    """Passes over caches that hold the prompts, and the logits of their last positions. A prompt of no tokens stays
    empty."""
    caches = model.cache(len(prompts) + 1, max(len(p) for p in prompts) + max_new_tokens)
    rows = [row for row, prompt in enumerate(prompts) if len(prompt)]
    logits = torch.empty(0)
    if rows:
        logits = model.prefill([prompts[row].to(model.device) for row in rows], rows, caches)
    return Passes(model, caches, graphs), logits


def _cut(out: list[Generated], max_new_tokens: int, eos: int | None) -> list[Generated]:
    for sequence in out:
        end = sequence.tokens.index(eos) + 1 if eos in sequence.tokens else max_new_tokens
        del sequence.tokens[min(end, max_new_tokens) :]
    return out
