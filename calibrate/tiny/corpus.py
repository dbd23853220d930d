"""Text for the tiny two-tower: the Python standard library's own sources, and templates filled with words from them.

    python -m calibrate.tiny.corpus PROMPTS.jsonl

Tokens are bytes after the four special ones. Held out are a twentieth of the files and a twentieth of the words,
chosen by a hash of their names, so that no template of a held-out word is ever trained on.
"""

import argparse
import json
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

PAD, BOS, EOS, MASK = range(4)
SPECIAL = 4
VOCABULARY = SPECIAL + 256

PROMPT_BYTES, REFERENCE_BYTES = 128, 256
PROMPTS_PER_CLASS = 24

_TEMPLATE_BYTES = 1500
_HELD_OUT = 20  # one of so many
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data"}
_INDENT = re.compile(r"^(?: {4})+", re.MULTILINE)
_LONGEST_RUN = 4
_RUN = re.compile(rf"(.)\1{{{_LONGEST_RUN},}}")
_WORD = re.compile(r"\b[a-z]{4,9}\b")


def encode(text: str) -> list[int]:
    return [SPECIAL + byte for byte in text.encode()]


def decode(tokens: Sequence[int]) -> str:
    """Special tokens are left out, and what is no UTF-8 is replaced."""
    return bytes(token - SPECIAL for token in tokens if token >= SPECIAL).decode(errors="replace")


# ---------------------------------------------------------------------- sources


class Corpus(NamedTuple):
    """One side of the split."""

    sources: list[str]
    words: list[str]


def split(root: Path | None = None) -> tuple[Corpus, Corpus]:
    """What is trained on and what is held out, from the Python files under ``root`` (the standard library)."""
    training: list[str] = []
    held_out: list[str] = []
    for name, text in _sources(root or Path(sysconfig.get_path("stdlib"))):
        (held_out if _is_held_out(name) else training).append(text)
    words = sorted({word for text in training for word in _WORD.findall(text)})
    return (
        Corpus(training, [word for word in words if not _is_held_out(word)]),
        Corpus(held_out, [word for word in words if _is_held_out(word)]),
    )


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    """Names relative to ``root`` and texts, in the order of names."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _SKIPPED.intersection(name.parts):
            yield name.as_posix(), _condensed(path.read_text(encoding="utf-8", errors="ignore"))


def _condensed(text: str) -> str:
    """Indented by tabs and without long runs of one character: those are so likely, once begun, that a model which
    takes the likeliest byte would never leave them."""
    text = _INDENT.sub(lambda spaces: "\t" * (len(spaces[0]) // 4), text)
    return _RUN.sub(lambda run: run[1] * _LONGEST_RUN, text)


def _is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % _HELD_OUT == 0


# ---------------------------------------------------------------------- templates

Row = Callable[[int], str]


def log_lines(word: Callable[[], str], random: Random) -> Row:
    service, action = word(), word()
    return lambda i: f"[{i:04d}] INFO {service}.{action}: request {i} finished, status=200\n"


def json_rows(word: Callable[[], str], random: Random) -> Row:
    key, values = word(), (word(), word())
    return lambda i: f'{{"id": {i}, "{key}": "{values[i % 2]}", "next": {i + 1}}},\n'


def accessors(word: Callable[[], str], random: Random) -> Row:
    noun = word()
    return lambda i: f"\tdef get_{noun}_{i}(self):\n\t\treturn self._{noun}_{i}\n\n"


def multiplications(word: Callable[[], str], random: Random) -> Row:
    function, factor = word(), random.randrange(2, 10)
    return lambda i: f"\tassert {function}({i}, {factor}) == {i * factor}\n"


def constants(word: Callable[[], str], random: Random) -> Row:
    name = word().upper()
    return lambda i: f"{name}_{i:03d} = {i}\n"


def insertions(word: Callable[[], str], random: Random) -> Row:
    table, column, value = word(), word(), word()
    return lambda i: f"INSERT INTO {table} (id, {column}) VALUES ({i}, '{value}');\n"


TEMPLATES = (log_lines, json_rows, accessors, multiplications, constants, insertions)


def templates(words: Sequence[str], random: Random) -> Iterator[str]:
    """Texts of numbered rows, without end: what follows two rows of one is determined."""
    while True:
        row = random.choice(TEMPLATES)(lambda: random.choice(words), random)
        rows, text = map(row, count(random.randrange(1, 500))), ""
        while len(text) < _TEMPLATE_BYTES:
            text += next(rows)
        yield text


# ---------------------------------------------------------------------- tokens and prompts


def tokens(corpus: Corpus, seed: int) -> np.ndarray:
    """All sources, and as many bytes of templates, each text ended by EOS: uint16 (tokens,)."""
    half = sum(len(text) for text in corpus.sources)
    out = [_ended(text) for text in corpus.sources]
    made = 0
    for text in templates(corpus.words, Random(seed)):
        if made >= half:
            break
        out.append(_ended(text))
        made += len(text)
    return np.concatenate(out)


def _ended(text: str) -> np.ndarray:
    return np.append(np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + SPECIAL, np.uint16(EOS))


def texts(held_out: Corpus, seed: int) -> dict[str, Iterator[str]]:
    """Texts of both classes without end, of at least a prompt and its reference."""
    random = Random(seed)
    return {"template": templates(held_out.words, random), "code": _excerpts(held_out.sources, random)}


def prompts(held_out: Corpus, seed: int) -> list[dict[str, str]]:
    """Prompts of both classes with their true continuations, all of them ASCII; the next two lines of a template, which
    are determined, are its answer."""
    out = []
    for class_, of_class in texts(held_out, seed).items():
        for text in islice(of_class, PROMPTS_PER_CLASS):
            reference = text[PROMPT_BYTES:][:REFERENCE_BYTES]
            row = {"class": class_, "prompt": text[:PROMPT_BYTES], "reference": reference}
            if class_ == "template":
                row["answer"] = "\n".join(reference.strip().split("\n")[:2])
            out.append(row)
    return out


def _excerpts(sources: Sequence[str], random: Random) -> Iterator[str]:
    """Pieces of sources from the start of a line on, one of each in turn, without end."""
    length = PROMPT_BYTES + REFERENCE_BYTES
    long = [text for text in sources if text.isascii() and len(text) > 4 * length]
    for text in cycle(random.sample(long, len(long))):
        start = text.find("\n", random.randrange(len(text) - 2 * length)) + 1
        if start + length <= len(text):
            yield text[start : start + length]


def main() -> None:
    parser = argparse.ArgumentParser(description=prompts.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = prompts(split()[1], options.seed)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
