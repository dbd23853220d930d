"""What the real decoder commits: generation on prompts at every threshold and T, and how good the text is.

Two figures of quality stand beside each operating point: the share of a task file's answers that it gets right, and how
probable the context tower finds the text (bits per byte), which compares with the autoregressive text's own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from calibrate.commit_fit import Prompt as Fitted
from calibrate.commit_fit import fit_alone, together
from calibrate.generate import Generated, autoregressive, two_tower
from calibrate.journal import Journal
from calibrate.model import Router, Segment, TwoTower
from calibrate.prompts import Prompt
from calibrate.tokens import Tokenizer
from twotower_sim.errors import InputError
from twotower_sim.profile import CommitFigures, CommitRecord, Quality, RoutingFigures

AUTOREGRESSIVE = "autoregressive"
HEAD_ROWS = 512  # positions whose logits are held at once


@dataclass(frozen=True)
class Decoding:
    """What to generate: at every gamma and T, ``new_tokens`` for every prompt, ``batch`` prompts at a time."""

    gammas: list[float]
    steps_per_block: list[int]
    new_tokens: int
    batch: int

    def modes(self) -> Iterator[tuple[Any, ...]]:
        yield (AUTOREGRESSIVE,)
        yield from product(self.gammas, self.steps_per_block)


@dataclass(frozen=True)
class Decoded:
    """What one prompt gave at one operating point. ``right``: of a task, whether the answer was."""

    prompt: int
    blocks: list[list[int]]
    bits: float
    bytes: int
    right: bool | None


def decode_prompts(
    model: TwoTower,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    journal: Journal,
    done: Callable[[int], Any],
) -> tuple[dict[tuple[Any, ...], list[Decoded]], RoutingFigures | None]:
    """Generate on all prompts in every mode, from the journal where it has them; also counts the experts touched."""
    ids = [torch.tensor(tokenizer.encode(p.prompt)) for p in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not len(tokens):
            raise InputError(f"prompt {prompt.prompt!r:.40}: gives no tokens")
    out: dict[tuple[Any, ...], list[Decoded]] = {}
    touched = Touched(model)
    for mode in decoding.modes():
        out[mode] = []
        for low in range(0, len(prompts), decoding.batch):
            part = slice(low, low + decoding.batch)
            key = "decoded", list(mode), low
            if journal.get(*key) is None:
                with touched.counting(mode, len(ids[part])):
                    generated = _generate(model, ids[part], mode, decoding.new_tokens)
                rows = _judged(model, tokenizer, ids[part], prompts[part], generated, low)
                journal.add({"rows": [vars(row) for row in rows], "touched": touched.taken()}, *key)
            entry = journal.get(*key)
            touched.add(entry["touched"])
            out[mode] += [Decoded(**row) for row in entry["rows"]]
            done(len(out[mode]) - low)
    return out, touched.figures()


def _generate(model: TwoTower, ids: Sequence[Tensor], mode: tuple[Any, ...], new_tokens: int) -> list[Generated]:
    if mode == (AUTOREGRESSIVE,):  # without graphs, so that routers can be heard
        return autoregressive(model, ids, new_tokens, graphs=False)
    gamma, steps_per_block = mode
    return two_tower(model, ids, new_tokens, gamma, steps_per_block, graphs=False)


def _judged(model, tokenizer, ids, prompts, generated: list[Generated], low: int) -> list[Decoded]:
    out = []
    for i, (prompt, sequence) in enumerate(zip(prompts, generated, strict=True)):
        text = tokenizer.decode(sequence.tokens)
        said = text.decode(errors="replace").lstrip()
        right = None if prompt.answer is None else said.startswith(prompt.answer.strip())
        bits = text_bits(model, ids[i], torch.tensor(sequence.tokens))
        out.append(Decoded(low + i, sequence.blocks, bits, len(text), right))
    return out


@torch.inference_mode()
def text_bits(model: TwoTower, prompt: Tensor, text: Tensor) -> float:
    """Bits of ``text`` (T,) after ``prompt`` under the context tower."""
    caches, whole = model.cache(1, len(prompt) + len(text)), torch.cat([prompt, text]).to(model.device)
    rows = torch.zeros(1, dtype=torch.int64, device=model.device)
    (hidden,) = model.context_pass([Segment(rows, whole[None, :-1])], caches)
    nats = 0.0
    for low in range(len(prompt) - 1, len(whole) - 1, HEAD_ROWS):
        part = slice(low, min(low + HEAD_ROWS, len(whole) - 1))
        logits = model.context_lm_head(hidden[0, part]).float()
        nats += float(torch.nn.functional.cross_entropy(logits, whole[1:][part], reduction="sum"))
    return nats / math.log(2)


class Touched:
    """Counts the distinct experts of a layer that passes touch: of denoise passes over the positions of whole blocks,
    of autoregressive steps over single tokens of different sequences."""

    def __init__(self, model: TwoTower) -> None:
        self._model, self._most = model, model.config.n_routed_experts
        self._now: dict[str, dict[str, list[int]]] = {}
        self._all: dict[str, dict[int, list[int]]] = {"blocks": {}, "singles": {}}

    @contextmanager
    def counting(self, mode: tuple[Any, ...], sequences: int) -> Iterator[None]:
        """Listen to the routers of the tower that decodes in ``mode``."""
        self._now = {}
        alone = mode == (AUTOREGRESSIVE,)
        tower = self._model.context_tower if alone else self._model.denoiser_tower

        def hear(router: torch.nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            if not alone:
                self._count("blocks", output[0])
            elif len(output[0]) <= sequences:  # else prompts are read
                self._count("singles", output[0])

        handles = [m.register_forward_hook(hear) for m in tower.modules() if isinstance(m, Router)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, curve: str, experts: Tensor) -> None:
        entry = self._now.setdefault(curve, {}).setdefault(str(len(experts)), [0, 0])
        entry[0] += len(experts.unique())
        entry[1] += 1

    def taken(self) -> dict[str, dict[str, list[int]]]:
        return self._now

    def add(self, counted: dict[str, dict[str, list[int]]]) -> None:
        for curve, entries in counted.items():
            for tokens, (distinct, passes) in entries.items():
                total = self._all[curve].setdefault(int(tokens), [0, 0])
                total[0] += distinct
                total[1] += passes

    def figures(self) -> RoutingFigures | None:
        """Means by number of tokens; None where no layer has experts or nothing was generated."""
        if not self._all["blocks"] or not self._all["singles"]:
            return None
        curves = {
            curve: {tokens: distinct / passes for tokens, (distinct, passes) in sorted(entries.items())}
            for curve, entries in self._all.items()
        }
        config = self._model.config
        return RoutingFigures(experts=self._most, experts_per_token=config.num_experts_per_tok, **curves)


# ---------------------------------------------------------------------- into the profile


def records(decoded: dict[tuple[Any, ...], list[Decoded]], prompts: Sequence[Prompt]) -> list[CommitRecord]:
    return [
        CommitRecord(
            **{"class": prompts[row.prompt].class_},
            prompt=row.prompt,
            gamma=mode[0],
            steps_per_block=mode[1],
            blocks=row.blocks,
        )
        for mode, rows in decoded.items()
        if mode != (AUTOREGRESSIVE,)
        for row in rows
    ]


def quality(decoded: dict[tuple[Any, ...], list[Decoded]], prompts: Sequence[Prompt], task: str) -> list[Quality]:
    """Of every class at every operating point."""
    out = []
    for class_ in sorted({prompt.class_ for prompt in prompts}):
        own = _figures(decoded[AUTOREGRESSIVE,], prompts, class_)
        for mode, rows in decoded.items():
            if mode == (AUTOREGRESSIVE,):
                continue
            bits, score = _figures(rows, prompts, class_)
            out.append(
                Quality(
                    **{"class": class_},
                    gamma=mode[0],
                    steps_per_block=mode[1],
                    score=score,
                    task=None if score is None else f"{task}; autoregressive {own[1]:.3f}",
                    bits_per_byte=bits,
                    autoregressive_bits_per_byte=own[0],
                )
            )
    return out


def _figures(rows: list[Decoded], prompts: Sequence[Prompt], class_: str) -> tuple[float | None, float | None]:
    mine = [row for row in rows if prompts[row.prompt].class_ == class_]
    written = sum(row.bytes for row in mine)
    judged = [row.right for row in mine if row.right is not None]
    return (
        sum(row.bits for row in mine) / written if written else None,
        sum(judged) / len(judged) if judged else None,
    )


def fitted(found: list[CommitRecord], block_size: int) -> CommitFigures:
    """The commit law of what was recorded, fitted to each class by itself: classes differ in more than difficulty.
    Blocks that EOS may have cut short of others count like any."""
    alone = []
    for class_ in sorted({record.class_ for record in found}):
        mine = [Fitted(r.class_, r.gamma, r.steps_per_block, r.blocks) for r in found if r.class_ == class_]
        alone.append(fit_alone(mine, block_size))
    return together(alone)
