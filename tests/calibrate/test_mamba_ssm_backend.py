"""mamba-ssm as a cross-check of the scan; runs where it is installed."""

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from small_model import prompt, small_model

from calibrate.generate import two_tower

pytestmark = pytest.mark.skipif(find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")


@pytest.fixture(autouse=True)
def _no_device_to_switch_to(monkeypatch):
    """Its launchers switch to the tensors' GPU; the interpreter has none."""
    if not torch.cuda.is_available():
        monkeypatch.setattr("torch.cuda.device", lambda index: nullcontext())


LONG = pytest.param(300, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="autotunes on a GPU"))


@pytest.mark.parametrize("tokens", [1, 16, LONG])
def test_it_agrees_with_our_scan(tokens):
    from calibrate.kernels import block_scan
    from calibrate.mamba_ssm_backend import load, scan

    load()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    heads, width, states, groups, slots = 4, 16, 16, 2, 3
    channels = heads * width + 2 * groups * states
    xbc, dt = torch.randn(2, tokens, channels, device=device), torch.randn(2, tokens, heads, device=device)
    states_ = [torch.randn(slots, channels, 3, device=device), torch.randn(slots, heads, width, states, device=device)]
    weights = [torch.randn(channels, 4, device=device), torch.randn(channels, device=device)]
    weights += [torch.randn(heads, device=device) for _ in range(3)]
    rows = torch.tensor([2, 0], device=device)
    ours, theirs = [s.clone() for s in states_], [s.clone() for s in states_]
    expected = block_scan(xbc, dt, *ours, rows, *weights, groups, True)
    torch.testing.assert_close(scan(xbc, dt, *theirs, rows, *weights, groups, True), expected, rtol=1e-3, atol=1e-3)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_generation_is_the_same():
    from calibrate.mamba_ssm_backend import use_mamba_ssm

    model = small_model({"hybrid_override_pattern": "M*E"})
    expected = two_tower(model, [prompt(9)], 32, 0.02, 2)
    use_mamba_ssm(model)
    assert two_tower(model, [prompt(9)], 32, 0.02, 2) == expected
