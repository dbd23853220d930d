"""How far a training is, and when it ends."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator

from calibrate.model import Config
from calibrate.tiny.training_model import Weights
from calibrate.tiny.weights import initial
from twotower_sim.errors import InputError


@dataclass(frozen=True)
class Budget:
    """When a stage ends: after so many seconds of training, or so many steps."""

    seconds: float = math.inf
    steps: float = math.inf

    def __post_init__(self) -> None:
        for name, limit in (("minutes", self.seconds / 60), ("steps", self.steps)):
            if not limit > 0:
                raise InputError(f"--{name}: found {limit:g}; expected more than 0")

    def share(self, progress: "Progression") -> float:
        return max(progress.seconds / self.seconds, progress.step / self.steps)


@dataclass
class Progression:
    """How far a training is; what an interrupted one goes on from."""

    seed: int
    weights: Weights
    generator: Generator
    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    optimisers: list[dict] = field(default_factory=list)
    steps_taken: list[int] = field(default_factory=list)  # of the stages that are done
    held_out_bits: list[float] = field(default_factory=list)  # a byte, likewise

    @classmethod
    def begin(cls, c: Config, seed: int) -> "Progression":
        return cls(seed, initial(c, seed), Generator().manual_seed(seed))

    @classmethod
    def load(cls, path: Path) -> "Progression":
        data = torch.load(path)
        generator = Generator()
        generator.set_state(data.pop("generator"))
        return cls(generator=generator, **data)

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        data = vars(self) | {"generator": self.generator.get_state()}
        data["weights"] = {name: tensor.detach() for name, tensor in self.weights.items()}
        torch.save(data, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def next_stage(self, bits: float) -> None:
        self.steps_taken.append(self.step)
        self.held_out_bits.append(bits)
        self.stage, self.step, self.seconds, self.optimisers = self.stage + 1, 0, 0.0, []
