"""Dimensions of a NemotronH tower, and the parameters, bytes and FLOPs that follow from them.

A tower is a stack of layers named by a pattern: ``M`` Mamba-2, ``E`` mixture of experts, ``*`` attention,
``-`` dense MLP. Every layer is a pre-norm, one mixer and a residual. The shapes are those of NVIDIA's
NemotronH checkpoints (``NemotronHForCausalLM`` in Hugging Face transformers), and the time conditioning of
the denoiser is that of Nemotron-TwoTower (arXiv 2606.26493): adaLN-single with one table a layer.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower_sim.errors import InputError
from twotower_sim.preset import named_file

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TIME_EMBEDDING = 256  # width of the sinusoidal embedding of t


@dataclass(frozen=True)
class Tower:
    """One tower's dimensions; sizes are elements unless a name says bytes."""

    name: str
    towers: int | None  # 1 or 2 where the source says so
    hidden: int
    pattern: str
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    mamba_heads: int
    mamba_head_dim: int
    state: int
    groups: int
    conv_width: int
    chunk: int
    experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    latent: int | None  # width at which routed experts work, where it is not `hidden`
    mlp_width: int
    dtype: str
    state_dtype: str  # of the SSM state kept between passes
    max_positions: int
    tied: bool = False  # embedding and head are one matrix
    notes: tuple[str, ...] = ()  # what of the source is taken otherwise than it says

    # ------------------------------------------------------------------ widths

    @property
    def inner(self) -> int:
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        return self.inner + 2 * self.groups * self.state

    @property
    def expert_io(self) -> int:
        """Width of a routed expert's input and output."""
        return self.latent or self.hidden

    def layers(self, kind: str) -> int:
        return self.pattern.count(kind)

    # ------------------------------------------------------------------ parameters

    @property
    def mamba_params(self) -> int:
        in_proj = self.hidden * (self.inner + self.conv_channels + self.mamba_heads)
        conv = self.conv_channels * (self.conv_width + 1)
        return in_proj + conv + 3 * self.mamba_heads + self.inner + self.inner * self.hidden + self.hidden

    @property
    def attention_params(self) -> int:
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        return qkv + self.heads * self.head_dim * self.hidden + self.hidden

    @property
    def expert_params(self) -> int:
        """One routed expert: a non-gated relu^2 MLP."""
        return 2 * self.expert_io * self.expert_width

    @property
    def moe_dense_params(self) -> int:
        """What every token reads of an MoE layer: norm, router, shared expert, latent projections."""
        latent = 2 * self.hidden * self.latent if self.latent else 0
        return self.hidden + self.experts * (self.hidden + 1) + 2 * self.hidden * self.shared_width + latent

    @property
    def mlp_params(self) -> int:
        return 2 * self.hidden * self.mlp_width + self.hidden

    @property
    def head_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        """All parameters of one tower, embedding and head included."""
        moe = self.moe_dense_params + self.experts * self.expert_params
        stack = self.layers("M") * self.mamba_params + self.layers("*") * self.attention_params
        stack += self.layers("E") * moe + self.layers("-") * self.mlp_params
        return stack + (1 if self.tied else 2) * self.head_params + self.hidden

    @property
    def active_params(self) -> int:
        """Parameters that one token uses."""
        return self.params - self.layers("E") * (self.experts - self.experts_per_token) * self.expert_params

    @property
    def time_params(self) -> int:
        """What time conditioning adds to a denoiser."""
        embedder = TIME_EMBEDDING * self.hidden + self.hidden * self.hidden + 2 * self.hidden
        return embedder + 3 * self.hidden * (self.hidden + 1) + len(self.pattern) * 3 * self.hidden

    # ------------------------------------------------------------------ bytes

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def weight_bytes(self, denoiser: bool = False) -> int:
        return (self.params + denoiser * self.time_params) * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers("*") * 2 * self.kv_heads * self.head_dim * self.dtype_bytes

    @property
    def state_bytes(self) -> int:
        """The Mamba state of one sequence: SSM states and the convolutions' tails."""
        ssm = self.inner * self.state * DTYPE_BYTES[self.state_dtype]
        conv = self.conv_channels * (self.conv_width - 1) * self.dtype_bytes
        return self.layers("M") * (ssm + conv)

    def kv_shards(self, tensor_parallel: int) -> int:
        """Into how many parts the KV cache is divided; beyond the KV heads, GPUs hold copies."""
        return min(tensor_parallel, self.kv_heads)

    def check_parallel(self, tensor_parallel: int, expert_parallel: bool = False) -> None:
        """Raise InputError unless every dimension that is divided among GPUs can be."""
        moe = ("n_routed_experts", self.experts) if expert_parallel else ("moe_intermediate_size", self.expert_width)
        divided = {
            "num_attention_heads": self.heads,
            "mamba_num_heads": self.mamba_heads,
            "n_groups": self.groups,
            moe[0]: moe[1],
            "moe_shared_expert_intermediate_size": self.shared_width,
            "vocab_size": self.vocab,
        }
        for key, size in divided.items():
            if size % tensor_parallel:
                found = f"deployment.tensor_parallel: found {tensor_parallel}"
                raise InputError(f"{found}; {key} of {self.name} is {size}, no multiple of it")


_FIELDS = {
    "hidden": "hidden_size",
    "vocab": "vocab_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mamba_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "state": "ssm_state_size",
    "groups": "n_groups",
    "conv_width": "conv_kernel",
    "chunk": "chunk_size",
    "experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_width": "moe_intermediate_size",
    "shared_width": "moe_shared_expert_intermediate_size",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
_ONLY_MOE = {"experts", "experts_per_token", "expert_width", "shared_width"}
_LAYERS = {"linear_attention": "M", "mamba": "M", "moe": "E", "full_attention": "*", "attention": "*", "mlp": "-"}
"""The pattern's letters by the names that transformers 5 writes as ``layers_block_type``."""
MOST = 1 << 24  # of any dimension; beyond, a file has its units mixed up


def tower_from_config(config: dict[str, Any], name: str, where: str, state_dtype: str | None = None) -> Tower:
    """A tower from the fields of a NemotronH ``config.json``. Raises InputError naming the field."""
    pattern = _pattern(config, where)
    dims: dict[str, Any] = {}
    for field, key in _FIELDS.items():
        least = 0 if field in _ONLY_MOE and "E" not in pattern else 1
        dims[field] = _whole(config.get(key, None if least else 0), key, where, least)
    _check_divisions(dims, where)
    dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    state = state_dtype or config.get("mamba_ssm_cache_dtype") or dtype
    for key, value in (("torch_dtype", dtype), ("mamba_ssm_cache_dtype", state)):
        if not isinstance(value, str) or value not in DTYPE_BYTES:
            raise InputError(f"{where}: {key} is {value!r:.99}; allowed: {', '.join(DTYPE_BYTES)}")
    notes = []
    if config.get("quantization_config"):
        notes.append(f"{where}: quantization_config is ignored; weights are taken as {dtype}")
    if "towers" not in config:
        notes.append(f"{where}: does not say how many towers it has; two towers are taken to have its dimensions each")
    latent, towers = config.get("moe_latent_size"), config.get("towers")
    if latent is not None:
        latent = _whole(latent, "moe_latent_size", where)
    if "towers" in config and _whole(towers, "towers", where) > 2:
        raise InputError(f"{where}: towers is {towers}; allowed: 1, 2")
    tied = bool(config.get("tie_word_embeddings"))
    layout: dict[str, Any] = {"pattern": pattern, "dtype": dtype, "state_dtype": state, "latent": latent, "tied": tied}
    own_name = config.get("name", name)
    if not isinstance(own_name, str):
        raise InputError(f"{where}: name is {own_name!r}; expected text")
    return Tower(own_name, towers, **layout, notes=tuple(notes), **dims)


def _pattern(config: dict[str, Any], where: str) -> str:
    pattern, layers = config.get("hybrid_override_pattern"), config.get("layers_block_type")
    if pattern is None and layers is not None:
        if not isinstance(layers, list) or not layers or not all(isinstance(layer, str) for layer in layers):
            raise InputError(f"{where}: layers_block_type is {layers!r:.99}; expected a list of {', '.join(_LAYERS)}")
        if unknown := set(layers) - set(_LAYERS):
            found = min(unknown)
            raise InputError(f"{where}: layers_block_type has {found!r:.99}; allowed: {', '.join(_LAYERS)}")
        return "".join(_LAYERS[layer] for layer in layers)
    if not isinstance(pattern, str) or not pattern or set(pattern) - set("ME*-"):
        raise InputError(f"{where}: hybrid_override_pattern is {pattern!r:.99}; expected a string of M, E, * and -")
    return pattern


def _whole(value: Any, key: str, where: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise InputError(
            f"{where}: {key} is {value!r:.99}; expected a positive integer up to {MOST}, as in a NemotronH config.json"
        )
    return value


def _check_divisions(dims: dict[str, int], where: str) -> None:
    """Raise InputError unless heads share their groups evenly and a token's experts are there."""
    for part, whole in (("kv_heads", "heads"), ("groups", "mamba_heads")):
        if dims[whole] % dims[part]:
            found = f"{_FIELDS[whole]} is {dims[whole]}"
            raise InputError(f"{where}: {found}; expected a multiple of {_FIELDS[part]}, {dims[part]}")
    if dims["experts_per_token"] > dims["experts"]:
        found = f"{_FIELDS['experts_per_token']} is {dims['experts_per_token']}"
        raise InputError(f"{where}: {found}; there are {dims['experts']} ({_FIELDS['experts']})")


def load_tower(model: str, base: Path, state_dtype: str | None = None) -> Tower:
    """A preset by name, or any NemotronH ``config.json`` by path relative to ``base``."""
    path = named_file("model", model, ".json", base)
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a NemotronH config.json: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a NemotronH config.json: the top level is no object")
    return tower_from_config(config, path.stem if path.parent.name == "models" else str(model), str(path), state_dtype)
