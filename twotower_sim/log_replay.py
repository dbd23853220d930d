"""The load of a log, simulated under a scenario's rules with any affine costs of passes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from twotower_sim.costing import latency_of
from twotower_sim.measurements import Measurements
from twotower_sim.metrics import evaluate
from twotower_sim.replica import Round
from twotower_sim.scenario import AffineLatency, PassCost, PrefillCost, Scenario
from twotower_sim.simulation import Observer, prepare, simulate

PASSES = {
    "autoregressive": ("decode",),
    "two_tower": ("denoise", "extend"),
    "block_diffusion": ("denoise", "extend"),
    "mock_ar": ("denoise", "decode"),
    "speculative": ("decode", "draft"),
}
"""Passes whose costs are fitted, beside prefill's."""
TOGETHER = ("mock_ar", "speculative")
"""Kinds whose two passes take the same sequences in the same rounds: only the sum of their costs shows."""
COSTS = ("base_ms", "per_seq_ms", "per_context_token_ms")
PREFILL = ("prefill.base_ms", "prefill.per_new_token_ms")
REACH = {
    "base_ms": (1e-3, 1e5),
    "per_new_token_ms": (1e-6, 1e3),
    "per_seq_ms": (1e-5, 1e4),
    "per_context_token_ms": (1e-9, 1.0),
}
FACTOR_REACH = (1e-2, 1e2)
"""Between which coefficients are searched for, in ms."""


@dataclass(frozen=True)
class Coefficients:
    """What is fitted, as logarithms (n,): prefill's costs and those of ``passes``. ``second``: a second pass's costs
    are fitted too ("free"), the first's times one "factor", or the first's ("equal")."""

    passes: tuple[str, ...]
    second: Literal["free", "factor", "equal"] = "equal"

    @property
    def names(self) -> list[str]:
        free = self.passes if self.second == "free" else self.passes[:1]
        factor = [f"{self.passes[1]} / {self.passes[0]}"] if self.second == "factor" else []
        return [*PREFILL, *(f"{name}.{cost}" for name in free for cost in COSTS), *factor]

    @property
    def bounds(self) -> np.ndarray:
        """Of the logarithms, (2, n)."""
        return np.log([REACH.get(name.rpartition(".")[2], FACTOR_REACH) for name in self.names]).T

    @property
    def parts(self) -> np.ndarray:
        """Which costs, prefill's and each pass's (2 + 3 passes,), are proportional to which coefficient: (costs, n)."""
        one, count = np.eye(5), 2 + 3 * len(self.passes)
        if self.second == "free":
            return np.eye(count)
        alike = np.concatenate([one, one[2:]])[:count]
        return np.column_stack([alike, np.arange(count) >= 5]) if self.second == "factor" else alike

    def costs(self, x: np.ndarray) -> np.ndarray:
        """Prefill's costs and each pass's, in ms."""
        return np.exp(self.parts @ x)

    def latency(self, x: np.ndarray, given: AffineLatency | None) -> AffineLatency:
        """What is not fitted is as ``given``."""
        base_ms, per_new_token_ms, *costs = self.costs(x).tolist()
        passes = {
            name: PassCost(**dict(zip(COSTS, costs[3 * i : 3 * i + 3], strict=True)))
            for i, name in enumerate(self.passes)
        }
        prefill = PrefillCost(base_ms=base_ms, per_new_token_ms=per_new_token_ms)
        compose, transfer = (given.compose, given.transfer) if given else ("sum", None)
        made = AffineLatency(kind="affine", prefill=prefill, compose=compose, transfer=transfer)
        return made.model_copy(update=passes)


class Replay:
    """A log under a scenario's rules. ``measured``: its requests that can be served; ``count``: of simulations."""

    def __init__(self, log: Measurements, scenario: Scenario, base: Path) -> None:
        self._run, self._base = prepare(scenario, base, log.requests), base
        self._served = np.delete(np.arange(len(log)), self._run.rejected)
        self.measured, self.rejected, self.count = log.take(self._served), len(self._run.rejected), 0
        self.warnings = self._run.warnings
        self.kind = scenario.decoding.kind
        self.passes = PASSES[self.kind]

    @property
    def host_ms(self) -> float:
        return self._run.scenario.scheduler.host_overhead_ms

    def predict(self, of: Coefficients, x: np.ndarray) -> Measurements:
        """What the requests see with coefficients. Raises InputError."""
        return self._predict(of, x, None)[0]

    def slopes(self, of: Coefficients, x: np.ndarray) -> np.ndarray:
        """How the times of requests (first token, from there to the last, whole) change with the coefficients, in
        seconds: (3, requests, n).

        Which requests share which rounds is taken as given: what a coefficient contributes to the rounds of a request
        is what it contributes to its time. That leaves out how load reacts, but is smooth; differences of simulations
        are not, since batches change by jumps.
        """
        rounds: list[tuple[int, Round]] = []
        predicted, replica = self._predict(of, x, lambda index, round: rounds.append((index, round)))
        out = np.zeros((3, len(predicted), len(x)))
        moments = predicted.arrival_ns, predicted.first_ns, predicted.finish_ns
        for index in range(self._run.scenario.deployment.replicas):
            mine = replica == index
            spent = _spent([round for at, round in rounds if at == index], of, x, self.kind)
            arrival, first, finish = (spent(moment[mine]) for moment in moments)
            out[:, mine] = first - arrival, finish - first, finish - arrival
        return out

    def _predict(self, of: Coefficients, x: np.ndarray, observe: Observer | None) -> tuple[Measurements, np.ndarray]:
        self.count += 1
        scenario = self._run.scenario
        given = scenario.latency if isinstance(scenario.latency, AffineLatency) else None
        asked = scenario.model_copy(update={"latency": of.latency(x, given)})
        latency, _ = latency_of(asked, self._run.tower, self._run.gpu, self._base, None, [])
        c = evaluate(simulate(replace(self._run, scenario=asked, latency=latency, warnings=[]), observe)).columns
        columns = c.arrival_ns, c.first_ns, c.finish_ns, c.input_tokens, c.output_tokens
        return Measurements(*columns).take(self._served), c.replica[self._served]


def _spent(rounds: list[Round], of: Coefficients, x: np.ndarray, kind: str):
    """A function from times (m,) in ns to the seconds of rounds that coefficients account for until then: (m, n)."""
    start_ns, end_ns, denoiser_s, context_s, decoding, extending = np.array([round[:6] for round in rounds]).T
    tokens = np.array([round.prefill[0] for round in rounds])
    costs, second = of.costs(x) / 1e3, extending if kind in ("two_tower", "block_diffusion") else decoding
    columns, held = [costs[0] * (tokens > 0), costs[1] * tokens], []
    for i, count in enumerate((decoding, second)[: len(of.passes)]):
        base, each, context = costs[2 + 3 * i : 5 + 3 * i]
        columns += [base * (count > 0), each * count, np.zeros(len(rounds))]
        held.append(context * count)
    # what passes took beyond that is for the context, which an observer does not see; of two, by their sequences
    rest = np.maximum(denoiser_s + context_s - sum(columns), 0)
    for i, share in enumerate(held):
        columns[4 + 3 * i] = rest * share / np.maximum(sum(held), 1e-300)
    times, integral = integrate(start_ns, end_ns, np.stack(columns, 1) / (end_ns - start_ns)[:, None])
    integral = integral @ of.parts
    return lambda at: np.stack([np.interp(at, times, column) for column in integral.T], 1)


def integrate(start_ns: np.ndarray, end_ns: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of intervals, each with its rates (m, k): the times at which they begin or end, rising, and the integrals until
    then of the sum of the rates of all that go on: (2m,), (2m, k)."""
    times, change = np.concatenate([start_ns, end_ns]), np.concatenate([rates, -rates])
    order = np.argsort(times, kind="stable")
    times, levels = times[order], np.cumsum(change[order], axis=0)
    passed = np.cumsum(levels[:-1] * np.diff(times)[:, None], axis=0)
    return times, np.concatenate([np.zeros((1, rates.shape[1])), passed])
