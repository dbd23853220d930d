"""The two-tower's own operations: on a GPU Triton kernels, elsewhere plain torch, and beside each a naive version."""

from calibrate.kernels.attention import block_attention
from calibrate.kernels.confidence import commit, confidence
from calibrate.kernels.experts import grouped_experts
from calibrate.kernels.norm import modulated_norm
from calibrate.kernels.scan import block_scan

__all__ = ["block_attention", "block_scan", "commit", "confidence", "grouped_experts", "modulated_norm"]
