"""Text and tokens: the checkpoint's own tokenizer, or bytes for the tiny model."""

from pathlib import Path
from typing import Protocol

from calibrate.model import Config
from twotower_sim.errors import InputError

FIRST_BYTE = 4  # ids below are padding, begin, end and mask


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> bytes: ...


class Bytes:
    """Every byte of UTF-8 is a token."""

    def encode(self, text: str) -> list[int]:
        return [byte + FIRST_BYTE for byte in text.encode()]

    def decode(self, tokens: list[int]) -> bytes:
        return bytes(token - FIRST_BYTE for token in tokens if token >= FIRST_BYTE)


class _HuggingFace:
    """A tokenizer.json."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Loaded

        try:
            self._loaded = Loaded.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{path}: not a tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        return self._loaded.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> bytes:
        return self._loaded.decode(tokens).encode()


def tokenizer_of(folder: Path, config: Config) -> Tokenizer:
    """Raises InputError where a checkpoint brings no tokenizer and its vocabulary is not bytes."""
    if (folder / "tokenizer.json").is_file():
        return _HuggingFace(folder / "tokenizer.json")
    if config.vocab_size == FIRST_BYTE + 256:
        return Bytes()
    raise InputError(f"{folder}: has no tokenizer.json, which text prompts need")
