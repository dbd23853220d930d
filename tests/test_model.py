"""Sizes that follow from dimensions, against the published ones."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from twotower_sim.errors import InputError
from twotower_sim.model import load_tower, tower_from_config
from twotower_sim.preset import names, preset_path

NANO = load_tower("nemotron-3-nano-30b-a3b", Path())


def test_published_sizes_of_nemotron_3_nano():
    """arXiv 2606.26493 and the model card: parameters, cache and state of one tower."""
    moe = NANO.layers("E") * (NANO.moe_dense_params + NANO.experts * NANO.expert_params)
    assert round(NANO.params / 1e9, 3) == 31.578
    assert round(moe / 1e9, 3) == 29.842
    assert round(NANO.active_params / 1e9, 3) == 3.580
    assert [NANO.layers(kind) for kind in "ME*"] == [23, 23, 6]
    assert NANO.kv_bytes_per_token == 6144
    assert NANO.conv_channels == 6144
    assert 45e6 < NANO.state_bytes < 55e6
    half = load_tower("nemotron-3-nano-30b-a3b", Path(), "bfloat16")
    assert 22e6 < half.state_bytes < 27e6


def test_two_towers_are_two_of_them():
    tower = load_tower("nemotron-twotower-30b-a3b", Path())
    assert tower.towers == 2
    assert tower.params == NANO.params
    both = tower.weight_bytes() + tower.weight_bytes(denoiser=True)
    assert 126e9 < both < 127e9


def test_nemotron_3_super_is_120b_with_12b_active():
    tower = load_tower("nemotron-3-super-120b-a12b", Path())
    assert 118e9 < tower.params < 124e9
    assert 12e9 < tower.active_params < 13e9


def test_every_preset_loads_and_says_where_it_is_from():
    assert len(names("models")) == 3
    for name in names("models"):
        assert load_tower(name, Path()).name == name
        assert json.loads(preset_path("models", name, ".json").read_text())["source"]


def test_any_config_by_path(tmp_path):
    source = preset_path("models", "nemotron-3-nano-30b-a3b", ".json")
    (tmp_path / "config.json").write_text(source.read_text())
    assert load_tower("config.json", tmp_path).params == NANO.params


def test_a_pattern_without_experts():
    config = json.loads(preset_path("models", "nemotron-3-nano-30b-a3b", ".json").read_text())
    for key in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
        del config[key]
    del config["moe_shared_expert_intermediate_size"]
    dense = tower_from_config(config | {"hybrid_override_pattern": "M-*-"}, "dense", "here")
    assert dense.params == dense.active_params


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "hidden_size is None; expected a positive integer"),
        ({"hidden_size": "2688"}, "hidden_size is '2688'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"hybrid_override_pattern": "MXE"}, "hybrid_override_pattern is 'MXE'"),
        ({"torch_dtype": "int4"}, "torch_dtype is 'int4'; allowed: float32, bfloat16, float16"),
        ({"mamba_ssm_cache_dtype": "fp8"}, "mamba_ssm_cache_dtype is 'fp8'"),
        ({"moe_latent_size": -1}, "moe_latent_size is -1"),
        ({"moe_latent_size": True}, "moe_latent_size is True"),
        ({"towers": 3}, "towers is 3; allowed: 1, 2"),
        ({"towers": "x"}, "towers is 'x'"),
        ({"towers": True}, "towers is True"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129; there are 128 (n_routed_experts)"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 32; expected a multiple of num_key_value_heads, 3"),
        ({"n_groups": 7}, "mamba_num_heads is 64; expected a multiple of n_groups, 7"),
        ({"chunk_size": 10**18}, "chunk_size is 1000000000000000000; expected a positive integer up to 16777216"),
        ({"torch_dtype": ["bfloat16"]}, "torch_dtype is ['bfloat16']; allowed:"),
        ({"mamba_ssm_cache_dtype": {}, "torch_dtype": {"a": 1}}, "torch_dtype is {'a': 1}"),
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern is None"),
        ({"hybrid_override_pattern": None, "layers_block_type": []}, "layers_block_type is []"),
        ({"hybrid_override_pattern": None, "layers_block_type": [3]}, "layers_block_type is [3]"),
        (
            {"hybrid_override_pattern": None, "layers_block_type": ["moe", "rnn"]},
            "layers_block_type has 'rnn'; allowed: linear_attention",
        ),
    ],
)
def test_bad_configs_are_named(tmp_path, change, said):
    config = json.loads(preset_path("models", "nemotron-3-nano-30b-a3b", ".json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match="config.json") as error:
        load_tower("config.json", tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"', "[" * 200_000])
def test_files_that_are_no_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="not a NemotronH config.json"):
        load_tower("config.json", tmp_path)


def test_unknown_model_lists_the_presets():
    for name in ("nemotron-5", "n" * 5000, "nemotron\0"):
        with pytest.raises(InputError, match="nemotron-twotower-30b-a3b"):
            load_tower(name, ROOT)


def test_layers_by_name_as_transformers_5_writes_them():
    config = json.loads(preset_path("models", "nemotron-3-nano-30b-a3b", ".json").read_text())
    pattern, letters = (
        config.pop("hybrid_override_pattern"),
        {"M": "linear_attention", "E": "moe", "*": "full_attention"},
    )
    config |= {"layers_block_type": [letters[layer] for layer in pattern], "dtype": None, "torch_dtype": None}
    tower = tower_from_config(config, "nano", "here")
    assert (tower.pattern, tower.dtype) == (pattern, "bfloat16")
    config["layers_block_type"] = ["mamba", "moe", "attention", "mlp"]
    assert tower_from_config(config, "nano", "here").pattern == "ME*-"


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path):
    source = preset_path("models", "nemotron-3-nano-30b-a3b", ".json")
    (tmp_path / "config.json").write_text("\ufeff" + source.read_text(), encoding="utf-8")
    assert load_tower("config.json", tmp_path).params == NANO.params
