"""Who drafts in speculative decoding, and what of it lies on each GPU beside the tower that verifies."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from twotower_sim.model import Tower


class DrafterBytes(NamedTuple):
    """On one GPU of the tower's ``tensor_parallel``."""

    weights: int = 0
    kv_per_token: int = 0
    state: int = 0  # of one sequence


@dataclass(frozen=True)
class NgramDrafter:
    """Look-up of the last tokens in the text so far (prompt look-up decoding); it has no weights."""

    seconds_per_round: float = 0.0

    def bytes_on_gpu(self, tower: Tower, tensor_parallel: int) -> DrafterBytes:
        return DrafterBytes()


@dataclass(frozen=True)
class MtpDrafter:
    """One multi-token-prediction module of the tower, applied once a draft (DeepSeek-V3, arXiv 2412.19437, section 2.2;
    the layers ``*E`` as in Nemotron 3): norms of the last hidden state and of the token's embedding, a projection from
    both to one, an attention layer and an MoE (or MLP) layer. Embedding and head are the tower's.
    """

    def layers(self, tower: Tower) -> Tower:
        mlp = next((layer for layer in "E-" if tower.layers(layer)), "")
        return replace(tower, pattern="*" + mlp)

    def bytes_on_gpu(self, tower: Tower, tensor_parallel: int) -> DrafterBytes:
        own = self.layers(tower)
        shared = (1 if own.tied else 2) * own.head_params
        weights = (own.params - shared + projection_params(own)) * own.dtype_bytes
        return DrafterBytes(weights // tensor_parallel, own.kv_bytes_per_token // own.kv_shards(tensor_parallel))


@dataclass(frozen=True)
class ModelDrafter:
    """A small model of the same kind on the same GPUs."""

    tower: Tower

    def bytes_on_gpu(self, tower: Tower, tensor_parallel: int) -> DrafterBytes:
        own = self.tower
        kv = own.kv_bytes_per_token // own.kv_shards(tensor_parallel)
        return DrafterBytes(own.weight_bytes() // tensor_parallel, kv, own.state_bytes // tensor_parallel)


Drafter = NgramDrafter | MtpDrafter | ModelDrafter


def projection_params(tower: Tower) -> int:
    """Of a multi-token-prediction module, in front of its layers: two norms and the projection from 2 H to H."""
    return 2 * tower.hidden * tower.hidden + 2 * tower.hidden
