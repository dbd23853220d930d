"""The command line of ``calibrate``. Exit codes: 0 done, 2 bad input, 130 interrupted (what was measured is kept)."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from twotower_sim.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def _numbers(text: str | None, name: str, kind: type = int) -> list:
    """Rising numbers of a comma-separated list."""
    if text is None:
        return []
    try:
        values = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"{name} {text}: expected numbers with commas between, as in {name} 1,2,4") from None
    return values


@app.command()
def calibrate(
    model: Annotated[
        str,
        typer.Option(
            help="tiny, the folder of a checkpoint or its name on the Hugging Face hub; with --weights random also a config.json."
        ),
    ] = "tiny",
    out: Annotated[
        Path | None, typer.Option(help="The profile to write; <model>.profile.json.gz if not given.")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda:0, or two for the context and the denoiser tower: cuda:0,cuda:1. Default: the GPUs that are there."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float32; default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    weights: Annotated[str, typer.Option(help="checkpoint, or random: latency without a checkpoint.")] = "checkpoint",
    skew: Annotated[
        float, typer.Option(help="With random weights: how unevenly experts are chosen; 0 is uniform.")
    ] = 0.0,
    backend: Annotated[str, typer.Option(help="own kernels, or mamba_ssm for the Mamba layers.")] = "own",
    batch: Annotated[str | None, typer.Option(help="Sequences of a pass, as in 1,2,4,8.")] = None,
    context: Annotated[str | None, typer.Option(help="Tokens that a sequence has in the cache.")] = None,
    tokens: Annotated[str | None, typer.Option(help="New tokens of a prompt.")] = None,
    block_size: Annotated[str | None, typer.Option(help="Block sizes; default: the model's.")] = None,
    repetitions: Annotated[int, typer.Option(min=3, help="Samples of a point.")] = 15,
    refine: Annotated[int, typer.Option(min=0, help="How often to add points where interpolation is worst.")] = 1,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Error of a held-out point above which it joins the grid.")
    ] = 0.05,
    gamma: Annotated[str | None, typer.Option(help="Thresholds to generate at.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Steps per block (T) to generate at; default: the block size and half of it.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to generate for a prompt; default: 12 blocks.")
    ] = None,
    decode_batch: Annotated[int, typer.Option(min=1, help="Prompts to generate for at a time.")] = 16,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of {class, prompt}; default: the bundled ones.")] = None,
    tasks: Annotated[Path | None, typer.Option(help="JSONL of {class, prompt, answer} to score.")] = None,
    only: Annotated[str | None, typer.Option(help="latency or commits.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch on a CPU.")] = 1,
    seed: Annotated[int, typer.Option(help="Of random weights and inputs.")] = 0,
    eager: Annotated[bool, typer.Option("--eager", help="No CUDA graphs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    assume: Annotated[
        str | None, typer.Option(help="With --dry-run: estimate for this GPU preset or file instead.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop what an interrupted calibration left.")] = False,
) -> None:
    """Run the real two-tower decoder on this machine, measure its passes and what it commits, and write a profile."""
    from rich.console import Console

    from calibrate import machine
    from calibrate.calibration import Calibration, Settings

    if assume and not dry_run:
        raise InputError("--assume needs --dry-run: figures of a GPU that is not here are no measurement")
    settings = Settings(
        model=model, out=out or Path(f"{Path(model).name}.profile.json.gz"), devices=devices, dtype=dtype,
        weights=weights, skew=skew, backend=backend, batch=_numbers(batch, "--batch"),
        context=_numbers(context, "--context"), tokens=_numbers(tokens, "--tokens"),
        block_sizes=_numbers(block_size, "--block-size"), repetitions=repetitions, refine=refine, tolerance=tolerance,
        gammas=_numbers(gamma, "--gamma", float), steps_per_block=_numbers(steps, "--steps"), new_tokens=new_tokens,
        decode_batch=decode_batch, prompts=prompts, tasks=tasks, only=only, fresh=fresh, seed=seed, graphs=not eager,
    )  # fmt: skip
    with machine.threads(threads):
        calibration = Calibration(settings, assume)
        for line in calibration.estimate():
            typer.echo(line)
        if dry_run:
            return
        try:
            calibration.run(Console(stderr=True))
        except KeyboardInterrupt:
            print(
                f"Interrupted; what was measured is kept: the same command goes on from {settings.journal}.",
                file=sys.stderr,
            )
            raise typer.Exit(130) from None
    typer.echo(f"profile    {settings.out}; look at it with: twotower-sim profile show {settings.out}")


def main() -> None:
    try:
        app()
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"Error: {error.name} is not installed: pip install 'twotower-sim[calibrate]'", file=sys.stderr)
        sys.exit(2)
