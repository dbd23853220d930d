"""A calibration from its settings to a profile: the composition root of this package."""

import hashlib
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from calibrate import checkpoint, machine
from calibrate.bench import Bench
from calibrate.commits import Decoding, decode_prompts, fitted, quality, records
from calibrate.estimate import Estimate
from calibrate.in_situ import Loop, engine_figures, loops
from calibrate.journal import Journal
from calibrate.model import Config, TwoTower
from calibrate.prompts import Prompt, read_prompts
from calibrate.shapes import Shapes, Sizes
from calibrate.survey import Survey, progress
from calibrate.tiny import FOLDER as TINY
from calibrate.tokens import Tokenizer, tokenizer_of
from twotower_sim.errors import InputError
from twotower_sim.gpu import load_gpu
from twotower_sim.preset import preset_path
from twotower_sim.profile import (
    MeasuredDevice,
    MeasuredLatency,
    Profile,
    Provenance,
    save_profile,
)

DEFAULT_SHAPES = {
    "cuda": Shapes([1, 2, 4, 8, 16, 32, 64, 128], [0, 1024, 4096, 16384, 65536], [16, 128, 512, 2048, 8192], []),
    "cpu": Shapes([1, 2, 4, 8, 16], [0, 128, 512, 1024], [16, 64, 256], []),
}
GAMMAS = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
BUNDLED = Path(__file__).parent / "prompts.jsonl"


@dataclass(frozen=True)
class Settings:
    """What a user asks; see the command line's help. Empty lists and None stand for defaults. Raises InputError for
    what no calibration does."""

    out: Path
    model: str = "tiny"
    devices: str | None = None
    dtype: str | None = None
    weights: str = "checkpoint"
    skew: float = 0.0
    backend: str = "own"
    batch: list[int] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    block_sizes: list[int] = field(default_factory=list)
    repetitions: int = 15
    refine: int = 1
    tolerance: float = 0.05
    gammas: list[float] = field(default_factory=list)
    steps_per_block: list[int] = field(default_factory=list)
    new_tokens: int | None = None
    decode_batch: int = 16
    prompts: Path | None = None
    tasks: Path | None = None
    only: str | None = None
    fresh: bool = False
    seed: int = 0
    graphs: bool = True

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("--weights", self.weights, ("checkpoint", "random")),
            ("--backend", self.backend, ("own", "mamba_ssm")),
            ("--only", self.only or "latency", ("latency", "commits")),
        ):
            if value not in allowed:
                raise InputError(f"{option} {value}: expected {' or '.join(allowed)}")
        if self.only == "commits" and self.weights == "random":
            raise InputError("--only commits --weights random: random weights commit nothing that means anything")
        for option, number, fewest in (
            ("--repetitions", self.repetitions, 3),
            ("--refine", self.refine, 0),
            ("--tolerance", self.tolerance, 0),
            ("--new-tokens", self.new_tokens, 1),
            ("--decode-batch", self.decode_batch, 1),
        ):
            if number is not None and number < fewest:
                raise InputError(f"{option} {number}: expected {fewest} or more")
        for option, values, least in (
            ("--batch", self.batch, 1),
            ("--context", self.context, 0),
            ("--tokens", self.tokens, 1),
            ("--block-size", self.block_sizes, 1),
            ("--steps", self.steps_per_block, 1),
        ):
            _rising(option, values)
            if values and values[0] < least:
                raise InputError(f"{_as_typed(option, values)}: found {values[0]}; expected numbers from {least}")
        _rising("--gamma", self.gammas)
        if any(not 0 < gamma < 1 for gamma in self.gammas):
            raise InputError(f"{_as_typed('--gamma', self.gammas)}: expected numbers between 0 and 1")

    @property
    def journal(self) -> Path:
        """Where results are kept until the profile is written."""
        return self.out.with_name(self.out.name + ".journal")


def _rising(option: str, values: list) -> None:
    if values != sorted(set(values)):
        raise InputError(f"{_as_typed(option, values)}: expected rising numbers")


def _as_typed(option: str, values: list) -> str:
    return f"{option} {','.join(map(str, values))}"


class Calibration:
    """Resolves the settings against the machine and the checkpoint; raises InputError for what cannot be."""

    def __init__(self, settings: Settings, assumed: str | None = None) -> None:
        self.settings = settings
        self.context, self.denoiser = machine.devices(settings.devices, here=not assumed)
        self.kind = self.context.type
        self.dtype = _dtype(settings.dtype, self.kind)
        self.folder = TINY if settings.model == "tiny" else None
        self.config, self.name = self._model()
        self.split = self.context != self.denoiser
        self.shapes = self._shapes()
        self.prompts = self._prompts()
        self.decoding = self._decoding()
        self.assumed = load_gpu(assumed, Path()) if assumed else None

    def _model(self) -> tuple[Config, str]:
        config, name = self._dimensions()
        return config, config.name or name

    def _dimensions(self) -> tuple[Config, str]:
        model = self.settings.model
        path = preset_path("models", model, ".json") or Path(model)
        if self.folder is None and path.is_file():
            if self.settings.weights != "random":
                raise InputError(
                    f"--model {model}: dimensions without weights; name a checkpoint, or use --weights random"
                )
            return Config.read(path), model
        if self.folder is None:
            self.folder = checkpoint.find(model)
        return Config.read(self.folder / "config.json"), model

    def _shapes(self) -> Shapes:
        """Those asked for, or defaults for the kind of machine; within the model's positions."""
        asked, default = self.settings, DEFAULT_SHAPES[self.kind]
        room = self.config.max_position_embeddings // 2  # a prompt on a context
        shapes = Shapes(
            asked.batch or default.sequences,
            asked.context or [context for context in default.context if context <= room],
            asked.tokens or [tokens for tokens in default.tokens if tokens <= room],
            asked.block_sizes or [self.config.block_size],
        )
        longest = shapes.context[-1] + max(*shapes.tokens, *shapes.block_sizes)
        if longest > self.config.max_position_embeddings:
            raise InputError(
                f"--context and --tokens reach {longest} tokens; {self.name} has "
                f"{self.config.max_position_embeddings} positions (max_position_embeddings)"
            )
        return shapes

    def _prompts(self) -> list[Prompt]:
        """Prompts, then tasks; none where only latency is asked for or there are no weights to speak of."""
        if self.settings.only == "latency" or self.settings.weights == "random":
            return []
        own = TINY / "prompts.jsonl" if self.settings.model == "tiny" else BUNDLED
        tasks = read_prompts(self.settings.tasks, answers=True) if self.settings.tasks else []
        return [*read_prompts(self.settings.prompts or own), *tasks]

    def _decoding(self) -> Decoding:
        asked, size = self.settings, self.config.block_size
        return Decoding(
            asked.gammas or GAMMAS,
            asked.steps_per_block or sorted({max(size // 2, 1), size}),
            asked.new_tokens or 12 * size,
            asked.decode_batch,
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's. Raises InputError where it has none."""
        assert self.folder is not None
        return tokenizer_of(self.folder, self.config)

    # ------------------------------------------------------------------ estimate

    def estimate(self) -> list[str]:
        """What it will take, in lines for a person."""
        settings = self.settings
        sizes = Sizes.of(self.config, self.dtype)
        estimate = Estimate(self.config, sizes, self.shapes, self.split, self._device_facts(), self.kind)
        lines, total_s = [f"model      {self.name}: {self.config.hybrid_override_pattern}", *estimate.memory()], 0.0
        if settings.only != "commits":
            count, total_s = estimate.latency_s(settings.repetitions, settings.refine)
            lines.append(f"latency    {count} points x {settings.repetitions} samples: {_span(total_s)}")
        if self.prompts:
            seconds, modes = estimate.commits_s(len(self.prompts), self.decoding), len(list(self.decoding.modes()))
            lines.append(f"commits    {len(self.prompts)} prompts x {modes} modes: {_span(seconds)}")
            total_s += seconds
        return [
            *lines,
            f"in all     about {_span(total_s)}, from bandwidth and launches; loading, compiling and the engine's "
            "loops come on top",
        ]

    def _device_facts(self) -> dict[str, Any]:
        if self.assumed:
            return self.assumed.model_dump()
        return machine.facts(self.context, 2 if self.split else 1)

    # ------------------------------------------------------------------ measuring

    def run(self, console: Console) -> Profile:
        """Measure, write the profile and return it."""
        settings = self.settings
        journal = self.journal()
        if len(journal):
            console.print(f"going on from {journal.path}: {len(journal):,} results are there")
        model = self.loaded()
        latency = self._latency(model, journal, console) if settings.only != "commits" else None
        profile = self.profile(latency, self.commits(model, journal, console))
        save_profile(profile, settings.out)
        journal.remove()
        return profile

    def journal(self) -> Journal:
        """What was measured so far with these settings."""
        settings = self.settings
        if settings.fresh:
            settings.journal.unlink(missing_ok=True)
        return Journal(settings.journal, self._header())

    def _header(self) -> dict[str, Any]:
        """What results must have in common to go into one profile."""
        prompts = "\n".join(prompt.model_dump_json() for prompt in self.prompts)
        facts = machine.environment(self.context)
        return {
            "model": self.name,
            "config": str(self.config),
            "devices": [str(self.context), str(self.denoiser)],
            "dtype": str(self.dtype),
            "shapes": asdict(self.shapes),
            "decoding": asdict(self.decoding),
            "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
            **{key: getattr(self.settings, key) for key in ("weights", "skew", "backend", "repetitions", "seed")},
            **{key: facts.get(key) for key in ("torch", "commit", "threads")},
        }

    def loaded(self) -> TwoTower:
        """The model on its devices."""
        settings = self.settings
        if settings.weights == "random":
            model = checkpoint.random(
                self.config, self.context, self.denoiser, self.dtype, settings.seed, settings.skew
            )
        else:
            assert self.folder is not None
            model = checkpoint.load(self.folder, self.context, self.denoiser, self.dtype)
        if settings.backend == "mamba_ssm":
            from calibrate.mamba_ssm_backend import use_mamba_ssm

            use_mamba_ssm(model)
        return model

    def _latency(self, model: TwoTower, journal: Journal, console: Console) -> MeasuredLatency:
        settings = self.settings
        latency = self.survey(model, settings.repetitions, journal, console).run(settings.refine, settings.tolerance)
        return self.with_engine(latency, self.engine_loops(model)) if not self.split else latency

    def survey(self, model: TwoTower, repetitions: int, journal: Journal, console: Console) -> Survey:
        bench = Bench(model, self.shapes.at_context, self.settings.seed, self.settings.graphs)
        return Survey(bench, self.shapes, Sizes.of(self.config, self.dtype), repetitions, journal, console)

    def engine_loops(self, model: TwoTower) -> list[Loop]:
        """Rounds of the serving engine in closed loops."""
        texts = [torch.tensor(self.tokenizer.encode(prompt.prompt)) for prompt in self.prompts]
        gamma = self.decoding.gammas[len(self.decoding.gammas) // 2]
        return loops(model, self.shapes, gamma, texts or [self._noise()], self.settings.graphs)

    def with_engine(self, latency: MeasuredLatency, of: list[Loop]) -> MeasuredLatency:
        """The section with what passes take inside the engine."""
        return latency.model_copy(update={"engine": engine_figures(latency, of, self.config.block_size)})

    def _noise(self) -> torch.Tensor:
        """A text for a model without prompts."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        return torch.randint(self.config.mask_token_id + 1, self.config.vocab_size, (4096,), generator=generator)

    def commits(self, model: TwoTower, journal: Journal, console: Console) -> dict[str, Any]:
        """The sections of a profile that tell of commits; none where there are no prompts."""
        if not self.prompts:
            return {}
        total = len(self.prompts) * len(list(self.decoding.modes()))
        with progress(console, total, "generating") as done:
            decoded, routing = decode_prompts(model, self.tokenizer, self.prompts, self.decoding, journal, done)
        found = records(decoded, self.prompts)
        return {
            "commit_records": found,
            "commits": fitted(found, self.config.block_size),
            "quality": quality(decoded, self.prompts, self._task()),
            "routing": routing,
        }

    def _task(self) -> str:
        """What the answers are of."""
        given = self.settings.tasks or self.settings.prompts
        return given.name if given else "bundled prompts"

    def profile(self, latency: MeasuredLatency | None, commits: dict[str, Any]) -> Profile:
        """Everything that was measured, and what of."""
        device = self._device_facts()
        return Profile(
            provenance=Provenance(
                kind="measured",
                source=f"calibrate --model {self.settings.model}",
                device=f"{device['count']} x {device['name']}" if device["count"] > 1 else device["name"],
                model=self.name,
                date=datetime.now(UTC).date().isoformat(),
                notes=self._notes(),
                environment=machine.environment(self.context) | {"seed": self.settings.seed} | self._revision(),
                dtype=str(self.dtype).removeprefix("torch."),
                placement="split" if self.split else "colocated",
                backend=self.settings.backend,
                weights="random" if self.settings.weights == "random" else "checkpoint",
            ),
            device=MeasuredDevice(**device),
            latency=latency,
            **commits,
        )

    def _revision(self) -> dict[str, str]:
        """Of the weights: the hub's, or their hash where they are one file."""
        if self.folder is None:
            return {}
        if self.folder.parent.name == "snapshots":
            return {"revision": self.folder.name}
        file = self.folder / checkpoint.SINGLE
        if not file.is_file():
            return {}
        with file.open("rb") as opened:
            return {"weights_sha256": hashlib.file_digest(opened, "sha256").hexdigest()}

    def _notes(self) -> list[str]:
        notes = []
        if self.settings.weights == "random":
            notes.append(f"random weights: latency only, experts chosen with skew {self.settings.skew:g}")
        if self.kind == "cpu":
            notes.append("measured on a CPU, in plain torch")
        return notes


def _dtype(name: str | None, kind: str) -> torch.dtype:
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name is None:
        return torch.bfloat16 if kind == "cuda" else torch.float32
    if name not in known:
        raise InputError(f"--dtype {name}: expected {' or '.join(known)}")
    return known[name]


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
