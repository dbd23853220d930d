"""Compile the kernels for GPUs that are not here, at the real model's shapes, and read what they take of the chip.

``python -m calibrate.kernels.ahead_of_time`` prints a table. The launchers run on tensors without data, and what they
would launch is compiled instead: the table shows the tiles, types and specialisations that serving uses.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from calibrate.kernels.attention import triton_block_attention
from calibrate.kernels.confidence import triton_commit, triton_confidence
from calibrate.kernels.experts import triton_grouped_experts
from calibrate.kernels.norm import triton_modulated_norm
from calibrate.kernels.scan import triton_block_scan

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
REGISTER_LIMIT = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}  # a thread
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

HQ, HK, D = 32, 2, 128
H, P, N, GROUPS, TAPS = 64, 64, 128, 8, 4
WIDTH, HIDDEN, EXPERTS, TOP = 2688, 1856, 128, 6
BLOCK, VOCABULARY, SLOTS, CONTEXT = 16, 131_072, 64, 32_768


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a chip: registers a thread, bytes spilled a thread, shared memory a program."""

    target: str
    case: str
    kernel: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def fits(self) -> bool:
        within = self.registers <= REGISTER_LIMIT[self.target] and self.shared_bytes <= SHARED_LIMIT_BYTES[self.target]
        return within and self.spilled_bytes == 0


def usages(target: str) -> Iterator[Usage]:
    """Compile everything for one target. Needs a process without TRITON_INTERPRET."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    triton.runtime.driver.set_active(_AbsentGpu(TARGETS[target]))
    for case, launcher in _cases().items():
        for compiled in _compiled(launcher):
            registers, spilled = _registers(compiled)
            name, shared, warps = compiled.metadata.name, compiled.metadata.shared, compiled.metadata.num_warps
            yield Usage(target, case, name, warps, registers, spilled, shared)


class _AbsentGpu:
    """What Triton asks of a driver before it launches anything."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target.arch)  # the key of Triton's cache

    def get_current_stream(self, device: str) -> int:
        return 0


def _compiled(launcher: Callable[[], object]) -> list[Any]:
    """The kernels that ``launcher`` would launch."""
    found, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, **options: found.append(run(self, *args, **{**options, "warmup": True}))
    try:
        launcher()
    finally:
        JITFunction.run = run
    return found


def _registers(compiled: Any) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        counts = [re.findall(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "private_segment_fixed_size")]
        return int(counts[0][0]), int(counts[1][0])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [os.fspath(CUOBJDUMP), "-res-usage", os.fspath(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", text)[0]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _cases() -> dict[str, Callable[[], object]]:
    """A launch of every kernel in every regime in which its launcher chooses other tiles."""
    out: dict[str, Callable[[], object]] = {}
    for name, sequences, tokens in [("block", 1, BLOCK), ("blocks", 32, BLOCK), ("token", 32, 1), ("prompt", 1, 4096)]:
        context = name == "prompt"
        out[f"attention, {name}"] = partial(triton_block_attention, *_attention(sequences, tokens, causal=context))
        out[f"scan, {name}"] = partial(triton_block_scan, *_scan(sequences, tokens, write=context))
        out[f"experts, {name}"] = partial(triton_grouped_experts, *_experts(sequences * tokens))
    x, vector = _empty(32, BLOCK, WIDTH), _empty(32, WIDTH)
    out["norm, plain"] = partial(triton_modulated_norm, x, vector[0], 1e-5, None, None, False)
    out["norm, modulated"] = partial(triton_modulated_norm, x, vector[0], 1e-5, vector, vector, True)
    out["confidence"] = partial(triton_confidence, _empty(BLOCK, VOCABULARY), 3)
    ids, one = _empty(32, BLOCK, dtype=torch.int64), _empty(32, dtype=torch.int64)
    out["commit"] = partial(triton_commit, ids, ids, _empty(32, BLOCK, dtype=torch.float32), 0.8, one, 3)
    return out


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(sequences: int, tokens: int, causal: bool) -> tuple[Any, ...]:
    new, cache = _empty(sequences, tokens, HK, D), _empty(SLOTS, CONTEXT, HK, D)
    numbers = _empty(sequences, dtype=torch.int64)
    return _empty(sequences, tokens, HQ, D), new, new, cache, cache, numbers, numbers, causal


def _scan(sequences: int, tokens: int, write: bool) -> tuple[Any, ...]:
    inner, channels = H * P, H * P + 2 * GROUPS * N
    xbc, dt = _empty(sequences, tokens, inner + channels + H)[..., inner:].split([channels, H], dim=-1)
    states = _empty(SLOTS, channels, TAPS - 1), _empty(SLOTS, H, P, N, dtype=torch.float32)
    weights = _empty(channels, TAPS), _empty(channels), _empty(H), _empty(H), _empty(H)
    return xbc, dt, *states, _empty(sequences, dtype=torch.int64), *weights, GROUPS, write


def _experts(tokens: int) -> tuple[Any, ...]:
    matrices = _empty(EXPERTS, HIDDEN, WIDTH), _empty(EXPERTS, WIDTH, HIDDEN)
    experts_of, weights = _empty(tokens, TOP, dtype=torch.int64), _empty(tokens, TOP, dtype=torch.float32)
    return _empty(tokens, WIDTH), *matrices, experts_of, weights


def main() -> None:
    print("| target | launch | kernel | warps | registers | spilled bytes | shared KiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for target in TARGETS:
        for u in usages(target):
            figures = f"{u.warps} | {u.registers} | {u.spilled_bytes} | {u.shared_bytes / 1024:.1f}"
            print(f"| {target} | {u.case} | `{u.kernel}` | {figures} |{'' if u.fits else ' does not fit'}", flush=True)


if __name__ == "__main__":
    main()
