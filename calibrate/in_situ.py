"""What passes take inside a serving engine, beside what they take alone: the profile's ``engine`` figures.

Between its passes an engine makes lists, fills tensors and reads results, its batches change from round to round, and a
slow pass delays a round by more than a median says. Short closed loops at every batch size show by how much.
"""

from collections.abc import Sequence
from heapq import heappush

import torch

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
Logs = dict[str, list[RoundLog]]
"""Rounds by kind of decoding."""


def loops(model: TwoTower, shapes: Shapes, gamma: float, texts: Sequence[torch.Tensor], graphs: bool) -> Logs:
    """Closed loops of as many users as each batch has sequences. ``texts``: to cut prompts of, in turn."""
    logs: Logs = {"two_tower": [], "autoregressive": []}
    for users in shapes.sequences:
        for kind, log in logs.items():
            log += _loop(model, kind, users, shapes, gamma, texts, graphs)[FIRST_ROUNDS:]
    return logs


def _loop(model: TwoTower, kind: str, users: int, shapes: Shapes, gamma: float, texts, graphs: bool) -> list[RoundLog]:
    size, requests = model.config.block_size, users * WAVES
    prompts = _prompts(texts, requests, shapes)
    outputs = [(1 + (request + BLOCKS) % (2 * BLOCKS)) * size for request in range(requests)]
    slots = Slots(1 << 40, KV_BLOCK, users)
    longest = max(len(prompt) + output for prompt, output in zip(prompts, outputs, strict=True))
    served, records, written = (
        Served(model, slots, users, longest, prompts, graphs),
        Records(requests),
        Written(outputs, size),
    )
    decoder: ServedTokens | ServedBlocks = ServedTokens(KV_BLOCK, served)
    if kind == "two_tower":
        rules = POLICIES["fdfo"], 1, None, lambda request, waiting: 0
        decoder = ServedBlocks(served, written, [gamma], size, *rules, records=records)
    decoder.warm_up()
    arrivals: Arrivals = [(0, request) for request in range(users)]
    waiting = iter(range(users, requests))

    def on_finish(request: int, now_ns: int) -> None:
        if (following := next(waiting, None)) is not None:
            heappush(arrivals, (now_ns, following))

    limits = Limits(users, users * decoder.pass_tokens + shapes.tokens[-1], slots.capacity, KV_BLOCK, users)
    nothing: Latency = RecordedRounds([])  # type: ignore[assignment]  # nobody asks it
    engine = RoundEngine(0, nothing, decoder, limits, Fcfs(), slots, records, on_finish)
    serve(engine, served, arrivals, lambda request, at_ns: Task(request, len(prompts[request]), outputs[request]))
    return served.rounds


def _prompts(texts: Sequence[torch.Tensor], requests: int, shapes: Shapes) -> list[torch.Tensor]:
    """Prompts of lengths spread evenly from next to nothing to twice the middle context, in a mixed order."""
    longest = min(2 * shapes.at_context, shapes.context[-1]) or shapes.tokens[0]
    lengths = [1 + longest * (7 * request % requests) // requests for request in range(requests)]
    endless = torch.cat([*texts] * (1 + sum(lengths) // sum(map(len, texts))))
    return list(endless[: sum(lengths)].split(lengths))


def engine_figures(latency: MeasuredLatency, logs: Logs, block_size: int) -> EngineFigures:
    """Ratios of summed seconds, measured in loops over predicted from the grids, by kind of pass; one forward of both
    extends (decodes) and prompts over what its two parts give at their own ratios."""
    alone = latency.model_copy(update={"engine": None})
    pure = _ratios(alone, logs, block_size, mixed=False)
    parts = alone.model_copy(update={"engine": EngineFigures(ratios=pure, host_s=0, rounds=1)})
    ratios = pure | _ratios(parts, logs, block_size, mixed=True)
    rounds = [log for of in logs.values() for log in of]
    host_s = sum((log.end_ns - log.start_ns) / 1e9 - log.denoiser_s - log.context_s for log in rounds)
    return EngineFigures(ratios=ratios, host_s=host_s / len(rounds), rounds=len(rounds))


def _ratios(latency: MeasuredLatency, logs: Logs, block_size: int, mixed: bool) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for kind, log in logs.items():
        model = _latency(latency, kind, block_size, max((of.n + of.n_extend for of in log), default=1))
        for of in log:
            denoiser_s, context_s, _ = model.round(*of.shape)
            shared = of.n_extend if kind == "two_tower" else of.n
            name = PASS_NAMES[kind][(shared > 0) + 2 * (of.prefill[0] > 0)]
            for pass_, measured_s, alone_s in (("denoise", of.denoiser_s, denoiser_s), (name, of.context_s, context_s)):
                if measured_s and ("+" in pass_) == mixed:
                    pair = sums.setdefault(pass_, [0.0, 0.0])
                    pair[0] += measured_s
                    pair[1] += alone_s
    return {name: measured_s / alone_s for name, (measured_s, alone_s) in sums.items()}


def _latency(latency: MeasuredLatency, kind: str, block_size: int, seats: int) -> Latency:
    hull = Hull("the grid", extrapolate=True)
    if kind == "two_tower":
        return two_tower_measured(latency, hull, block_size, False, Host(), seats, mixes=True)
    return autoregressive_measured(latency, hull, Host(), seats, mixes=True)
