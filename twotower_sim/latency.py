"""The interface between the engine and any model of time: aggregate shape of a round in, seconds out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

PASS_NAMES = {
    "two_tower": ("idle", "extend", "prefill", "extend+prefill"),
    "autoregressive": ("idle", "decode", "prefill", "decode+prefill"),
}
"""Names of the context tower's forward by what shares it: index 1 for decoding sequences, 2 for prompts."""


@dataclass(frozen=True)
class Latency:
    """Cost of a round, twice: for one round of plain numbers, and for many rounds at once on arrays.

    Both take ``(n, context, n_extend, extend_context, prefill_tokens, prefill_pairs, n_prefill)``:

    - ``n``: sequences that take a denoise pass (two towers) or a decode pass (autoregressive),
    - ``context``: the tokens that those passes attend to, summed (blocks under denoising not counted),
    - ``n_extend``, ``extend_context``: the same for extend passes,
    - ``prefill_tokens``: prompt tokens of the round, ``prefill_pairs``: their query-key pairs,
      ``n_prefill``: the sequences they belong to,

    and return ``(denoiser_s, context_s, round_s)``: seconds in which the denoiser and the context tower
    compute, and seconds from the round's start to its end, host and transfer included. ``many`` takes
    integer arrays (or scalars, broadcast) and must give, element by element, the very floats of ``one``:
    the engine's exactness rests on it. Build both from one formula.
    """

    one: Callable[..., tuple[float, float, float]]
    many: Callable[..., tuple[Any, Any, Any]]
    side_by_side: bool = False  # the two towers compute at the same time

    @classmethod
    def of(cls, formula: Callable[..., Callable], tables: tuple[np.ndarray, ...], side_by_side: bool) -> "Latency":
        """Both costs from one ``formula(maximum, *tables)``: lists and ``max`` for one round, arrays for many."""
        one = formula(max, *(table.tolist() for table in tables))
        return cls(one, formula(np.maximum, *tables), side_by_side)
