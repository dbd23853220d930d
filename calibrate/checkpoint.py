"""Checkpoints in the layout of nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16: config.json and safetensors, in shards
with an index or in one file. Tensors are named as the modules of ``model.py``, but for experts, which the checkpoint
keeps apart and the grouped kernel wants stacked.

A model is built on the meta device and filled tensor by tensor, each tower on its own device, so that host memory never
holds more than the tensor on its way.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calibrate.model import Config, TwoTower
from twotower_sim.errors import InputError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EXACT = ("A_log", "dt_bias", "D")
"""Parameters that stay in fp32 whatever the model's dtype; routers are fp64."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")
_SHOWN = 3  # names in an error


def find(model: str) -> Path:
    """The folder of a checkpoint: a local one, or a repository of the Hugging Face hub by its name (downloaded to the
    hub's cache). Raises InputError."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise InputError(f"{model}: neither a folder nor the name of a repository on the Hugging Face hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))
    except (
        Exception
    ) as error:  # the hub's client raises a dozen kinds: no network, no such name, no permission, full disk
        raise InputError(f"{model}: no such folder, and the hub says: {str(error).splitlines()[0]}") from None


def load(folder: Path, context: torch.device, denoiser: torch.device, dtype: torch.dtype) -> TwoTower:
    """The model with its weights, the towers on their devices. Raises InputError for a file that cannot be read and for
    tensors that are missing, unknown or misshapen, before anything is allocated."""
    model = _on_meta(Config.read(folder / "config.json"), dtype)
    files = _files(folder)
    _check(model, files, folder)
    _allocate(model, context, denoiser)
    targets = _targets(model)
    for file, names in files.items():
        with _opened(file) as tensors:
            for name in names:
                targets[name].copy_(tensors.get_tensor(name))
    return model.eval().requires_grad_(False)


def random(
    config: Config, context: torch.device, denoiser: torch.device, dtype: torch.dtype, seed: int, skew: float
) -> TwoTower:
    """A model of random weights, for latency alone. Experts are chosen alike at ``skew`` 0; above, expert e has a bias
    of ``-skew log(1 + e)`` on its scores when experts are chosen."""
    model = _on_meta(config, dtype)
    _allocate(model, context, denoiser)
    for name, tensor in model.state_dict().items():
        generator = torch.Generator(tensor.device).manual_seed(seed + hash_of(name))
        last = name.rsplit(".", 2)[-2:]
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(-skew * torch.arange(1, len(tensor) + 1, device=tensor.device).log())
        elif last[-1] == "A_log":
            tensor.copy_(torch.arange(1, len(tensor) + 1).log())
        elif last[-1] == "dt_bias":  # inverse softplus of time steps of 0.001 to 0.1
            tensor.copy_(torch.logspace(-3, -1, len(tensor)).expm1().log())
        elif last[-1] == "D" or "norm" in last[0]:
            tensor.fill_(1)
        elif name.startswith("scale_shift_tables"):
            tensor.zero_()[2] = 1
        elif tensor.ndim == 1:
            tensor.zero_()
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
    return model.eval().requires_grad_(False)


def hash_of(name: str) -> int:
    """A number of a name that is the same in every process."""
    return int.from_bytes(name.encode()[-8:], "little") % (1 << 31)


def save(model: TwoTower, config: dict, folder: Path, shard_bytes: int = 5 << 30, metadata: dict | None = None) -> None:
    """Write the model in the checkpoint's layout, in shards of at most ``shard_bytes`` (or one tensor)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in _targets(model).items():
        if "gate.weight" in name or "correction_bias" in name:
            tensor = tensor.float()
        size += tensor.numel() * tensor.element_size()
        if shards[-1] and size > shard_bytes:
            shards.append({})
            size = tensor.numel() * tensor.element_size()
        shards[-1][name] = tensor.detach().cpu().contiguous()
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata)
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, folder / file, metadata)
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def weight_bytes(model: TwoTower) -> dict[str, int]:
    """Bytes of the weights on each device."""
    out: dict[str, int] = {}
    for tensor in model.state_dict().values():
        out[str(tensor.device)] = out.get(str(tensor.device), 0) + tensor.numel() * tensor.element_size()
    return out


# ---------------------------------------------------------------------- construction


def _on_meta(config: Config, dtype: torch.dtype) -> TwoTower:
    with torch.device("meta"):
        model = TwoTower(config)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if parameter.dtype != torch.float64 and not name.endswith(EXACT):
            parameter.data = parameter.data.to(dtype)
    return model


def _allocate(model: TwoTower, context: torch.device, denoiser: torch.device) -> None:
    """Give every tensor its memory. Raises InputError where a device has not enough."""
    sides = {"context": context, "denoiser": denoiser}
    needed: dict[torch.device, int] = {}
    for name, module in model.named_children():
        size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        device = sides["context" if name.startswith("context") else "denoiser"]
        needed[device] = needed.get(device, 0) + size
    for device, size in needed.items():
        if device.type == "cuda" and size > (free := torch.cuda.mem_get_info(device)[0]):
            raise InputError(
                f"{device}: the weights take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                "put the towers on two devices (--devices cuda:0,cuda:1) or take a larger GPU"
            )
    for name, module in model.named_children():
        module.to_empty(device=sides["context" if name.startswith("context") else "denoiser"])


def _targets(model: TwoTower) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint goes, by its name there."""
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith((".experts.up_proj", ".experts.down_proj")):
            parent, kind = name.rsplit(".", 1)
            out |= {f"{parent}.{e}.{kind}.weight": expert for e, expert in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


# ---------------------------------------------------------------------- files


def _files(folder: Path) -> dict[Path, list[str]]:
    """Names of the tensors in each file."""
    if not (folder / INDEX).exists():
        with _opened(folder / SINGLE) as tensors:
            return {folder / SINGLE: list(tensors.keys())}
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        out: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            out.setdefault(folder / file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / INDEX}: not an index of safetensors: {error!r}") from None
    return out


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; a checkpoint has {SINGLE} or {INDEX} and its shards") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read ({error}); is the download complete?") from None


def _check(model: TwoTower, files: dict[Path, list[str]], folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in _targets(model).items()}
    found = {name for listed in files.values() for name in listed}
    for what, odd in (("misses", expected.keys() - found), ("has unknown", found - expected.keys())):
        if odd:
            some = ", ".join(sorted(odd)[:_SHOWN]) + (", …" if len(odd) > _SHOWN else "")
            raise InputError(f"{folder}: the checkpoint {what} {len(odd)} of {len(expected)} tensors: {some}")
    for file, names in files.items():
        with _opened(file) as tensors:
            held = set(tensors.keys())
            for name in names:
                if name not in held:
                    raise InputError(f"{file}: {name} is missing, which the index says is here")
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape != expected[name]:
                    raise InputError(f"{file}: {name} has shape {shape}; config.json makes it {expected[name]}")


def parameters(model: TwoTower) -> int:
    return sum(math.prod(tensor.shape) for tensor in model.parameters())
