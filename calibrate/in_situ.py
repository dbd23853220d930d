"""What passes take inside a serving engine, beside what they take alone: the profile's ``engine`` figures.

Between its passes an engine makes lists, fills tensors and reads results, its batches change from round to round, and a
slow pass delays a round by more than a median says. Short closed loops at every batch size show by how much.
"""

from collections.abc import Sequence
from heapq import heappush
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from calibrate.bench import out_of_memory
from calibrate.graphs import Passes
from calibrate.model import TwoTower
from calibrate.serving import Arrivals, Served, ServedBlocks, ServedTokens, Slots, Written, serve
from calibrate.shapes import Shapes
from twotower_sim.admission import Fcfs
from twotower_sim.latency import PASS_NAMES, Host, Latency
from twotower_sim.measured import Hull, autoregressive_measured, two_tower_measured
from twotower_sim.policy import POLICIES
from twotower_sim.profile import EngineFigures, MeasuredLatency
from twotower_sim.recorded import RecordedRounds, RoundLog
from twotower_sim.records import Records
from twotower_sim.replica import Limits
from twotower_sim.rounds import RoundEngine, Task

KV_BLOCK = 16
BLOCKS = 4  # of an answer
WAVES = 3  # answers of each user
FIRST_ROUNDS = 5  # of a loop, in which everything is new
PAUSES, PAUSE_NS = 10, 250_000_000
ENOUGH = 8  # rounds, to say something of a batch


class Loop(NamedTuple):
    """What an engine did for some users."""

    kind: str
    log: list[RoundLog]
    probe_s: float  # how fast the machine was: see ``serving.Probe``


def loops(model: TwoTower, shapes: Shapes, gamma: float, texts: Sequence[torch.Tensor], graphs: bool) -> list[Loop]:
    """Closed loops of as many users as each batch has sequences, and one of a user who thinks, as far as memory goes.
    ``texts``: to cut prompts of, in turn."""
    size = model.config.block_size
    levels = list(shapes.sequences)
    while levels:
        try:
            passes = Passes(model, model.cache(levels[-1] + 1, _longest(shapes) + 2 * BLOCKS * size), graphs)
            return [
                _loop(passes, kind, users, shapes, gamma, texts, pauses)
                for kind in ("two_tower", "autoregressive")
                for users, pauses in [*((users, 0) for users in levels), (1, PAUSES)]
            ]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            levels.pop()
    return []


def _longest(shapes: Shapes) -> int:
    """Tokens of the longest prompt: twice the middle context, as in ``shapes.contexts_of``."""
    return min(2 * shapes.at_context, shapes.context[-1]) or shapes.tokens[0]


def _loop(passes: Passes, kind: str, users: int, shapes: Shapes, gamma: float, texts, pauses: int) -> Loop:
    """``pauses``: of one user, before as many requests of one block."""
    size, requests = passes.model.config.block_size, pauses or users * WAVES
    prompts = _prompts(texts, requests, shapes)
    outputs = [size if pauses else (1 + (request + BLOCKS) % (2 * BLOCKS)) * size for request in range(requests)]
    slots, written = Slots(1 << 40, KV_BLOCK, users), Written(outputs, size)
    served, records = Served(passes, slots, users, prompts), Records(requests)
    decoder: ServedTokens | ServedBlocks = ServedTokens(KV_BLOCK, served)
    if kind == "two_tower":
        rules = POLICIES["fdfo"], 1, None, lambda request, waiting: 0
        decoder = ServedBlocks(served, written, [gamma], size, *rules, records=records)
    decoder.warm_up()
    arrivals: Arrivals = [(PAUSE_NS if pauses else 0, request) for request in range(users)]
    waiting = iter(range(users, requests))

    def on_finish(request: int, now_ns: int) -> None:
        if (following := next(waiting, None)) is not None:
            heappush(arrivals, (now_ns + (PAUSE_NS if pauses else 0), following))

    limits = Limits(users, users * decoder.pass_tokens + shapes.tokens[-1], slots.capacity, KV_BLOCK, users)
    nothing: Latency = RecordedRounds([])  # type: ignore[assignment]  # nobody asks it
    engine = RoundEngine(0, nothing, decoder, limits, Fcfs(), slots, records, on_finish)
    serve(engine, served, arrivals, lambda request, at_ns: Task(request, len(prompts[request]), outputs[request]))
    return Loop(kind, served.rounds if pauses else served.rounds[FIRST_ROUNDS:], served.probe.mean_s)


def _prompts(texts: Sequence[torch.Tensor], requests: int, shapes: Shapes) -> list[torch.Tensor]:
    """Prompts of lengths spread evenly from next to nothing to twice the middle context, in a mixed order."""
    longest = _longest(shapes)
    order = np.random.default_rng(0).permutation(requests).tolist()
    lengths = [1 + longest * place // requests for place in order]
    endless = torch.cat([*texts] * (1 + sum(lengths) // sum(map(len, texts))))
    return list(endless[: sum(lengths)].split(lengths))


def engine_figures(latency: MeasuredLatency, loops: Sequence[Loop], block_size: int) -> EngineFigures | None:
    """Ratios of summed seconds, measured in loops over predicted from the grids, by kind of pass and batch; one forward
    of both extends (decodes) and prompts over what its two parts give at their own ratios. Seconds of a loop are taken
    as if the machine had been as fast as in the median one. None without loops."""
    if not loops:
        return None
    alone = latency.model_copy(update={"engine": None})
    probe_s = float(np.median([loop.probe_s for loop in loops]))
    steady = [loop._replace(log=_at_speed(loop, loop.probe_s / probe_s)) for loop in loops]
    busy, woken = ([loop._replace(log=_after_idle(loop.log, idle)) for loop in steady] for idle in (False, True))
    pure = _ratios(alone, busy, block_size, mixed=False)
    ratios = pure | _ratios(_with(alone, pure), busy, block_size, mixed=True)
    rounds = [log for loop in busy for log in loop.log]
    host_s = sum(_seconds(log) - log.denoiser_s - log.context_s for log in rounds) / len(rounds)
    wake_s = _wake_s(_with(alone, ratios), woken, block_size, host_s)
    return EngineFigures(ratios=ratios, host_s=host_s, wake_s=wake_s, probe_s=probe_s, rounds=len(rounds))


def _at_speed(loop: Loop, slow: float) -> list[RoundLog]:
    """Rounds, and the idle times between them kept, as they had been without the slowness."""
    out, end_ns = [], 0
    for before, log in zip([None, *loop.log], loop.log, strict=False):
        start_ns = end_ns + (log.start_ns - before.end_ns if before else 0)
        end_ns = start_ns + round((log.end_ns - log.start_ns) / slow)
        seconds = log.denoiser_s / slow, log.context_s / slow
        out.append(log._replace(start_ns=start_ns, end_ns=end_ns, denoiser_s=seconds[0], context_s=seconds[1]))
    return out


def _with(latency: MeasuredLatency, ratios: dict[str, list[float]]) -> MeasuredLatency:
    return latency.model_copy(update={"engine": EngineFigures(ratios=ratios, host_s=0, wake_s=0, probe_s=1, rounds=1)})


def _seconds(log: RoundLog) -> float:
    return (log.end_ns - log.start_ns) / 1e9


def _after_idle(log: list[RoundLog], idle: bool) -> list[RoundLog]:
    """The rounds that end an idle time, or the others."""
    return [this for before, this in pairwise(log) if (this.start_ns > before.end_ns) == idle]


def _ratios(latency: MeasuredLatency, loops: Sequence[Loop], block_size: int, mixed: bool) -> dict[str, list[float]]:
    seen: dict[str, list[tuple[int, float, float]]] = {}  # sequences, measured, alone
    for kind, log, _ in loops:
        model = _latency(latency, kind, block_size, log)
        for of in log:
            denoiser_s, context_s, _ = model.round(*of.shape)
            shared = of.n_extend if kind == "two_tower" else of.n
            name = PASS_NAMES[kind][(shared > 0) + 2 * (of.prefill[0] > 0)]
            passes = (
                ("denoise", of.n, of.denoiser_s, denoiser_s),
                (name, shared or of.prefill[3], of.context_s, context_s),
            )
            for pass_, sequences, measured_s, alone_s in passes:
                if measured_s and ("+" in pass_) == mixed:
                    seen.setdefault(pass_, []).append((sequences, measured_s, alone_s))
    return {
        name: _by_batch(np.array(rows), np.array(latency.grids[name].axes["sequences"]))
        for name, rows in seen.items()
        if name in latency.grids
    }


def _by_batch(rows: np.ndarray, batches: np.ndarray) -> list[float]:
    """The ratio at each batch of a grid, of rounds (n, 3) that are nearest to it; of all where these are few."""
    sequences, measured_s, alone_s = rows.T
    nearest = np.abs(sequences[:, None] - batches).argmin(axis=1)
    counts, measured, alone = (np.bincount(nearest, of, len(batches)) for of in (None, measured_s, alone_s))
    overall = measured_s.sum() / alone_s.sum()
    return np.where(counts >= ENOUGH, measured / np.where(alone, alone, 1), overall).tolist()


def _wake_s(latency: MeasuredLatency, loops: Sequence[Loop], block_size: int, host_s: float) -> float:
    """What rounds that end an idle time take longer than others of their shape; noise that says less is nothing."""
    longer: list[float] = []
    for kind, log, _ in loops:
        model = _latency(latency, kind, block_size, log)
        longer += [_seconds(of) - host_s - sum(model.round(*of.shape)[:2]) for of in log]
    return max(0.0, sum(longer) / len(longer)) if longer else 0.0


def _latency(latency: MeasuredLatency, kind: str, block_size: int, log: list[RoundLog]) -> Latency:
    hull, seats = Hull("the grid", extrapolate=True), max((of.n + of.n_extend for of in log), default=1)
    if kind == "two_tower":
        return two_tower_measured(latency, hull, block_size, False, Host(), seats, mixes=True)
    return autoregressive_measured(latency, hull, Host(), seats, mixes=True)
