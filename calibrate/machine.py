"""The machine under calibration: which it is, what it reaches, and in which state it was."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from twotower_sim.errors import InputError

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
GEMM_SIZE = {"cuda": 8192, "cpu": 512}
FLUSH_BYTES = 256 << 20  # more than any L2 holds


def devices(names: str | None, here: bool = True) -> tuple[torch.device, torch.device]:
    """Devices of the context and the denoiser tower. None: the GPUs that are there (at most two), else the CPU.
    ``here`` False: of some other machine, a GPU if not named."""
    if names is None and not here:
        names = "cuda:0"
    if names is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = ("cpu", "cuda:0", "cuda:0,cuda:1")[min(count, 2)]
    parts = names.split(",")
    try:
        found = [torch.device(part.strip()) for part in parts]
    except RuntimeError:
        raise InputError(f"--devices {names}: expected cpu, cuda:0 or cuda:0,cuda:1") from None
    if len(found) > 2:
        raise InputError(f"--devices {names}: expected one device, or two for the context and the denoiser tower")
    for device in found:
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"--devices {names}: {device.type} is not supported; expected cpu or cuda")
        if device.type == "cuda" and here and not torch.cuda.is_available():
            raise InputError(
                f"--devices {names}: this machine has no CUDA GPU, or torch {torch.__version__} cannot use it"
            )
        if device.type == "cuda" and here and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--devices {names}: this machine has {torch.cuda.device_count()} GPU(s)")
    return found[0], found[-1]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch on a CPU; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stopwatch:
    """Seconds of a call: CUDA events after an L2 flush on a GPU, the monotonic clock on a CPU."""

    def __init__(self, *used: torch.device) -> None:
        self._devices = sorted({device for device in used if device.type == "cuda"}, key=str)
        self._flush = [torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) for device in self._devices]

    def __call__(self, work: Callable[[], Any]) -> float:
        if not self._devices:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        if len(self._devices) > 1:  # events of one device do not see the other's work
            self._settle()
            start = time.perf_counter()
            work()
            self._synchronize()
            return time.perf_counter() - start
        with torch.cuda.device(self._devices[0]):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._settle()
            begin.record()
            work()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

    def _settle(self) -> None:
        for flush in self._flush:
            flush.zero_()
        self._synchronize()

    def _synchronize(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)


@cache
def facts(device: torch.device, count: int) -> dict[str, Any]:
    """The profile's device: name, memory, and the bandwidth and throughput that plain torch reaches on it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = _cpu_name(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    bandwidth, flops = ceilings(device)
    return {
        "name": name,
        "count": count,
        "memory_mib": memory >> 20,
        "memory_bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "bf16_tflops": round(flops / 1e12, 3),
    }


def ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a device copy (read + write), FLOP/s of a square GEMM (bf16; on a CPU fp32)."""
    watch, kind = Stopwatch(device), device.type
    source = torch.zeros(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    n, dtype = GEMM_SIZE[kind], torch.bfloat16 if kind == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    copy_s, gemm_s = (
        statistics.median([watch(work) for _ in range(5)]) for work in (lambda: target.copy_(source), lambda: a @ b)
    )
    return 2 * COPY_BYTES[kind] / copy_s, 2 * n**3 / gemm_s


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, limits and clocks, and the code's commit; what cannot be found out is left out."""
    out: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    try:
        import triton

        out["triton"] = triton.__version__
    except ImportError:
        pass
    if device.type == "cuda":
        out |= _nvidia_smi(device) | {"cuda": str(torch.version.cuda)}
    return out | _commit()


def _nvidia_smi(device: torch.device) -> dict[str, Any]:
    """Driver, clocks and limits of a GPU."""
    fields = (
        "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,power.max_limit,"
        "temperature.gpu,ecc.mode.current,mig.mode.current,persistence_mode"
    )
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", device.index or 0))
    uuid = uuid if uuid.isdigit() or uuid.startswith("GPU-") else f"GPU-{uuid}"
    said = _said("nvidia-smi", f"--id={uuid}", f"--query-gpu={fields}", "--format=csv,noheader")
    return dict(zip(fields.split(","), (part.strip() for part in said.split(",")), strict=False)) if said else {}


def _commit() -> dict[str, Any]:
    here = Path(__file__).parent
    commit = _said("git", "-C", str(here), "rev-parse", "HEAD")
    code = "status", "--porcelain", "--", ".", "../twotower_sim"
    return {"commit": commit, "dirty": bool(_said("git", "-C", str(here), *code))} if commit else {}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _said(*command: str) -> str:
    """What a program prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
