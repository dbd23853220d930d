"""The decoder on a GPU: its kernels and CUDA graphs against plain torch on the CPU. Skipped where there is no GPU."""

import copy

import pytest
import torch
from small_model import prompt, small_model

from calibrate.generate import autoregressive, two_tower
from calibrate.graphs import Passes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

LENGTHS = [5, 33, 18, 70]
NEAR = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module")
def models():
    """The same weights on the CPU and on the GPU, in fp32."""
    here = small_model({"eos_token_id": None})
    return here, copy.deepcopy(here).to("cuda")


def prefilled(model, graphs: bool = True) -> tuple[Passes, torch.Tensor]:
    caches = model.cache(len(LENGTHS) + 1, 160)
    prompts = [prompt(n).to(model.device) for n in LENGTHS]
    logits = model.prefill(prompts, range(len(LENGTHS)), caches)
    return Passes(model, caches, graphs), logits.cpu()


def results(model, graphs: bool = True) -> list[torch.Tensor]:
    """Logits of every kind of pass in turn, at batches that change, each after what the one before it left."""
    passes, logits = prefilled(model, graphs)
    found, device = [logits], model.device
    with torch.inference_mode():
        for rows in ([0, 2], [3, 1, 0], [2, 1]):
            at = torch.tensor(rows, device=device)
            ids = torch.stack([prompt(16, row) for row in rows]).to(device)
            masked = torch.linspace(0.25, 1, len(rows), device=device)
            found.append(passes.denoise(ids, at, masked).cpu())
            passes.extend(ids, at)
            found.append(passes.decode(ids[:, 3].clone(), at).cpu())
    return found


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_every_pass_gives_what_it_gives_on_the_cpu(models, graphs):
    here, there = models
    for expected, found in zip(results(here), results(there, graphs), strict=True):
        torch.testing.assert_close(found, expected, **NEAR)


def test_generation_gives_the_same_tokens(models):
    here, there = models
    prompts = [prompt(n) for n in LENGTHS]
    for expected, found in (
        (two_tower(here, prompts, 48, 0.02, 16), two_tower(there, prompts, 48, 0.02, 16)),
        (autoregressive(here, prompts, 20), autoregressive(there, prompts, 20)),
    ):
        assert [of.tokens for of in found] == [of.tokens for of in expected]
        assert [of.blocks for of in found] == [of.blocks for of in expected]
