"""Measured latency: seconds of every pass from a profile's grids, and nothing beyond them unless told so.

A pass takes what its grid says, linear between measured points and exact at them, over the number of sequences and
the mean context (and new tokens) of each. Where noise makes medians fall along an axis, the running maximum is taken.
A forward of the context tower that carries sequences (extends or decodes, ``e`` seconds alone) and prompts (``p``):

    max(e, p) + rho(sequences, prompt tokens) min(e, p),    rho >= 0

where rho is such that the profile's grid of that mix is met. Inside an engine passes take longer than alone, by ratios
that the profile may hold, and so does the mix of what its parts then take. Towers on the same device take turns; apart,
a round ends when both have finished and the context tower has sent its states and new keys and values over.

Outside of what was measured (beyond an axis, or beside a point without a time) a single round raises InputError. With
``extrapolate`` it is counted, and the last segment goes on: upwards with its slope, downwards flat, rho as at the
nearest point (1, one after the other, if there is none). An array of rounds, which may never run, says NaN there.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from twotower_sim.errors import InputError
from twotower_sim.latency import Host, Latency, no_transfer
from twotower_sim.paired import paired
from twotower_sim.profile import Grid, MeasuredLatency

Points = Sequence[Sequence[int]]
Sums = tuple[Callable, Callable]
"""Seconds of (sequences, sum of their tokens): for numbers, and for arrays."""


@dataclass(frozen=True)
class Hull:
    """What to do outside of what was measured, and how often it was done, by kind of pass."""

    profile: str
    extrapolate: bool = False
    left: Counter[str] = field(default_factory=Counter)

    def leave(self, name: str, axes: dict[str, list[int]], point: tuple[float, ...]) -> None:
        """Count a pass at ``point``, or raise InputError."""
        if not self.extrapolate:
            asked = ", ".join(f"{axis} {value:g}" for axis, value in zip(axes, point, strict=True))
            known = ", ".join(f"{axis} {points[0]} to {points[-1]}" for axis, points in axes.items())
            gap = all(points[0] <= value <= points[-1] for points, value in zip(axes.values(), point, strict=True))
            raise InputError(
                f"latency.path {self.profile}: {name} was not measured at {asked}; it was at {known}"
                f"{', but not at all points around this' if gap else ''}; set latency.extrapolate to go beyond"
            )
        self.left[name] += 1


def rising(seconds: np.ndarray) -> np.ndarray:
    """The running maximum along every axis; NaN where ``seconds`` is."""
    highest = seconds
    for axis in range(seconds.ndim):
        highest = np.fmax.accumulate(highest, axis=axis)
    return np.where(np.isnan(seconds), np.nan, highest)


def continued(points: Points, seconds: np.ndarray) -> np.ndarray:
    """Rising ``seconds`` with the gaps filled: linear between known ones, beyond them on with the slope (but not above
    one that is known further on), before them flat."""

    def fill(line: np.ndarray, at: np.ndarray, least: int) -> np.ndarray:
        known = np.flatnonzero(~np.isnan(line))
        if len(known) < least:
            return line
        beyond = np.maximum(at - at[known[-1]], 0)
        last = known[-2:]
        slope = (line[last[-1]] - line[last[0]]) / max(at[last[-1]] - at[last[0]], 1)
        return np.interp(at, at[known], line[known]) + beyond * slope

    filled = seconds
    for least in (2, 1):  # a single point gives no slope: only where no other axis does
        for axis in reversed(range(seconds.ndim)):
            filled = np.apply_along_axis(fill, axis, filled, np.array(points[axis]), least)
    ceiling = np.flip(-rising(-np.flip(np.nan_to_num(seconds, nan=np.inf))))  # the least known of what follows
    return np.minimum(rising(filled), ceiling)


def between(points: Points, seconds: Any, point: Sequence[float], beyond: bool = False) -> float:
    """Multilinear interpolation in nested lists; outside of the points NaN, or ``beyond`` them on with the slope."""
    if not points:
        return seconds
    axis, x = points[0], max(point[0], points[0][0]) if beyond else point[0]
    at = bisect_right(axis, x) - 1
    if at < 0:
        return float("nan")
    low = between(points[1:], seconds[at], point[1:], beyond)
    if axis[at] == x or (len(axis) == 1 and beyond):
        return low
    if at + 1 == len(axis):
        if not beyond:
            return float("nan")
        at, low = at - 1, between(points[1:], seconds[at - 1], point[1:], beyond)
    high = between(points[1:], seconds[at + 1], point[1:], beyond)
    rise = max(high - low, 0.0) if beyond else high - low  # lines that go on with their slopes may cross
    return low + (x - axis[at]) / (axis[at + 1] - axis[at]) * rise


class PassTime:
    """Seconds of one kind of pass over the axes of its grid but the block size, which is one of the measured."""

    def __init__(
        self, name: str, grid: Grid, hull: Hull, block_size: int | None = None, ratios: np.ndarray | None = None
    ) -> None:
        """``ratios``: of what a pass takes over what the grid says, by its sequences."""
        axes, seconds = dict(grid.axes), grid.seconds()
        if sizes := axes.pop("block_size", None):
            if block_size not in sizes:
                known = ", ".join(map(str, sizes))
                raise InputError(
                    f"decoding.block_size: found {block_size}; {hull.profile}: {name} was measured at {known}"
                )
            seconds = seconds[sizes.index(block_size)]
        self.name, self.axes, self.points, self._hull = name, axes, tuple(axes.values()), hull
        self._alone = rising(seconds).tolist()
        if ratios is not None:
            seconds = seconds * ratios.reshape(-1, *[1] * (seconds.ndim - 1))
        self._seconds = rising(seconds)
        self._measured, self._continued = self._seconds.tolist(), continued(self.points, self._seconds).tolist()

    def measured(self, *point: float) -> float:
        """Seconds at a point by the grid, whatever the ratios; NaN outside."""
        return between(self.points, self._alone, point)

    def __call__(self, *point: float) -> float:
        """Seconds at a point; outside, as the module's text says."""
        seconds = between(self.points, self._measured, point)
        if seconds == seconds:
            return seconds
        self._hull.leave(self.name, self.axes, point)
        return between(self.points, self._continued, point, beyond=True)

    def of_sums(self, most: int) -> tuple[Callable, Callable]:
        """Seconds of (sequences, sum of their contexts), of no sequences 0: for numbers as ``__call__``, and from the
        same formula for arrays, with NaN outside. ``most``: the largest number of sequences asked for."""
        tables = _segments(np.array(self.points[1]), _rows(np.array(self.points[0]), self._seconds, most))
        inside = _lookup(bisect_right, max, *(table.tolist() for table in tables))

        def one(n: int, total: int) -> float:
            seconds = inside(n, total)
            return seconds if seconds == seconds else self(n, total / n)

        return one, _lookup(partial(np.searchsorted, side="right"), np.maximum, *tables)


def _rows(known: np.ndarray, seconds: np.ndarray, most: int) -> np.ndarray:
    """Lines of 0 … ``most`` sequences between the measured ones: (most + 1, contexts)."""
    n = np.arange(most + 1)
    low = np.clip(np.searchsorted(known, n, side="right") - 1, 0, len(known) - 1)
    high = np.minimum(low + 1, len(known) - 1)
    share = ((n - known[low]) / np.maximum(known[high] - known[low], 1))[:, None]
    rows = seconds[low] + np.where(share == 0, 0, share * (seconds[high] - seconds[low]))
    rows[(n < known[0]) | (n > known[-1])] = np.nan
    rows[0] = 0
    return rows


def _segments(known: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Lines through the points of each row as flat tables: (edges, origins, values, slopes).

    The columns are, in turn, all below the first point, that point, the open interval after it, the second point, …,
    all above the last: so a point is exact even beside one that is missing.
    """
    edges = np.stack((known, np.nextafter(known.astype(np.float64), np.inf)), axis=1).ravel()
    values, slopes = np.full((len(rows), len(edges) + 1), np.nan), np.zeros((len(rows), len(edges) + 1))
    origins = np.zeros(len(edges) + 1)
    values[:, 1::2], values[:, 2:-1:2] = rows, rows[:, :-1]
    origins[1::2], origins[2:-1:2] = known, known[:-1]
    slopes[:, 2:-1:2] = np.diff(rows, axis=1) / np.diff(known)
    values[0] = 0
    return edges, origins, values.ravel(), slopes.ravel()


def _lookup(find: Callable, maximum: Callable, edges: Any, origins: Any, values: Any, slopes: Any) -> Callable:
    width = len(origins)

    def seconds(n, total):
        mean = total / maximum(n, 1)
        column = find(edges, mean)
        at = n * width + column
        return values[at] + (mean - origins[column]) * slopes[at]

    return seconds


class ContextForward:
    """One forward of the context tower that carries prompts, with or without extends (decodes) beside them.

    ``mix``: the grid of both in one forward, if there is one.
    """

    def __init__(
        self, shared: PassTime, prefill: PassTime, mix: Grid | None, hull: Hull, ratios: np.ndarray | None = None
    ) -> None:
        """``ratios``: of what a mix takes over what its parts' times give, by its sequences."""
        self._prefill, self.hull, self._name, self._ratios = prefill, hull, f"{shared.name}+prefill", ratios
        self._axes = mix.axes if mix else {}
        self._points = tuple(self._axes.values())
        self._rho: Any = overlap(shared, prefill, mix).tolist() if mix else None

    def __call__(self, shared_s: float, n: int, tokens: int, reads: int, prompts: int) -> float:
        """Seconds; ``shared_s``: what the ``n`` extends take alone. For ``tokens``, ``reads``: see ``latency.py``."""
        prompts_s = self._prefill(prompts, tokens / prompts, (reads - tokens) / prompts)
        if not n:
            return prompts_s
        both_s = max(shared_s, prompts_s) + self._share(n, tokens) * min(shared_s, prompts_s)
        return both_s if self._ratios is None else both_s * float(np.interp(n, self._points[0], self._ratios))

    def _share(self, *point: int) -> float:
        if self._rho is None:
            self.hull.left[self._name] += 1
            return 1.0
        rho = between(self._points, self._rho, point)
        if rho == rho:
            return rho
        self.hull.leave(self._name, self._axes, point)
        nearest = [min(max(x, known[0]), known[-1]) for x, known in zip(point, self._points, strict=True)]
        rho = between(self._points, self._rho, nearest)
        return rho if rho == rho else 1.0


def overlap(shared: PassTime, prefill: PassTime, mix: Grid) -> np.ndarray:
    """rho over the grid of a mix, NaN where it or one of its parts was not measured; 0 where noise makes it less."""
    assert mix.at_context is not None
    rho = rising(mix.seconds())
    for at in product(*map(range, rho.shape)):
        n, tokens = (points[i] for points, i in zip(mix.axes.values(), at, strict=True))
        parts = shared.measured(n, mix.at_context), prefill.measured(1, tokens, mix.at_context)
        rho[at] = (rho[at] - max(parts)) / min(parts) if parts[0] + parts[1] > 0 else np.nan
    return np.maximum(rho, 0)


def _passes(measured: MeasuredLatency, hull: Hull, block_size: int | None, *names: str) -> list[PassTime]:
    missing = [name for name in names if name not in measured.grids]
    if missing:
        held = ", ".join(measured.grids) or "none"
        raise InputError(
            f"latency.path {hull.profile}: holds no {', '.join(missing)}, which this scenario needs; it has {held}"
        )
    return [PassTime(name, measured.grids[name], hull, block_size, measured.ratios(name)) for name in names]


def _mix(measured: MeasuredLatency, hull: Hull, name: str, needed: bool, block_size: int | None = None) -> Grid | None:
    mix = measured.grids.get(name) if block_size in (None, measured.mixed_block_size) else None
    if needed and mix is None and not hull.extrapolate:
        of = f" for decoding.block_size {block_size}" if block_size else ""
        raise InputError(
            f"latency.path {hull.profile}: holds no {name}{of}; set scheduler.prefill to first, or latency.extrapolate "
            "to cost them one after the other"
        )
    return mix


def autoregressive_measured(
    measured: MeasuredLatency, hull: Hull, host: Host, max_num_seqs: int, mixes: bool
) -> Latency:
    """Latency of rounds of one context forward of decoded tokens and prompt chunks; ``mixes``: they may share one."""
    decode, prefill = _passes(measured, hull, None, "decode", "prefill")
    mix = _mix(measured, hull, "decode+prefill", mixes)
    forward = ContextForward(decode, prefill, mix, hull, measured.ratios("decode+prefill") if mix else None)

    def cost_of(maximum: Callable, seconds: Callable) -> Callable:
        def cost(n, context, n_extend, extend_context):
            context_s = seconds(n, context - n)  # a token attends to itself beside what is in the cache
            return 0.0, context_s, host.around(maximum, context_s)

        return cost

    one, many = decode.of_sums(max_num_seqs)

    def mixed(n, context, n_extend, extend_context, tokens, pairs, reads, prompts):
        context_s = forward(one(n, context - n), n, tokens, reads, prompts)
        return 0.0, context_s, host.around(max, context_s)

    return Latency(
        cost_of(max, one),
        cost_of(np.maximum, many),
        mixed,
        side_by_side=False,
        host=host,
        extrapolated=hull.left,
    )


def two_tower_measured(
    measured: MeasuredLatency, hull: Hull, block_size: int, split: bool, host: Host, max_num_seqs: int, mixes: bool
) -> Latency:
    """Latency of rounds of denoise passes beside one context forward of extends and prompts; ``mixes``: of both."""
    denoise, extend, prefill = _passes(measured, hull, block_size, "denoise", "extend", "prefill")
    mix = _mix(measured, hull, "extend+prefill", mixes, block_size)
    forward = ContextForward(extend, prefill, mix, hull, measured.ratios("extend+prefill") if mix else None)
    transfer = _transfer(measured, hull, split, max_num_seqs)
    return _two_towers(denoise.of_sums(max_num_seqs), extend.of_sums(max_num_seqs), forward, block_size, transfer, host)


def mock_ar_measured(
    measured: MeasuredLatency, hull: Hull, split: bool, host: Host, max_num_seqs: int, mixes: bool
) -> Latency:
    """Latency of rounds in which each sequence's last token goes through both towers: as a denoise pass of block size 1
    (whose time conditioning mock-AR does without) and as a decode pass (whose head it does without)."""
    (denoise,) = _passes(measured, hull, 1, "denoise")
    decode, prefill = _passes(measured, hull, None, "decode", "prefill")
    mix = _mix(measured, hull, "decode+prefill", mixes)
    forward = ContextForward(decode, prefill, mix, hull, measured.ratios("decode+prefill") if mix else None)
    transfer = _transfer(measured, hull, split, max_num_seqs)
    passes = denoise.of_sums(max_num_seqs), decode.of_sums(max_num_seqs)
    return paired(_two_towers(*passes, forward, 1, transfer, host), own=1)


def block_diffusion_measured(
    measured: MeasuredLatency, hull: Hull, block_size: int, host: Host, max_num_seqs: int, mixes: bool
) -> Latency:
    """One tower in both roles, by what the two towers of a profile take one after the other on the same GPU: a forward
    that carries both kinds of block was not measured, and would read the weights once."""
    return two_tower_measured(measured, hull, block_size, False, host, max_num_seqs, mixes)


def speculative_measured(
    measured: MeasuredLatency,
    hull: Hull,
    draft_tokens: int,
    draft_s: float,
    host: Host,
    max_num_seqs: int,
    mixes: bool,
) -> Latency:
    """Latency of rounds that take ``draft_s`` to draft (look-up of n-grams: a profile holds no drafter) and then
    verify, as an extend pass of ``draft_tokens`` + 1 tokens: without the head, which verification needs."""
    positions = draft_tokens + 1
    extend = measured.grids.get("extend")
    sizes = extend.axes["block_size"] if extend else []
    if extend and positions not in sizes:
        raise InputError(
            f"decoding.draft_tokens: found {draft_tokens}, verified as an extend pass of {positions} tokens; "
            f"{hull.profile}: extend was measured at block_size {', '.join(map(str, sizes))}"
        )
    verify, prefill = _passes(measured, hull, positions, "extend", "prefill")
    mix = _mix(measured, hull, "extend+prefill", mixes, positions)
    forward = ContextForward(verify, prefill, mix, hull, measured.ratios("extend+prefill") if mix else None)

    def drafts(n, total):
        return (n > 0) * draft_s

    passes = (drafts, drafts), verify.of_sums(max_num_seqs)
    return paired(_two_towers(*passes, forward, positions, None, host), own=1)


def _transfer(measured: MeasuredLatency, hull: Hull, split: bool, max_num_seqs: int) -> Sums | None:
    """Of (states, tokens) from tower to tower; None where both are on the same device."""
    return _passes(measured, hull, None, "transfer")[0].of_sums(max_num_seqs) if split else None


def _two_towers(
    denoise: Sums, extend: Sums, forward: ContextForward, positions: int, transfer: Sums | None, host: Host
) -> Latency:
    """Rounds of one kind of pass beside a context forward of another, whose sequences take ``positions`` tokens each,
    and of prompts: one after the other, or, with a ``transfer`` after the forward, at the same time."""

    def end(maximum: Callable, denoiser_s, context_s, transfer_s):
        passes_s = maximum(denoiser_s, context_s + transfer_s) if transfer else denoiser_s + context_s
        return denoiser_s, context_s, host.around(maximum, passes_s)

    def cost_of(maximum: Callable, denoise_s: Callable, extend_s: Callable, transfer_s: Callable) -> Callable:
        def cost(n, context, n_extend, extend_context):
            passes = denoise_s(n, context), extend_s(n_extend, extend_context)
            return end(maximum, *passes, transfer_s(n_extend, n_extend * positions))

        return cost

    (denoise_s, extend_s, transfer_s), many = zip(denoise, extend, transfer or (no_transfer,) * 2, strict=True)

    def mixed(n, context, n_extend, extend_context, tokens, pairs, reads, prompts):
        context_s = forward(extend_s(n_extend, extend_context), n_extend, tokens, reads, prompts)
        sent_s = transfer_s(n_extend + prompts, n_extend * positions + tokens)
        return end(max, denoise_s(n, context), context_s, sent_s)

    return Latency(
        cost_of(max, denoise_s, extend_s, transfer_s),
        cost_of(np.maximum, *many),
        mixed,
        side_by_side=transfer is not None,
        host=host,
        transfer=transfer_s,
        extrapolated=forward.hull.left,
    )
