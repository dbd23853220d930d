"""Checkpoints in the real layout: there and back, and every way in which a folder can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import CONFIG, CPU, prompt, small_model

from calibrate.checkpoint import INDEX, SINGLE, find, load, parameters, save, weight_bytes
from calibrate.generate import two_tower
from calibrate.model import Config, TwoTower
from twotower_sim.errors import InputError

MAMBA = ["in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight"]
MOE = [
    "gate.weight",
    "gate.e_score_correction_bias",
    "shared_experts.up_proj.weight",
    "shared_experts.down_proj.weight",
]
MIXERS = [MAMBA, MOE, [f"{letter}_proj.weight" for letter in "qkvo"]]
TOWER = ["embeddings.weight", "norm_f.weight", *(f"layers.{i}.norm.weight" for i in range(3))]
TOWER += [f"layers.{i}.mixer.{name}" for i, names in enumerate(MIXERS) for name in names]
"""The names of the published checkpoint, for the pattern ME*."""


def tiny(**change) -> TwoTower:
    return small_model({"hybrid_override_pattern": "ME*", **change})


def config(**change) -> dict:
    return CONFIG | {"hybrid_override_pattern": "ME*", **change}


def test_names_are_those_of_the_published_checkpoint(tmp_path):
    save(tiny(), config(), tmp_path)
    experts = [f"layers.1.mixer.experts.{e}.{kind}_proj.weight" for e in range(8) for kind in ("up", "down")]
    names = {f"{tower}_tower.{name}" for tower in ("context", "denoiser") for name in [*TOWER, *experts]}
    names |= {"context_lm_head.weight", "lm_head.weight", "t_block.1.weight", "t_block.1.bias"}
    names |= {f"t_embedder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    names |= {f"scale_shift_tables.{i}" for i in range(3)}
    assert set(load_file(tmp_path / SINGLE)) == names


@pytest.mark.parametrize("shard_bytes", [1 << 30, 60_000])
def test_there_and_back(tmp_path, shard_bytes):
    model = tiny()
    save(model, config(), tmp_path, shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes == 60_000)
    again = load(tmp_path, CPU, CPU, torch.float32)
    assert two_tower(again, [prompt(20)], 32, 0.01, 16) == two_tower(model, [prompt(20)], 32, 0.01, 16)
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(after, before, msg=name)


def test_what_stays_exact_in_bf16(tmp_path):
    save(tiny(), config(), tmp_path)
    model = load(tmp_path, CPU, CPU, torch.bfloat16)
    dtypes = {name.rsplit(".", 1)[-1]: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes["A_log"] == dtypes["D"] == dtypes["dt_bias"] == torch.float32
    assert model.context_tower.layers[1].mixer.gate.weight.dtype == torch.float64
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert weight_bytes(model)["cpu"] < 2.5 * parameters(model)


def test_the_real_model_has_the_published_number_of_parameters(data):
    name = "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.json"
    with torch.device("meta"):
        model = TwoTower(Config.read(data / "model_configs" / name))
    tower = sum(p.numel() for p in model.context_tower.parameters()) + model.context_lm_head.weight.numel()
    assert tower == pytest.approx(31.578e9, rel=1e-4)


def broken(folder, how):
    """A checkpoint with one thing wrong."""
    save(tiny(), config(), folder, 60_000)
    index = json.loads((folder / INDEX).read_text())
    name = "denoiser_tower.layers.1.mixer.experts.3.up_proj.weight"
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    if how == "missing":
        del index["weight_map"][name]
    elif how == "unknown":
        index["weight_map"]["foo.weight"] = file.name
    elif how == "not there":
        save_file({k: v for k, v in tensors.items() if k != name}, file)
    elif how == "misshapen":
        save_file(tensors | {name: torch.zeros(24, 63)}, file)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "no shard":
        file.unlink()
    elif how == "no index":
        (folder / INDEX).unlink()
        return
    elif how == "no map":
        index = {}
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "other config":
        (folder / "config.json").write_text(json.dumps(config(hidden_size=48)))
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "misses 1 of .* tensors: denoiser_tower.layers.1.mixer.experts.3.up_proj.weight"),
        ("unknown", "has unknown 1 of .* tensors: foo.weight"),
        ("not there", "experts.3.up_proj.weight is missing, which the index says is here"),
        ("misshapen", r"experts.3.up_proj.weight has shape \(24, 63\); config.json makes it \(24, 64\)"),
        ("truncated", "cannot be read .*; is the download complete?"),
        ("no shard", "no such file; a checkpoint has"),
        ("no index", "no such file; a checkpoint has"),
        ("no map", "not an index of safetensors: KeyError"),
        ("no config", "config.json: not a NemotronH config.json"),
        ("other config", "has shape"),
    ],
)
def test_a_broken_checkpoint_is_explained_before_anything_is_allocated(tmp_path, monkeypatch, how, said):
    broken(tmp_path, how)
    monkeypatch.setattr("calibrate.checkpoint._allocate", lambda *a: pytest.fail("allocated"))
    with pytest.raises(InputError, match=said):
        load(tmp_path, CPU, CPU, torch.float32)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(monkeypatch):
    with pytest.raises(InputError, match="neither a folder nor the name of a repository"):
        find("no/such/folder")
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match="the hub says: no network$"):
        find("nvidia/no-such-model")
