"""Prompts to generate on, and tasks to score: JSONL with ``prompt``, a ``class`` and, for a task, its ``answer``."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twotower_sim.errors import InputError


class Prompt(BaseModel):
    """Other keys, such as where a prompt is from, are allowed and ignored."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    prompt: str = Field(min_length=1)
    class_: str = Field(default="mixed", alias="class", min_length=1)
    answer: str | None = None


def read_prompts(path: Path, answers: bool = False) -> list[Prompt]:
    """Raises InputError that names file and line; ``answers``: every line must have one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(Prompt.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "line"
            raise InputError(f"{path}:{number}: {key}: {first['msg'].lower()}") from None
        if answers and not prompts[-1].answer:
            raise InputError(f"{path}:{number}: answer: is missing; a task needs it")
    if not prompts:
        raise InputError(f"{path}: holds no prompts")
    return prompts


def of_lengths(texts: Iterator[list[int]], lengths: Iterable[int]) -> list[torch.Tensor]:
    """Prompts of so many tokens, int64 (T,): the start of the next text each, and more texts where one is too short."""
    out = []
    for length in lengths:
        ids = next(texts)
        while len(ids) < length:
            ids = ids + next(texts)
        out.append(torch.tensor(ids[:length]))
    return out
