"""Which shapes of passes to measure, and what they take of memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from calibrate.model import Config, TwoTower
from twotower_sim.profile import AXES

MOST_PROMPTS = 4  # prompts in one prefill


@dataclass(frozen=True)
class Point:
    """A shape of one kind of pass; ``values`` along its axes."""

    kind: str
    values: tuple[int, ...]

    def __getattr__(self, axis: str) -> int:
        axes = AXES[self.kind]
        if axis not in axes:
            raise AttributeError(axis)
        return self.values[axes.index(axis)]


@dataclass(frozen=True)
class Shapes:
    """The values along each axis. Mixed passes are measured at one context, ``at_context``."""

    sequences: list[int]
    context: list[int]
    tokens: list[int]
    block_sizes: list[int]

    @property
    def at_context(self) -> int:
        return self.context[len(self.context) // 2]

    def axes(self, split: bool) -> dict[str, dict[str, list[int]]]:
        """Every kind of pass with its axes."""
        prompts = [n for n in self.sequences if n <= MOST_PROMPTS]
        values = {"block_size": self.block_sizes, "sequences": self.sequences, "context": self.context}
        out = {kind: {axis: values[axis] for axis in AXES[kind]} for kind in ("denoise", "extend", "decode")}
        out["prefill"] = {"sequences": prompts, "tokens": self.tokens, "context": self.context}
        for kind in ("extend+prefill", "decode+prefill"):
            out[kind] = {"sequences": self.sequences, "tokens": self.tokens}
        if split:
            out["transfer"] = {"sequences": self.sequences, "tokens": sorted({*self.block_sizes, *self.tokens})}
        return out


def points(axes: dict[str, dict[str, list[int]]]) -> Iterator[Point]:
    for kind, values in axes.items():
        for point in product(*values.values()):
            yield Point(kind, point)


def context_of(point: Point, at_context: int) -> int:
    """Tokens that the sequences of a point have in the cache, on average."""
    return point.context if "context" in AXES[point.kind] else at_context


def contexts_of(point: Point, at_context: int) -> list[int]:
    """Tokens that each sequence of a point has in the cache: spread evenly from 0 to twice their mean, as sequences of
    a serving engine are; a single one has the mean."""
    mean, n = context_of(point, at_context), point.sequences
    return [mean * (2 * i + 1) // n for i in range(n)]


def new_tokens(point: Point, block_size: int) -> int:
    """Tokens that a point adds to the cache, at most, of one sequence."""
    return max([size for axis in ("tokens", "block_size") if (size := getattr(point, axis, 0))] or [block_size])


# ---------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Sizes:
    """What the model takes, in bytes, and its parameters that a token uses; all of one tower."""

    tower_bytes: int
    routed_bytes: int
    active: int
    state_bytes: int
    token_bytes: int

    @classmethod
    def of(cls, config: Config, dtype: torch.dtype) -> "Sizes":
        with torch.device("meta"):
            model = TwoTower(config)
            cache = model.cache(1, 1).context
        size = dtype.itemsize
        tower = sum(p.numel() for p in model.context_tower.parameters()) + model.context_lm_head.weight.numel()
        routed = sum(p.numel() for name, p in model.context_tower.named_parameters() if ".experts." in name)
        share = config.num_experts_per_tok / max(config.n_routed_experts, 1)
        scale = size / torch.float32.itemsize  # the cache above is of fp32
        states = sum(state[0].numel() for state in cache.conv.values()) * size
        states += sum(state[0].numel() for state in cache.ssm.values()) * 4
        return cls(
            tower * size, routed * size, int(tower - routed * (1 - share)), states, int(cache.token_bytes * scale)
        )


def cache_bytes(points: Sequence[Point], at_context: int, sizes: Sizes, block_size: int) -> int:
    """What one cache for any of ``points`` takes on each device."""
    held = max(contexts_of(point, at_context)[-1] + 2 * new_tokens(point, block_size) for point in points)
    return (max(point.sequences for point in points) + 1) * (sizes.state_bytes + held * sizes.token_bytes)
