"""A GPU as the roofline and the memory account see it: editable figures, each with its source."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from twotower_sim.errors import InputError
from twotower_sim.preset import named_file
from twotower_sim.yaml_file import load_model

Positive = Annotated[float, Field(ge=1e-6, le=1e9)]
Amount = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(ge=1e-6, le=1)]
"""What no device exceeds in the units below, and no figure that follows from it overflows."""


class Link(BaseModel):
    """Bandwidth of one direction, and the time until the first byte is there."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    gb_per_s: Positive
    latency_us: Amount

    @property
    def bytes_per_s(self) -> float:
        return self.gb_per_s * 1e9

    @property
    def latency_s(self) -> float:
        return self.latency_us * 1e-6


class Efficiency(BaseModel):
    """What software reaches of the datasheet, and what launching costs. One set a GPU, for all models."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    memory: Share  # of memory_bandwidth_gb_per_s
    compute: Share  # of bf16_tflops
    kernel_gap_us: Amount  # between kernels of a CUDA graph
    kernel_launch_us: Amount  # host time of an eager launch
    graph_launch_us: Amount


class Gpu(BaseModel):
    """A GPU file. ``sources`` says for every figure where it is from, or that it is assumed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    memory_mib: int = Field(gt=0, le=1 << 30)  # as the driver reports it
    memory_bandwidth_gb_per_s: Positive
    bf16_tflops: Positive  # dense
    links: dict[str, Link] = {}  # by name: nvlink, pcie, network
    price_usd_per_hour: Amount | None = None
    power_w: Positive | None = None  # rated
    idle_power_w: Amount | None = None  # of one that waits, with a model in its memory
    efficiency: Efficiency | None = None  # None: what software reaches is not known, as of a measured device
    sources: dict[str, str] = {}

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib << 20

    @property
    def memory_bytes_per_s(self) -> float:
        return self.memory_bandwidth_gb_per_s * 1e9

    @property
    def flops(self) -> float:
        return self.bf16_tflops * 1e12

    @property
    def fastest_link(self) -> Link:
        if not self.links:
            raise InputError(f"gpu {self.name} states no links; split towers and deployment.tensor_parallel need one")
        return max(self.links.values(), key=lambda link: link.gb_per_s)

    @property
    def costs(self) -> dict[str, str]:
        """Where price and power are from, as far as they are known."""
        told = {
            key: self.sources.get(key, "of unstated source")
            for key in ("price_usd_per_hour", "power_w", "idle_power_w")
        }
        found = {}
        if self.price_usd_per_hour is not None:
            found["price"] = f"{self.price_usd_per_hour:g} USD per GPU hour: {told['price_usd_per_hour']}"
        if self.power_w is not None and self.idle_power_w is not None:
            found["power"] = (
                f"modelled: {self.power_w:g} W while computing ({told['power_w']}), {self.idle_power_w:g} W otherwise "
                f"({told['idle_power_w']}); an upper bound, as decode draws less than rated power"
            )
        return found

    @property
    def reached(self) -> Efficiency:
        """``efficiency``, where a model of time needs it."""
        if self.efficiency is None:
            raise InputError(f"gpu {self.name} states no efficiency; latency.kind roofline needs it")
        return self.efficiency


def load_gpu(gpu: str, base: Path) -> Gpu:
    """A preset by name, or a GPU file by path relative to ``base``."""
    return load_model(Gpu, named_file("gpu", gpu, ".yaml", base))
