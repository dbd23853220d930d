"""A NemotronH of random weights, small enough for a test."""

import torch

from calibrate.checkpoint import random
from calibrate.model import Config, TwoTower

CONFIG = {
    "hybrid_override_pattern": "MEM*E*M-E", "num_hidden_layers": 9, "hidden_size": 64, "vocab_size": 211, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16,
    "n_groups": 2, "conv_kernel": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40, "routed_scaling_factor": 2.5, "intermediate_size": 48,
    "layer_norm_epsilon": 1e-5, "eos_token_id": 210,
}  # fmt: skip
CPU = torch.device("cpu")


def small_model(change: dict | None = None, dtype: torch.dtype = torch.float32) -> TwoTower:
    """Random weights, time conditioning included."""
    model = random(Config.of(CONFIG | (change or {}), "test"), CPU, CPU, dtype, seed=0, skew=0.0)
    torch.manual_seed(3)
    for table in model.scale_shift_tables:
        table.add_(0.3 * torch.randn_like(table))
    return model


def copy_context_to_denoiser(model: TwoTower) -> TwoTower:
    """Both towers alike, and no time conditioning."""
    model.denoiser_tower.load_state_dict(model.context_tower.state_dict())
    model.lm_head.weight.copy_(model.context_lm_head.weight)
    model.t_block[1].weight.zero_()
    for table in model.scale_shift_tables:
        table.zero_()[2] = 1
    return model


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 200, (length,), generator=torch.Generator().manual_seed(100 * seed + length))
