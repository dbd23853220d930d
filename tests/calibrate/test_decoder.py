"""The decoder against transformers' NemotronH, against itself in other groupings, and against the decoding rule."""

import pytest
import torch
from invariants import obeys_the_rule
from small_model import CONFIG, copy_context_to_denoiser, prompt, small_model

from calibrate.generate import Sampling, autoregressive, mock_ar, two_tower
from calibrate.kernels.attention import triton_block_attention
from calibrate.kernels.confidence import triton_commit, triton_confidence
from calibrate.kernels.experts import triton_grouped_experts
from calibrate.kernels.norm import triton_modulated_norm
from calibrate.kernels.scan import triton_block_scan
from calibrate.model import Config, Mamba, Segment, TwoTower
from twotower_sim.errors import InputError

TIGHT = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return small_model()


@pytest.fixture(scope="module")
def twins():
    """Transformers' model, and ours with the same weights in the context tower."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.NemotronHForCausalLM(
        transformers.NemotronHConfig(**CONFIG | {"time_step_min": 1e-9, "rescale_prenorm_residual": False})
    ).eval()
    with torch.no_grad():
        for name, parameter in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if "norm" in name or name.endswith((".D", "dt_bias", "correction_bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    ours = TwoTower(Config.of(CONFIG, "test")).eval().requires_grad_(False)
    state = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    ours.context_lm_head.weight.copy_(state.pop("lm_head.weight"))
    ours.context_tower.load_state_dict(state)
    return theirs, ours


@torch.inference_mode()
def test_the_context_tower_is_nemotron_h(twins):
    """Prefill, single steps and a block seeded from the cache give transformers' logits of one full forward."""
    theirs, ours = twins
    ids = torch.randint(4, 200, (2, 61))
    full = theirs(ids).logits
    caches, rows = ours.cache(2, 64), torch.arange(2)
    torch.testing.assert_close(ours.prefill(list(ids[:, :37]), [0, 1], caches), full[:, 36], **TIGHT)
    for at in range(37, 42):
        torch.testing.assert_close(ours.decode(ids[:, at], rows, caches), full[:, at], **TIGHT)
    (block,) = ours.context_pass([Segment(rows, ids[:, 42:58])], caches)
    torch.testing.assert_close(ours.context_lm_head(block), full[:, 42:58], **TIGHT)
    ours.extend(ids[:, 58:60], rows, caches)
    torch.testing.assert_close(ours.decode(ids[:, 60], rows, caches), full[:, 60], **TIGHT)


@torch.inference_mode()
def test_one_pass_over_extends_and_prompts_equals_passes_apart(model):
    """Ragged rows of the cache, contexts and lengths; rows that take no part stay as they are."""
    lengths = [5, 33, 18, 7]
    together, apart = model.cache(5, 80), model.cache(5, 80)
    for caches in (together, apart):
        model.prefill([prompt(n) for n in lengths[:2]], [3, 1], caches)
    extends = Segment(torch.tensor([1, 3]), torch.stack([prompt(16, 1), prompt(16, 2)]))
    prompts = [Segment(torch.tensor([row]), prompt(n)[None]) for row, n in ((0, lengths[2]), (4, lengths[3]))]
    mixed = model.context_pass([extends, *prompts], together)
    for segment, hidden in zip([extends, *prompts], mixed, strict=True):
        torch.testing.assert_close(model.context_pass([segment], apart)[0], hidden, **TIGHT)
    assert together.context.lengths.tolist() == [18, 49, 0, 21, 7]
    for layer, ssm in together.context.ssm.items():
        torch.testing.assert_close(ssm, apart.context.ssm[layer], **TIGHT)
        assert not ssm[2].any()
        torch.testing.assert_close(together.context.conv[layer], apart.context.conv[layer], **TIGHT)


@torch.inference_mode()
def test_denoise_reads_both_ways_and_writes_nothing(model):
    caches, rows = model.cache(2, 64), torch.tensor([1, 0])
    model.prefill([prompt(20), prompt(31)], [0, 1], caches)
    before = [t.clone() for t in [*caches.context.ssm.values(), *caches.context.conv.values(), caches.context.lengths]]
    ids, masked = torch.full((2, 16), 3), torch.tensor([1.0, 0.5])
    logits = model.denoise(ids, rows, masked, caches)
    after = [*caches.context.ssm.values(), *caches.context.conv.values(), caches.context.lengths]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    changed = ids.clone()
    changed[:, 15] = 77
    assert (model.denoise(changed, rows, masked, caches)[:, 0] - logits[:, 0]).abs().min() > 0
    assert not torch.allclose(model.denoise(ids, rows, masked * 0.5, caches), logits, atol=1e-3)  # t matters
    alone = model.denoise(ids[1:], rows[1:], masked[1:], caches)
    torch.testing.assert_close(alone[0], logits[1], **TIGHT)


@torch.inference_mode()
def test_a_denoiser_without_attention_and_modulation_is_a_causal_tower():
    model = copy_context_to_denoiser(small_model({"hybrid_override_pattern": "MEM-E"}))
    caches, ids = model.cache(1, 64), prompt(16, 5)[None]
    model.prefill([prompt(20)], [0], caches)
    rows = torch.tensor([0])
    logits = model.denoise(ids, rows, torch.tensor([1.0]), caches)
    (hidden,) = model.context_pass([Segment(rows, ids)], caches)
    torch.testing.assert_close(logits, model.context_lm_head(hidden), **TIGHT)


@torch.inference_mode()
def test_modulation_order_of_each_kind_of_layer(model):
    """M and * layers modulate and then norm, E layers norm and then modulate; the gate scales what the mixer adds."""
    torch.manual_seed(1)
    h, rows, caches = model.config.hidden_size, torch.tensor([0, 1]), model.cache(2, 64)
    x, (shift, scale, gate) = torch.randn(32, h), torch.randn(3, 2, h)
    from calibrate.model import Pass

    run = Pass([Segment(rows, torch.zeros(2, 16, dtype=torch.int64))], caches.context, causal=False, write=False)
    for layer in model.denoiser_tower.layers:
        norm = torch.nn.RMSNorm(h, layer.norm.eps)
        norm.weight.data.copy_(layer.norm.weight)
        wide = [m.repeat_interleave(16, 0) for m in (shift, scale, gate)]
        normed = norm(x) * (1 + wide[1]) + wide[0] if layer.kind in "E-" else norm(x * (1 + wide[1]) + wide[0])
        expected = x + wide[2] * layer.mixer(normed, layer.index, run)
        torch.testing.assert_close(layer(x, run, (shift, scale, gate)), expected, **TIGHT)


def test_generation_on_the_kernels_gives_the_same_blocks(monkeypatch):
    """The decoder's own tensors, strides and slots through the Triton kernels (under the interpreter without a GPU)."""
    pytest.importorskip("triton")
    model, prompts = small_model({"hybrid_override_pattern": "M*E"}), [prompt(9), prompt(12)]
    expected = two_tower(model, prompts, 32, 0.02, 2), autoregressive(model, prompts, 3)
    monkeypatch.setattr("calibrate.model.block_attention", triton_block_attention)
    monkeypatch.setattr("calibrate.model.grouped_experts", triton_grouped_experts)
    monkeypatch.setattr("calibrate.generate.confidence", triton_confidence)
    monkeypatch.setattr("calibrate.generate.commit", triton_commit)

    def modulated_norm(x, weight, eps, shift=None, scale=None, modulate_first=False):
        return triton_modulated_norm(x, weight, eps, shift, scale, modulate_first)

    monkeypatch.setattr("calibrate.model.modulated_norm", modulated_norm)
    for module in model.modules():
        if isinstance(module, Mamba):
            module.scan = triton_block_scan
    assert (two_tower(model, prompts, 32, 0.02, 2), autoregressive(model, prompts, 3)) == expected


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("steps_per_block", [16, 4])
@pytest.mark.parametrize("gamma", [0.004, 0.5])
def test_blocks_obey_the_rule_and_batches_change_nothing(model, gamma, steps_per_block):
    prompts = [prompt(n, n) for n in (9, 21, 40)]
    together = two_tower(model, prompts, 40, gamma, steps_per_block)
    for one, sequence in zip(prompts, together, strict=True):
        (alone,) = two_tower(model, [one], 40, gamma, steps_per_block)
        assert alone == sequence
        assert len(sequence.tokens) == 40
        assert len(sequence.blocks) == 3
        assert sequence.forwards == sum(len(block) for block in sequence.blocks)
        assert model.config.mask_token_id not in sequence.tokens
        for sizes in sequence.blocks:
            obeys_the_rule(sizes, 16, steps_per_block)


def test_a_low_threshold_commits_more_a_step(model):
    forwards = [two_tower(model, [prompt(20)], 32, gamma, 16)[0].forwards for gamma in (1e-6, 0.99)]
    assert forwards == [2, 32]


def test_mock_ar_of_the_context_towers_own_weights_is_autoregressive():
    model = copy_context_to_denoiser(small_model())
    prompts = [prompt(1), prompt(26)]
    mocked, generated = mock_ar(model, prompts, 20), autoregressive(model, prompts, 20)
    assert [s.tokens for s in mocked] == [s.tokens for s in generated]
    assert [s.forwards for s in mocked] == [20, 20]
    assert [s.forwards for s in generated] == [19, 19]


def test_autoregressive_batches_change_nothing(model):
    prompts = [prompt(n, n) for n in (1, 17, 40)]
    together = autoregressive(model, prompts, 12)
    assert [autoregressive(model, [one], 12)[0] for one in prompts] == together


@pytest.mark.parametrize("decode", [autoregressive, mock_ar, lambda *a: two_tower(*a, 0.5, 16)])
def test_tokens_end_with_eos(decode):
    model = small_model()
    free = decode(model, [prompt(20), prompt(30)], 40)
    token = free[0].tokens[4]
    stopping = small_model({"eos_token_id": token})
    for before, after in zip(free, decode(stopping, [prompt(20), prompt(30)], 40), strict=True):
        cut = before.tokens.index(token) + 1 if token in before.tokens else 40
        assert after.tokens == before.tokens[:cut]


def test_temperature_draws_and_a_seed_repeats(model):
    def drawn(temperature, seed):
        sampling = Sampling(temperature, torch.Generator().manual_seed(seed))
        return two_tower(model, [prompt(20)], 32, 0.5, 16, sampling)[0].tokens

    assert drawn(1.0, 1) == drawn(1.0, 1) != drawn(1.0, 2)
    assert drawn(1e-6, 1) == two_tower(model, [prompt(20)], 32, 0.5, 16)[0].tokens


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a number >= 0"),
        ({"hybrid_override_pattern": "MX"}, "hybrid_override_pattern is 'MX'"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, no multiple of num_key_value_heads 3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; expected 1 to n_routed_experts 8"),
    ],
)
def test_a_wrong_config_is_explained(change, said):
    with pytest.raises(InputError, match=said):
        Config.of(CONFIG | change, "config.json")
