"""How far the kernels are from their naive versions in float64.

``python -m calibrate.kernels.accuracy`` prints a table at the real model's widths. The Triton kernels run natively on a
GPU; where there is none they need TRITON_INTERPRET=1 in the environment, and are left out without it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calibrate.kernels.attention import naive_block_attention, torch_block_attention, triton_block_attention
from calibrate.kernels.confidence import naive_confidence, torch_confidence, triton_confidence
from calibrate.kernels.experts import naive_grouped_experts, torch_grouped_experts, triton_grouped_experts
from calibrate.kernels.language import INTERPRETED
from calibrate.kernels.norm import naive_modulated_norm, triton_modulated_norm
from calibrate.kernels.scan import naive_block_scan, torch_block_scan, triton_block_scan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Kernel(NamedTuple):
    """One operation three times; all take the same arguments."""

    naive: Callable[..., Any]
    torch: Callable[..., Any]
    triton: Callable[..., Any]


ATTENTION = Kernel(naive_block_attention, torch_block_attention, triton_block_attention)
SCAN = Kernel(naive_block_scan, torch_block_scan, triton_block_scan)
EXPERTS = Kernel(naive_grouped_experts, torch_grouped_experts, triton_grouped_experts)
NORM = Kernel(naive_modulated_norm, naive_modulated_norm, triton_modulated_norm)
CONFIDENCE = Kernel(naive_confidence, torch_confidence, triton_confidence)


def attention_inputs(
    dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int, contexts: Sequence[int], causal: bool
) -> list[Any]:
    """Slots in another order than sequences, one slot spare; beyond a context the cache holds what must not be read."""
    sequences, length = len(contexts), max(contexts) + 3
    qkv = torch.randn(sequences, tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    caches = torch.randn(2, sequences + 1, length, kv_heads, dim, dtype=dtype)
    rows, context = torch.randperm(sequences + 1)[:sequences], torch.tensor(contexts)
    for row, n in zip(rows, contexts, strict=True):
        caches[:, row, n:] = 1000
    return [*qkv.split([heads, kv_heads, kv_heads], dim=2), *caches, rows, context, causal]


def scan_inputs(
    dtype: torch.dtype,
    sequences: int,
    tokens: int,
    heads: int,
    dim: int,
    groups: int,
    state: int,
    taps: int,
    write: bool,
) -> list[Any]:
    inner, channels = heads * dim, heads * dim + 2 * groups * state
    _, xbc, dt = torch.randn(sequences, tokens, inner + channels + heads).split([inner, channels, heads], dim=-1)
    slots = sequences + 1
    conv_state, ssm_state = torch.randn(slots, channels, taps - 1), torch.randn(slots, heads, dim, state)
    weights = torch.randn(channels, taps) / taps, torch.randn(channels), torch.randn(heads) - 3
    a_log, d = torch.empty(heads).uniform_(1, 16).log(), torch.randn(heads)
    rows = torch.randperm(slots)[:sequences]
    low = [z.to(dtype) for z in (xbc, dt, conv_state)]
    return [*low, ssm_state, rows, *(z.to(dtype) for z in (*weights, a_log, d)), groups, write]


def experts_inputs(dtype: torch.dtype, tokens: int, width: int, hidden: int, experts: int, top: int) -> list[Any]:
    x, up, down = torch.randn(tokens, width), torch.randn(experts, hidden, width), torch.randn(experts, width, hidden)
    chosen = torch.rand(tokens, experts).topk(top).indices
    return [x.to(dtype), (up / width**0.5).to(dtype), (down / hidden**0.5).to(dtype), chosen, torch.rand(tokens, top)]


def norm_inputs(
    dtype: torch.dtype, sequences: int, tokens: int, width: int, modulated: bool, modulate_first: bool
) -> list[Any]:
    x, weight = torch.randn(sequences, tokens, width, dtype=dtype), torch.randn(width, dtype=dtype)
    shift, scale = torch.randn(sequences, 2, width).unbind(1) if modulated else (None, None)
    return [x, weight, 1e-5, shift, scale, modulate_first]


def confidence_inputs(dtype: torch.dtype, rows: int, vocabulary: int) -> list[Any]:
    """The mask token would win every row."""
    logits, mask_token = 4 * torch.randn(rows, vocabulary), vocabulary // 3
    logits[:, mask_token] = 30
    return [logits.to(dtype), mask_token]


def results(
    function: Callable[..., Any], inputs: Sequence[Any], device: torch.device, double: bool = False
) -> list[Tensor]:
    """What ``function`` returns of a copy of ``inputs``, and the copies of tensors that it may write."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copied = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
        return copied.double() if double and value.is_floating_point() else copied

    copies = [copy(value) for value in inputs]
    out = function(*copies)
    outputs = list(out) if isinstance(out, tuple) else [out]
    return [t.cpu() for t in outputs + [c for c in copies if isinstance(c, Tensor)]]


def errors(kernel: Kernel, inputs: Sequence[Any]) -> dict[str, float]:
    """Of each path, |result - naive| / |naive| in the Frobenius norm; the worst of all results, NaN if any is."""
    truth = results(kernel.naive, inputs, torch.device("cpu"), double=True)
    paths = {"torch": results(kernel.torch, inputs, torch.device("cpu"))}
    if DEVICE.type == "cuda" or INTERPRETED:
        paths["triton"] = results(kernel.triton, inputs, DEVICE)
    return {
        path: float(torch.tensor([*map(distance, found, truth)], dtype=torch.float64).max())
        for path, found in paths.items()
    }


def distance(found: Tensor, truth: Tensor) -> float:
    """NaN if anything is NaN."""
    return float((found.double() - truth).norm() / truth.double().norm().clamp(min=1e-30))


def cases(dtype: torch.dtype) -> dict[str, tuple[Kernel, list[Any]]]:
    """The real model's widths; fewer experts, for want of memory."""
    return {
        "attention, blocks": (ATTENTION, attention_inputs(dtype, 16, 32, 2, 128, [1000, 37], causal=False)),
        "attention, tokens": (ATTENTION, attention_inputs(dtype, 1, 32, 2, 128, [0, 700], causal=True)),
        "attention, prompt": (ATTENTION, attention_inputs(dtype, 100, 32, 2, 128, [100], causal=True)),
        "scan, block": (SCAN, scan_inputs(dtype, 1, 16, 64, 64, 8, 128, 4, write=False)),
        "scan, tokens": (SCAN, scan_inputs(dtype, 2, 1, 64, 64, 8, 128, 4, write=True)),
        "scan, prompt": (SCAN, scan_inputs(dtype, 1, 300, 64, 64, 8, 128, 4, write=True)),
        "experts, 16 tokens of 8 experts": (EXPERTS, experts_inputs(dtype, 16, 2688, 1856, 8, 6)),
        "norm, plain": (NORM, norm_inputs(dtype, 2, 16, 2688, modulated=False, modulate_first=False)),
        "norm, modulated before": (NORM, norm_inputs(dtype, 2, 16, 2688, modulated=True, modulate_first=True)),
        "norm, modulated after": (NORM, norm_inputs(dtype, 2, 16, 2688, modulated=True, modulate_first=False)),
        "confidence, 16 rows of 131,072": (CONFIDENCE, confidence_inputs(dtype, 16, 131_072)),
    }


def main() -> None:
    torch.manual_seed(0)
    print("| kernel | dtype | torch | triton |")
    print("| --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for name, (kernel, inputs) in cases(dtype).items():
            of_path = errors(kernel, inputs)
            figures = " | ".join(f"{of_path[path]:.1e}" if path in of_path else "" for path in ("torch", "triton"))
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
