"""Predict real runs, run them, and say how far the predictions were off: the composition root of ``validate``.

Every repetition samples the passes of the model once more and then runs every scenario on the real engine, so that the
profile and the runs see the same machine. The simulator then predicts each run three times: with the commits that the
profile's law expects, with those that were recorded, and with the recorded durations of rounds as well.
"""

from collections.abc import Callable
from heapq import heapify, heappush
from typing import Any, NamedTuple

import numpy as np
import torch

from calibrate.model import TwoTower
from calibrate.serving import Arrivals, Served, ServedBlocks, ServedTokens, Slots, Written, serve
from twotower_sim import scenario as ask
from twotower_sim.policy import POLICIES
from twotower_sim.recorded import RoundLog
from twotower_sim.records import Records
from twotower_sim.replica import Round
from twotower_sim.rounds import Task
from twotower_sim.simulation import Run, round_engine


class Real(NamedTuple):
    """A scenario as the real engine ran it; ``sizes``: of every commit, by request and block."""

    run: Run
    rounds: list[Round]
    log: list[RoundLog]
    sizes: list[list[list[int]]]


def run_for_real(run: Run, model: TwoTower, prompts: list[torch.Tensor], finished: Callable[[int], Any]) -> Real:
    """Serve the requests of a prepared scenario on this machine. ``prompts`` by request; ``finished`` hears of each."""
    scenario, requests = run.scenario, run.requests
    scheduler, decoding = scenario.scheduler, scenario.decoding
    run.records, run.may_be_fast = Records(len(requests)), False
    seats = min(scheduler.max_num_seqs, run.memory.state_slots)
    slots = Slots(run.memory.kv_blocks, scenario.memory.kv_block_tokens, seats)
    longest = int((requests.input_tokens + requests.output_tokens).max())
    served = Served(model, slots, seats, longest, prompts)
    written = Written([], model.config.block_size)
    if run.luck:
        assert isinstance(decoding, ask.TwoTower)
        written = Written(requests.output_tokens.tolist(), decoding.block_size)
        rules = POLICIES[scheduler.policy], scheduler.steps_per_round, scheduler.max_extends_per_round, run.luck.level
        steps = decoding.steps_per_block
        decoder = ServedBlocks(served, written, run.luck.gammas, steps, *rules, records=run.records)
    else:
        decoder = ServedTokens(scenario.memory.kv_block_tokens, served)
    decoder.warm_up()
    arrivals, more = _arrivals(run)
    rounds: list[Round] = []

    def on_finish(request: int, now_ns: int) -> None:
        more(now_ns)
        finished(request)

    def arrive(request: int, at_ns: int) -> Task:
        run.records.arrival_ns[request] = at_ns
        return Task(request, int(requests.input_tokens[request]), int(requests.output_tokens[request]))

    engine = round_engine(run, 0, decoder, slots, on_finish, lambda index, round: rounds.append(round))
    run.engines = [engine]
    serve(engine, served, arrivals, arrive)
    return Real(run, rounds, served.rounds, written.sizes)


def _arrivals(run: Run) -> tuple[Arrivals, Callable[[int], None]]:
    """Arrivals that are known from the start, and what to do when a request completes."""
    load, requests = run.scenario.workload, run.requests
    ids = np.delete(np.arange(len(requests)), run.rejected).tolist()
    if not isinstance(load, ask.ClosedLoopWorkload):
        arrivals = [(int(requests.arrival_ns[request]), request) for request in ids]
        heapify(arrivals)
        return arrivals, lambda now_ns: None
    arrivals, waiting = [(0, request) for request in ids[: load.concurrency]], iter(ids[load.concurrency :])
    think_ns = round(load.think_time_s * 1e9)

    def more(now_ns: int) -> None:
        if (request := next(waiting, None)) is not None:
            heappush(arrivals, (now_ns + think_ns, request))

    return arrivals, more
