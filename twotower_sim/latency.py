"""The interface between the engine and any model of time: the aggregate shape of a round in, seconds out.

A round's shape is ``(n, context, n_extend, extend_context)`` and, where it carries prompts,
``(prefill_tokens, prefill_pairs, prefill_context, n_prefill)``:

- ``n``: sequences that take a denoise pass (two towers) or a decode pass (autoregressive),
- ``context``: the tokens that those passes attend to, summed (blocks under denoising not counted),
- ``n_extend``, ``extend_context``: the same for extend passes,
- ``prefill_tokens``: prompt tokens of the round, ``prefill_pairs``: their query-key pairs, ``prefill_context``:
  the tokens that they attend to, their own included, ``n_prefill``: the sequences they belong to.

The answer is ``(denoiser_s, context_s, round_s)``: seconds in which the denoiser (in speculative decoding the
drafter; 0 if there is none) and the context tower compute, and seconds from the round's start to its end, host and
transfer included.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Cost = tuple[float, float, float]
Prefill = tuple[int, int, int, int]
"""The prompt side of a round: tokens, their query-key pairs, the tokens they attend to, their sequences."""
NO_PREFILL: Prefill = (0, 0, 0, 0)

PASS_NAMES = {
    "two_tower": ("idle", "extend", "prefill", "extend+prefill"),
    "autoregressive": ("idle", "decode", "prefill", "decode+prefill"),
    "mock_ar": ("idle", "decode", "prefill", "decode+prefill"),
    "speculative": ("idle", "verify", "prefill", "verify+prefill"),
    "block_diffusion": ("idle", "decode", "prefill", "decode+prefill"),
}
"""Names of the context tower's forward by what shares it: index 1 for decoding sequences, + 2 for prompts."""
OTHER_PASS = {"two_tower": "denoise", "mock_ar": "denoise", "speculative": "draft"}
"""Name of a round's other pass, where there is one: the denoiser's, or the drafter's."""


@dataclass(frozen=True)
class Host:
    """Host time of a round: before its passes, or, ``hidden``, while the GPUs work on them; ``wake_s`` before the first
    round after an idle time."""

    seconds: float = 0.0
    hidden: bool = False
    wake_s: float = 0.0

    def around(self, maximum: Callable, passes_s: Any) -> Any:
        """A round's length; ``maximum`` is ``max``, or ``np.maximum`` for arrays."""
        return maximum(self.seconds, passes_s) if self.hidden else self.seconds + passes_s


def no_transfer(states: Any, tokens: Any) -> float:
    return 0.0


@dataclass(frozen=True)
class Latency:
    """A model of time. ``decode_many`` must give, element by element, the very floats of ``decode``; where a model does
    not know, it says NaN (its rounds may never run), and ``decode`` raises or counts in ``extrapolated``."""

    decode: Callable[[int, int, int, int], Cost]  # a round without prompts
    decode_many: Callable[..., tuple[Any, Any, Any]]  # the same on int64 arrays (scalars broadcast)
    mixed: Callable[[int, int, int, int, int, int, int, int], Cost]  # a round with prompts
    side_by_side: bool  # the two towers compute at the same time
    host: Host = Host()
    transfer: Callable[[Any, Any], Any] = no_transfer  # (states, tokens) from tower to tower, to seconds
    one_forward: bool = False  # blocks are denoised in the context tower's own forward, beside extends and prompts
    extrapolated: Counter[str] = field(
        default_factory=Counter
    )  # rounds by the kind of pass that was beyond measurement

    @classmethod
    def of(cls, decode: Callable[..., Callable], tables: tuple[np.ndarray, ...], mixed: Callable, **more) -> "Latency":
        """Both decode costs from one ``decode(maximum, *tables)``: with lists and ``max``, and with arrays."""
        one = decode(max, *(table.tolist() for table in tables))
        return cls(one, decode(np.maximum, *tables), mixed, **more)

    def slowed(self, factor: float) -> "Latency":
        """The same on a machine on which everything takes ``factor`` as long."""

        def of(cost: Callable) -> Callable:
            return lambda *shape: tuple(factor * seconds for seconds in cost(*shape))

        transfer, host = self.transfer, self.host
        return replace(
            self,
            decode=of(self.decode),
            decode_many=of(self.decode_many),
            mixed=of(self.mixed),
            host=Host(factor * host.seconds, host.hidden, factor * host.wake_s),
            transfer=lambda states, tokens: factor * transfer(states, tokens),
        )

    def round(self, n: int, context: int, n_extend: int, extend_context: int, prefill: Prefill) -> Cost:
        """One round of any shape; ``prefill`` is (tokens, pairs, context, sequences)."""
        if prefill[0]:
            return self.mixed(n, context, n_extend, extend_context, *prefill)
        return self.decode(n, context, n_extend, extend_context)

    def forwards(
        self,
        count: int,
        in_turn: bool,
        n: int,
        context: int,
        n_extend: int,
        extend_context: int,
        prefill: Prefill,
        sent: int,
    ) -> Cost:
        """A round of ``count`` denoise passes of the same ``n`` sequences and one context forward that sends ``sent``
        tokens to the denoiser: beside each other, or, ``in_turn``, the context forward first."""
        denoise_s, shared_s, _ = self.decode(n, context, 0, 0)
        if in_turn:
            denoiser_s, context_s = 0.0, self.round(0, 0, n_extend, extend_context, prefill)[1]
        else:
            denoiser_s, context_s, _ = self.round(n, context, n_extend, extend_context, prefill)
            count -= 1
        denoiser_s, context_s = denoiser_s + count * denoise_s, context_s + count * shared_s
        sent_s = context_s + self.transfer(n_extend + prefill[3], sent)
        beside = self.side_by_side and not in_turn
        passes_s = max(denoiser_s, sent_s) if beside else denoiser_s + sent_s
        return denoiser_s, context_s, self.host.around(max, passes_s)
