"""Train the tiny two-tower: the context tower as an autoregressive model, then, with it frozen, the denoiser.

    python -m calibrate.tiny.train --out FOLDER [--minutes 15 15 | --steps 2000 2000] [--seed 0]

FOLDER gets model.safetensors in BF16. Progress is kept in FOLDER/training.pt every minute, and the same command goes on
from there. Minutes count training alone, on one thread and without compilation; steps give the same weights every time.

Projections are trained with Muon, the rest with AdamW; correction biases of the routers move against the sign of the
load (Wang et al., arXiv 2408.15664).
"""

import argparse
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Generator, Tensor

from calibrate.model import Config
from calibrate.tiny import FOLDER, corpus
from calibrate.tiny.progression import Budget, Progression
from calibrate.tiny.stages import STAGES
from calibrate.tiny.training_model import Weights
from calibrate.tiny.weights import denoiser_from_context, save
from twotower_sim.errors import InputError

SEQUENCES, TOKENS = 8, 512
MATRIX_RATE, VECTOR_RATE = 0.02, 0.003
WARM_UP_STEPS, DECAY_SHARE, LAST_RATE = 60, 0.4, 0.02
COMPILING_STEPS = 2  # of a process, not counted as training
EVALUATED_BATCHES, STEPS_BETWEEN_EVALUATIONS = 8, 400
SECONDS_BETWEEN_CHECKPOINTS = 60


class Data(NamedTuple):
    training: Tensor  # (tokens,)
    held_out: Tensor

    @classmethod
    def read(cls, seed: int) -> "Data":
        return cls(*(torch.from_numpy(corpus.tokens(side, seed)) for side in corpus.split()))


def batch(tokens: Tensor, generator: Generator) -> Tensor:
    """Windows of TOKENS and the token after them: int64 (SEQUENCES, TOKENS + 1)."""
    starts = torch.randint(len(tokens) - TOKENS, (SEQUENCES, 1), generator=generator)
    return tokens[starts + torch.arange(TOKENS + 1)].long()


class Trainer:
    """One stage of a training. The tensors it trains are those of ``progression``, in place."""

    def __init__(self, progression: Progression, c: Config, data: Data) -> None:
        self.progression, self._config, self._data = progression, c, data
        self.stage = STAGES[progression.stage]
        trained = {name: t for name, t in progression.weights.items() if name.startswith(self.stage.prefixes)}
        self._biases = [trained.pop(name) for name in list(trained) if name.endswith("correction_bias")]
        for tensor in trained.values():
            tensor.requires_grad_()
        self._optimisers = _optimisers(trained)
        for optimiser, state in zip(self._optimisers, progression.optimisers, strict=False):
            optimiser.load_state_dict(state)
        self._first = progression.step

    def step(self, share: float) -> float:
        """One step at ``share`` of the budget; the loss in bits a byte."""
        p, started = self.progression, time.monotonic()
        loss, loads = self.stage.loss(p.weights, self._config, batch(self._data.training, p.generator), p.generator)
        loss.backward()
        now = rate(share, p.step)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["full_lr"] * now
            optimiser.step()
            optimiser.zero_grad()
        for bias, load in zip(self._biases, loads, strict=True):
            bias += self.stage.bias_rate * now * (1 / len(load) - load / load.sum()).sign()
        p.step += 1
        if p.step - self._first > COMPILING_STEPS:
            p.seconds += time.monotonic() - started
        return loss.item() / math.log(2)

    @torch.no_grad()
    def held_out_bits(self) -> float:
        """A byte, or a masked byte, over the same batches every time."""
        generator = Generator().manual_seed(0)
        weights, tokens = self.progression.weights, self._data.held_out
        losses = [
            self.stage.loss(weights, self._config, batch(tokens, generator), generator)[0].item()
            for _ in range(EVALUATED_BATCHES)
        ]
        return sum(losses) / len(losses) / math.log(2)

    def save(self, path: Path) -> None:
        self.progression.optimisers = [optimiser.state_dict() for optimiser in self._optimisers]
        self.progression.save(path)

    def finish(self) -> None:
        """Freeze what was trained and go on to the next stage."""
        for tensor in self.progression.weights.values():
            tensor.requires_grad_(False)
        self.progression.next_stage(self.held_out_bits())


def _optimisers(trained: Weights) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for projections and experts; AdamW for embeddings and heads, and at half the rate for the rest."""
    matrices: list[Tensor] = []
    tables: list[Tensor] = []
    rest: list[Tensor] = []
    for name, tensor in trained.items():
        kinds = {"proj.weight": matrices, "embeddings.weight": tables, "head.weight": tables}
        next((kind for ending, kind in kinds.items() if name.endswith(ending)), rest).append(tensor)
    groups = [{"params": tables, "full_lr": VECTOR_RATE}, {"params": rest, "full_lr": VECTOR_RATE / 2}]
    return (
        torch.optim.Muon([{"params": matrices, "full_lr": MATRIX_RATE}], weight_decay=0.01),
        torch.optim.AdamW(groups, betas=(0.9, 0.97), weight_decay=0.0, fused=True),
    )


def rate(share: float, step: int) -> float:
    """Share of the full learning rate: warm-up, then constant, then linear to LAST_RATE."""
    return min((step + 1) / WARM_UP_STEPS, 1.0, LAST_RATE + (1 - LAST_RATE) * (1 - share) / DECAY_SHARE)


def train(
    p: Progression,
    c: Config,
    data: Data,
    budgets: Sequence[Budget],
    checkpoint: Path,
    show: Callable[[str, float, float], None] = lambda name, share, bits: None,
) -> None:
    """Train ``p`` from wherever it is to the end of the last stage; ``show`` hears every step's share and loss."""
    while p.stage < len(STAGES):
        if p.stage == 1 and p.step == 0:
            denoiser_from_context(p.weights)
        trainer, saved = Trainer(p, c, data), time.monotonic()
        while (share := budgets[p.stage].share(p)) < 1:
            show(trainer.stage.name, share, trainer.step(share))
            if p.step % STEPS_BETWEEN_EVALUATIONS == 0:
                at = f"step {p.step}, {p.seconds:.0f} s"
                print(f"{trainer.stage.name}: {at}, held-out {trainer.held_out_bits():.3f} bits", flush=True)
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                trainer.save(checkpoint)
                saved = time.monotonic()
        trainer.finish()
        p.save(checkpoint)
        at = f"done after {p.steps_taken[-1]} steps"
        print(f"{trainer.stage.name}: {at}, held-out {p.held_out_bits[-1]:.3f} bits", flush=True)


def metadata(p: Progression, length: str) -> dict[str, str]:
    """How the weights were made, for as long as ``length`` says."""
    return {
        "command": f"python -m calibrate.tiny.train {length} --seed {p.seed}",
        "steps": f"{p.steps_taken[0]} {p.steps_taken[1]}",
        "held_out_bits": f"{p.held_out_bits[0]:.4f} a byte autoregressively, {p.held_out_bits[1]:.4f} a masked byte",
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    try:
        describe = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run(out: Path, budgets: Sequence[Budget], seed: int, length: str) -> None:
    """Begin or go on with the training in ``out``, and write its weights there."""
    c = Config.read(FOLDER / "config.json")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "training.pt"
    p = Progression.load(checkpoint) if checkpoint.exists() else Progression.begin(c, seed)
    if p.seed != seed:
        raise InputError(f"{checkpoint}: an unfinished training with seed {p.seed}, not {seed}; finish or delete it")
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=1.0)

        def show(name: str, share: float, bits: float) -> None:
            progress.update(bar, completed=share, description=f"{name} {bits:.3f} bits")

        train(p, c, Data.read(seed), budgets, checkpoint, show)
    save(p.weights, out, metadata(p, length))
    checkpoint.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny two-tower.")
    parser.add_argument("--out", type=Path, required=True)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--minutes", type=float, nargs=2, default=(15.0, 15.0))
    either.add_argument("--steps", type=int, nargs=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if options.steps:
            budgets, length = [Budget(steps=n) for n in options.steps], "--steps {} {}".format(*options.steps)
        else:
            budgets = [Budget(seconds=60 * n) for n in options.minutes]
            length = "--minutes {:g} {:g}".format(*options.minutes)
        run(options.out, budgets, options.seed, length)
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
