"""The interface between the engine and any model of time: the aggregate shape of a round in, seconds out.

A round's shape is ``(n, context, n_extend, extend_context)`` and, where it carries prompts,
``(prefill_tokens, prefill_pairs, prefill_context, n_prefill)``:

- ``n``: sequences that take a denoise pass (two towers) or a decode pass (autoregressive),
- ``context``: the tokens that those passes attend to, summed (blocks under denoising not counted),
- ``n_extend``, ``extend_context``: the same for extend passes,
- ``prefill_tokens``: prompt tokens of the round, ``prefill_pairs``: their query-key pairs, ``prefill_context``:
  the tokens that they attend to, their own included, ``n_prefill``: the sequences they belong to.

The answer is ``(denoiser_s, context_s, round_s)``: seconds in which the denoiser (0 if there is none) and the
context tower compute, and seconds from the round's start to its end, host and transfer included.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Cost = tuple[float, float, float]

PASS_NAMES = {
    "two_tower": ("idle", "extend", "prefill", "extend+prefill"),
    "autoregressive": ("idle", "decode", "prefill", "decode+prefill"),
}
"""Names of the context tower's forward by what shares it: index 1 for decoding sequences, + 2 for prompts."""


@dataclass(frozen=True)
class Latency:
    """A model of time. ``decode_many`` must give, element by element, the very floats of ``decode``; where a model does
    not know, it says NaN (its rounds may never run), and ``decode`` raises or counts in ``extrapolated``."""

    decode: Callable[[int, int, int, int], Cost]  # a round without prompts
    decode_many: Callable[..., tuple[Any, Any, Any]]  # the same on int64 arrays (scalars broadcast)
    mixed: Callable[[int, int, int, int, int, int, int, int], Cost]  # a round with prompts
    side_by_side: bool  # the two towers compute at the same time
    extrapolated: Counter[str] = field(
        default_factory=Counter
    )  # rounds by the kind of pass that was beyond measurement

    @classmethod
    def of(
        cls, decode: Callable[..., Callable], tables: tuple[np.ndarray, ...], mixed: Callable, side_by_side: bool
    ) -> "Latency":
        """Both decode costs from one ``decode(maximum, *tables)``: with lists and ``max``, and with arrays."""
        one = decode(max, *(table.tolist() for table in tables))
        return cls(one, decode(np.maximum, *tables), mixed, side_by_side)

    def round(
        self, n: int, context: int, n_extend: int, extend_context: int, prefill: tuple[int, int, int, int]
    ) -> Cost:
        """One round of any shape; ``prefill`` is (tokens, pairs, context, sequences)."""
        if prefill[0]:
            return self.mixed(n, context, n_extend, extend_context, *prefill)
        return self.decode(n, context, n_extend, extend_context)
