"""How many distinct experts of an MoE layer a pass touches; its weight traffic follows from it.

Routed tokens are counted in *effective independent tokens*: the number t at which independent uniform
routing, ``1 - (1 - k/E)^t`` of the experts, touches as many as were counted. Counts of one model thus
carry over to another number of experts, which is a model, not a measurement, and is reported as such.
Groups of tokens that share a pass (blocks, single tokens, a prompt) are taken as independent of each
other, so the shares of experts that they leave untouched multiply.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Routing:
    """Effective independent tokens over tokens, as two curves of (tokens, effective tokens); None: all independent."""

    blocks: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # consecutive tokens of one text
    singles: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # one token of each sequence

    def untouched(self, curve: str, tokens: np.ndarray, experts: int, per_token: int) -> np.ndarray:
        """Share of the experts that ``tokens`` (any shape) leave untouched; ``curve`` is "blocks" or "singles"."""
        points = getattr(self, curve)
        effective = np.asarray(tokens, float) if points is None else _power_law(points, tokens)
        return (1 - per_token / experts) ** effective


INDEPENDENT = Routing()


def observed_routing(figures: dict) -> Routing:
    """A Routing from counts: ``{experts, experts_per_token, blocks: {tokens: distinct experts}, singles: {…}}``."""
    stay = np.log1p(-figures["experts_per_token"] / figures["experts"])

    def curve(counts: dict[str, float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        effective = (float(np.log1p(-count / figures["experts"]) / stay) for count in counts.values())
        return tuple(map(float, counts)), tuple(effective)

    return Routing(curve(figures["blocks"]), curve(figures["singles"]))


def _power_law(points: tuple[tuple[float, ...], tuple[float, ...]], tokens: np.ndarray) -> np.ndarray:
    """Log-log interpolation, continued beyond the last point with its last slope, never above ``tokens``."""
    x, y = (np.log(np.asarray(axis)) for axis in points)
    at = np.log(np.maximum(tokens, 1))
    beyond = np.maximum(at - x[-1], 0) * (y[-1] - y[-2]) / (x[-1] - x[-2])
    effective = np.exp(np.interp(at, x, y) + beyond)
    return np.where(np.asarray(tokens) < 1, 0.0, np.minimum(effective, np.maximum(tokens, 1)))
