"""The two stages of training: what each trains, and its loss.

The denoiser learns by masked block diffusion (Arriola et al., arXiv 2503.09573): k of a block's S positions are masked,
k uniform on 1..S and stratified over the batch, t = k / S, and the loss is the mean over blocks of the mean negative
log likelihood of the masked positions.
"""

import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from calibrate.model import Config
from calibrate.tiny.training_model import Weights, context, denoise, for_matmul

MATMUL_DTYPE = torch.bfloat16

Loss = Callable[[Weights, Config, Tensor, Generator], tuple[Tensor, Tensor]]
"""Of ids (B, T + 1): nats a byte, and the share of tokens that chose each expert (MoE layers, E)."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled where there is a C++ compiler, as it is where there is none."""
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++")
    return torch.compile(function) if any(map(shutil.which, compilers)) else function


class Stage(NamedTuple):
    name: str
    prefixes: tuple[str, ...]  # of what is trained
    loss: Loss  # of ids (B, T + 1): nats a byte, and the load of each expert (MoE layers, E)
    bias_rate: float  # of the routers' correction bias


@compiled
def context_loss(w: Weights, c: Config, ids: Tensor, _: Generator) -> tuple[Tensor, Tensor]:
    read = context(for_matmul(w, MATMUL_DTYPE), c, ids[:, :-1])
    return F.cross_entropy(read.logits.flatten(0, 1), ids[:, 1:].flatten()), read.loads


def denoiser_loss(w: Weights, c: Config, ids: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    blocks = ids[:, :-1].unflatten(1, (-1, c.block_size))
    return _masked_loss(w, c, blocks, masks(blocks, generator))


@compiled
def _masked_loss(w: Weights, c: Config, blocks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    cast = for_matmul(w, MATMUL_DTYPE)
    with torch.no_grad():
        left = context(cast, c, blocks.flatten(1)).layers
    noisy = blocks.masked_fill(mask, c.mask_token_id)
    read = denoise(cast, c, noisy, mask.float().mean(-1), left)
    nats = F.cross_entropy(read.logits.flatten(0, 2), blocks.flatten(), reduction="none").view_as(blocks)
    return ((nats * mask).sum(-1) / mask.sum(-1)).mean(), read.loads


def masks(blocks: Tensor, generator: Generator) -> Tensor:
    """Masked positions of ``blocks`` (B, n, S), 1 to S of them a block, every number as often as any other."""
    count, size = blocks.shape[:-1].numel(), blocks.shape[-1]
    numbers = torch.randperm(count, generator=generator) * size // count + 1
    ranks = torch.rand(count, size, generator=generator).argsort(-1).argsort(-1)
    return (ranks < numbers[:, None]).view_as(blocks)


STAGES = (
    Stage("context tower", ("context_",), context_loss, 0.003),
    Stage("denoiser", ("denoiser_", "lm_head", "t_", "scale_"), denoiser_loss, 0.01),
)
