"""Weights of the tiny two-tower: as training begins, as the denoiser begins, and as they are shipped."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from calibrate.model import Config
from calibrate.tiny import corpus
from calibrate.tiny.training_model import Weights, shapes

EXACT = (".A_log", ".dt_bias", ".D", ".e_score_correction_bias")
"""Tensors that stay in fp32."""


def initial(c: Config, seed: int) -> Weights:
    """Layers that leave the residual stream as it is, and heads that predict nothing."""
    generator = Generator().manual_seed(seed)
    return {name: _initial(name, shape, generator) for name, shape in sorted(shapes(c).items())}


def _initial(name: str, shape: tuple[int, ...], generator: Generator) -> Tensor:
    if name.endswith(".A_log"):
        return torch.linspace(1, 8, *shape).log()
    if name.endswith(".dt_bias"):  # inverse softplus of time steps of 0.01 to 0.1
        return torch.logspace(-2, -1, *shape).expm1().log()
    if name.endswith((".D", "norm.weight", "norm_f.weight")):
        return torch.ones(shape)
    if name.startswith("scale_shift_tables"):  # shift, scale, gate
        return torch.tensor([0.0, 0.0, 1.0])[:, None].repeat(1, shape[1])
    if len(shape) == 1 or name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "head.weight")):
        return torch.zeros(shape)
    if name.startswith("t_block"):
        return torch.zeros(shape)
    std = 1.0 if name.endswith("embeddings.weight") else shape[-1] ** -0.5
    return std * torch.randn(shape, generator=generator)


def denoiser_from_context(weights: Weights) -> None:
    """Start the denoiser as a copy of the trained context tower; a mask looks like the mean byte."""
    for name in weights:
        if name.startswith("context_tower."):
            weights[name.replace("context_", "denoiser_", 1)] = weights[name].clone()
    weights["lm_head.weight"] = weights["context_lm_head.weight"].clone()
    embeddings = weights["denoiser_tower.embeddings.weight"]
    embeddings[corpus.MASK] = embeddings[corpus.SPECIAL :].mean(0)


def save(weights: Weights, folder: Path, metadata: dict[str, str]) -> None:
    tensors = {name: t.contiguous() if name.endswith(EXACT) else t.bfloat16() for name, t in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata)
