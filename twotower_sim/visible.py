"""When tokens become visible: from segments of decodes and the end times of ticks, vectorised after the run.

Tokens of a block become visible together, when its last denoise step ends (as today's engines stream block
diffusion); autoregressive tokens one by one. A request's *commit gaps* are the times between such moments.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from twotower_sim.plan import BlockPlans

CHUNK = 16384
TICKS = 1 << 17


class Ticks:
    """End times of all ticks of all replicas in one flat array."""

    def __init__(self, tick_end_ns: list) -> None:
        ends = [np.frombuffer(end, np.int64) for end in tick_end_ns]
        self._base = np.cumsum([0, *map(len, ends)])
        self.flat = np.concatenate(ends)

    def at(self, replica: np.ndarray, tick: np.ndarray) -> np.ndarray:
        """Index into ``flat`` of a replica's tick."""
        return self._base[replica] + tick


class BlockTimes(NamedTuple):
    """Completed blocks of a chunk of requests, by request, then block; and per-request totals of the chunk."""

    request: np.ndarray
    block: np.ndarray
    steps: np.ndarray
    ready_ns: np.ndarray  # the block could start: prefill or the extend pass before it had ended
    visible_ns: np.ndarray
    low: int  # the chunk is the requests [low, low + len(nfe))
    nfe: np.ndarray  # denoiser forwards, those lost to preemption included

    def of(self, requests: np.ndarray) -> "BlockTimes":
        """Blocks of some requests, which an array says by request id; totals stay those of the chunk."""
        kept = requests[self.request]
        columns = ("request", "block", "steps", "ready_ns", "visible_ns")
        return self._replace(**{name: getattr(self, name)[kept] for name in columns})


def block_times(segments: np.ndarray, ticks: Ticks, plans: BlockPlans) -> Iterator[BlockTimes]:
    """Two towers: chunk by chunk, in order of request."""
    number = len(plans.blocks_of)
    for low in range(0, number, CHUNK):
        high = min(low + CHUNK, number)
        rows = segments[slice(*np.searchsorted(segments[:, 0], (low, high)))]
        yield _block_times(rows, ticks, plans, low, high)


def logged_times(units: np.ndarray, nfe: np.ndarray) -> Iterator[BlockTimes]:
    """The same from an engine's own log (``Records.units``); of bursts, ``steps`` are their tokens."""
    for low in range(0, len(nfe), CHUNK):
        high = min(low + CHUNK, len(nfe))
        rows = units[slice(*np.searchsorted(units[:, 0], (low, high)))]
        request, unit, size, ready_ns, visible_ns, _ = rows.T
        yield BlockTimes(request, unit, size, ready_ns, visible_ns, low, nfe[low:high])


def after_first_tick(segments: np.ndarray, ticks: Ticks) -> np.ndarray:
    """Segments of a decoding whose prefill gives no token, as if it did: the first tick, which gives it, counts as part
    of the prefill. Segments that were cut off before it are left out."""
    ran = segments[segments[:, 3] > segments[:, 2]].copy()
    ran[:, 5] = ticks.flat[ticks.at(ran[:, 4], ran[:, 2])]
    ran[:, 2] += 1
    return ran


def _block_times(rows: np.ndarray, ticks: Ticks, plans: BlockPlans, low: int, high: int) -> BlockTimes:
    blocks = plans.blocks(low, high)
    owner, done, start, end, replica, start_ns = rows.T
    owner = owner - low
    count = plans.blocks_of[low:high][owner] - done
    segment = np.repeat(np.arange(len(rows)), count)
    block = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + done[segment]
    at = blocks.first[owner][segment] + block
    before = blocks.extend[blocks.first[owner] + np.maximum(done, 1) - 1] + 1
    origin = start - np.where(done > 0, before, 0)
    extend = origin[segment] + blocks.extend[at]  # tick of the extend pass; of the last block, the segment's end
    ran = extend < end[segment]
    complete = extend <= end[segment]
    nfe = end - start - np.bincount(segment[ran], minlength=len(rows))
    segment, block, at, extend = segment[complete], block[complete], at[complete], extend[complete]
    steps = blocks.steps[at]
    visible_ns = ticks.flat[ticks.at(replica[segment], extend - 1)]
    previous = extend - steps - 1
    fresh = block == done[segment]
    ready_ns = ticks.flat[ticks.at(replica[segment], np.where(fresh, start[segment], previous))]
    ready_ns = np.where(fresh, start_ns[segment], ready_ns)
    totals = np.bincount(owner, nfe, minlength=high - low).astype(np.int64)
    return BlockTimes(owner[segment] + low, block, steps, ready_ns, visible_ns, low, totals)


def token_gaps(segments: np.ndarray, ticks: Ticks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Autoregressive: gaps between a request's tokens, in ns, and how many requests share each; chunk by chunk.

    A segment's prefill gives its first token at ``start_ns``, and each of its ticks one more.
    """
    request, _, start, end, replica, start_ns = segments.T
    decoded = end > start
    first, last = ticks.at(replica, start)[decoded], ticks.at(replica, end)[decoded]
    yield ticks.flat[first] - start_ns[decoded], np.ones(len(first), np.int64)
    last_ns = start_ns.copy()
    last_ns[decoded] = ticks.flat[last - 1]
    again = _restarts(request)
    yield start_ns[again] - last_ns[again - 1], np.ones(len(again), np.int64)
    # the gap before a segment's later ticks is the tick's own, shared by all that decode through both
    size = len(ticks.flat) + 1
    change = np.bincount(first + 1, minlength=size) - np.bincount(last, minlength=size)
    sharing = 0
    for low in range(1, len(ticks.flat), TICKS):
        shared = sharing + np.cumsum(change[low : low + TICKS])[: len(ticks.flat) - low]
        yield np.diff(ticks.flat[low - 1 : low + TICKS]), shared
        sharing = int(shared[-1])


def second_tokens(segments: np.ndarray, ticks: Ticks, requests: int) -> np.ndarray:
    """Autoregressive: when each request's second token became visible, in ns; -1 where there is none."""
    request, _, start, end, replica, start_ns = segments.T
    second_ns = np.full(requests, -1)
    again = _restarts(request)[::-1]  # the earliest restart is written last
    second_ns[request[again]] = start_ns[again]
    first = np.ones(len(request), bool)
    first[again] = False
    first &= end > start
    second_ns[request[first]] = ticks.flat[ticks.at(replica, start)[first]]
    return second_ns


def _restarts(request: np.ndarray) -> np.ndarray:
    """Indices of segments that follow another of the same request."""
    return np.flatnonzero(request[1:] == request[:-1]) + 1
