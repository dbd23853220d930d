"""What a calibration will take, before it starts: memory from the dimensions, time from a rough roofline."""

from math import prod
from typing import Any

from calibrate.commits import Decoding
from calibrate.model import Config
from calibrate.shapes import Point, Shapes, Sizes, context_of, points
from twotower_sim.profile import AXES

LAYER_OVERHEAD_S = {"cuda": 40e-6, "cpu": 400e-6}
"""Launches of a layer's kernels, of the order that eager torch shows."""
REACHED = {"cuda": 0.5, "cpu": 0.15}
"""Share of a copy's bandwidth and a large GEMM's throughput that small passes reach, of the order of what was seen."""
TRANSFER_BYTES_PER_S = 25e9
STEPS_A_BLOCK = 9
HELD_OUT = 0.3  # points held out, as a share of those on the grid
WARM_UP = 2


class Estimate:
    """For ``device``, figures as a GPU file or a profile has them; ``kind`` is cuda or cpu."""

    def __init__(
        self, config: Config, sizes: Sizes, shapes: Shapes, split: bool, device: dict[str, Any], kind: str
    ) -> None:
        self._config, self._sizes, self._shapes, self._split = config, sizes, shapes, split
        self._device, self._kind = device, kind

    def memory(self) -> list[str]:
        sizes, shapes = self._sizes, self._shapes
        held = shapes.context[-1] + max(shapes.tokens)
        cache = shapes.sequences[-1] * (sizes.state_bytes + held * sizes.token_bytes)
        towers = "one tower" if self._split else "both towers"
        weights = sizes.tower_bytes * (1 if self._split else 2)
        room = f" of {self._device['memory_mib'] / 953.674:.0f} GB"
        return [
            f"weights    {weights / 1e9:.2f} GB for {towers} on a device{room}",
            f"cache      {sizes.state_bytes / 1e6:.2f} MB of Mamba states a sequence, {sizes.token_bytes:,} B of keys "
            f"and values a token; the largest asked for takes {cache / 1e9:.1f} GB (what does not fit is skipped)",
        ]

    def latency_s(self, repetitions: int, refine: int) -> tuple[int, float]:
        """Points, and seconds for all of them."""
        axes = self._shapes.axes(self._split)
        count = sum(prod(len(values) for values in grid.values()) for grid in axes.values())
        seconds = sum(self._pass_s(point) for point in points(axes))
        return count, (repetitions + WARM_UP) * seconds * (1 + HELD_OUT * (1 + refine))

    def commits_s(self, prompts: int, decoding: Decoding) -> float:
        batch, size, at = decoding.batch, self._config.block_size, self._shapes.at_context
        denoise = self._pass_s(Point("denoise", (size, batch, at)))
        decode = self._pass_s(Point("decode", (batch, at)))
        modes = len(decoding.gammas) * len(decoding.steps_per_block)
        steps = decoding.new_tokens / size * STEPS_A_BLOCK
        return -(-prompts // batch) * (modes * steps * denoise + decoding.new_tokens * decode)

    def _pass_s(self, point: Point) -> float:
        """A rough time of one pass: all bytes over the bandwidth or all FLOPs over the throughput, and launches."""
        config, sizes, device = self._config, self._sizes, self._device
        n = point.sequences
        if point.kind == "transfer":
            return n * (sizes.state_bytes + point.tokens * sizes.token_bytes) / TRANSFER_BYTES_PER_S
        tokens = n * (point.block_size if "block_size" in AXES[point.kind] else 1)
        if "tokens" in AXES[point.kind]:
            tokens = point.tokens + (n * config.block_size if "+" in point.kind else (n - 1) * point.tokens)
        untouched = (1 - config.num_experts_per_tok / max(config.n_routed_experts, 1)) ** tokens
        context = context_of(point, self._shapes.at_context)
        moved = (
            sizes.tower_bytes
            - sizes.routed_bytes * untouched
            + n * (2 * sizes.state_bytes + context * sizes.token_bytes)
        )
        flops = 2 * sizes.active * tokens
        bound = max(moved / (device["memory_bandwidth_gb_per_s"] * 1e9), flops / (device["bf16_tflops"] * 1e12))
        bound /= REACHED[self._kind]
        return bound + len(config.hybrid_override_pattern) * LAYER_OVERHEAD_S[self._kind]
