"""The tiny two-tower: its text, the form in which it trains, its training, and the checkpoint that is shipped."""

import json
from random import Random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from calibrate.checkpoint import load
from calibrate.generate import two_tower
from calibrate.model import Config, Segment
from calibrate.tiny import FOLDER, corpus, stages, train
from calibrate.tiny import training_model as form
from calibrate.tiny.progression import Budget, Progression
from calibrate.tiny.weights import EXACT, initial, save
from twotower_sim.errors import InputError
from twotower_sim.model import tower_from_config

CONFIG = Config.read(FOLDER / "config.json")


@pytest.fixture(scope="module")
def sides():
    return corpus.split()


@pytest.fixture(scope="module")
def weights():
    """Random everywhere: a fresh model is the identity in too many places to show a fault."""
    generator = torch.Generator().manual_seed(1)
    drawn = initial(CONFIG, 0)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in drawn.items()}


def ids_of(blocks, seed=0, sequences=2):
    return torch.randint(4, 260, (sequences, blocks * CONFIG.block_size), generator=torch.Generator().manual_seed(seed))


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---------------------------------------------------------------------- text


def test_tokens_are_bytes_after_the_special_ones():
    assert corpus.encode("\0aé") == [4, 101, 199, 173]
    assert corpus.decode([1, *corpus.encode("déjà vu"), 2]) == "déjà vu"
    assert corpus.decode([4 + 0xC3]) == "\N{REPLACEMENT CHARACTER}"
    assert CONFIG.vocab_size == corpus.VOCABULARY
    assert [CONFIG.eos_token_id, CONFIG.mask_token_id] == [corpus.EOS, corpus.MASK]


def test_what_is_held_out_is_not_trained_on(sides):
    training, held_out = sides
    assert not set(training.sources) & {text for text in held_out.sources if text}
    assert not set(training.words) & set(held_out.words)
    assert 10 < len(training.words) / len(held_out.words) < 40
    assert 10 < len(training.sources) / len(held_out.sources) < 40


def test_tokens_follow_from_the_seed_and_half_of_them_are_templates(sides):
    held_out = sides[1]
    first = corpus.tokens(held_out, seed=3)
    assert (first == corpus.tokens(held_out, seed=3)).all()
    assert not (first == corpus.tokens(held_out, seed=4)[: len(first)]).all()
    source_tokens = sum(len(text.encode()) + 1 for text in held_out.sources)
    assert len(first) / source_tokens == pytest.approx(2, rel=0.02)
    assert (first[first < 4] == corpus.EOS).all()


def test_sources_are_indented_by_tabs_and_their_long_runs_are_cut(tmp_path):
    (tmp_path / "a.py").write_text("        x" + " " * 99 + "#" * 99 + "\n     y")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text("no part of the corpus")
    training, held_out = corpus.split(tmp_path)
    assert training.sources + held_out.sources == ["\t\tx    ####\n\t y"]


@pytest.mark.parametrize("kind", corpus.TEMPLATES, ids=lambda kind: kind.__name__)
def test_a_template_is_determined_by_what_its_prompt_shows(kind):
    row = kind(Random(1).choice(["alpha", "beta"]).lower, Random(2))
    assert row(7) == row(7) != row(8)
    assert len(row(498) + row(499)) <= corpus.PROMPT_BYTES  # two whole rows


def test_prompts_that_are_shipped():
    rows = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text().splitlines()]
    assert [row["class"] for row in rows] == ["template"] * 24 + ["code"] * 24
    for row in rows:
        assert len(corpus.encode(row["prompt"])) == 128
        assert len(corpus.encode(row["reference"])) == 256
    for row in rows[:24]:
        words = corpus._WORD.findall(row["prompt"].lower().replace("_", " "))
        assert any(map(corpus._is_held_out, words)), row["prompt"]


def test_prompts_follow_from_the_seed(sides):
    assert corpus.prompts(sides[1], 5) == corpus.prompts(sides[1], 5) != corpus.prompts(sides[1], 6)


# ---------------------------------------------------------------------- the form that trains


def test_mamba_equals_its_recurrence(weights):
    """All blocks at once give what the recurrence gives token by token, and its states where blocks begin."""
    m = form._under(weights, "context_tower.layers.0.mixer.")
    x = torch.randn(2, 3 * 16, CONFIG.hidden_size, generator=torch.Generator().manual_seed(2))
    y, start = form.mamba(m, CONFIG, x)
    state = torch.zeros(2, CONFIG.mamba_num_heads, CONFIG.mamba_head_dim, CONFIG.ssm_state_size)
    z, i, padded = form._scan_inputs(m, CONFIG, x, torch.zeros(2, CONFIG.conv_kernel - 1, CONFIG.conv_channels))
    outputs = []
    for t in range(x.shape[1]):
        if t % 16 == 0:
            torch.testing.assert_close(start.ssm.unflatten(0, (2, 3))[:, t // 16], state, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(start.conv.unflatten(0, (2, 3))[:, t // 16], padded[:, t : t + 3])
        decay = (i.dt[:, t] * -m["A_log"].exp()).exp()
        added = (i.dt[:, t, :, None] * i.x[:, t])[..., None] * i.b[:, t, :, None]
        state = decay[..., None, None] * state + added
        outputs.append((state @ i.c[:, t, :, :, None])[..., 0])
    expected = form._scan_output(m, CONFIG, torch.stack(outputs, 1), i.x, z)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_mamba_from_the_starts_of_blocks_equals_mamba_over_the_sequence(weights):
    m = form._under(weights, "context_tower.layers.0.mixer.")
    x = torch.randn(2, 3 * 16, CONFIG.hidden_size, generator=torch.Generator().manual_seed(3))
    y, start = form.mamba(m, CONFIG, x)
    by_block = form.mamba_blocks(m, CONFIG, x.view(6, 16, -1), start)
    torch.testing.assert_close(by_block.view_as(y), y, rtol=1e-4, atol=1e-4)


def test_the_context_tower_is_causal(weights):
    ids = ids_of(4)
    whole, part = form.context(weights, CONFIG, ids), form.context(weights, CONFIG, ids[:, :32])
    torch.testing.assert_close(whole.logits[:, :32], part.logits, rtol=1e-4, atol=1e-4)


def test_a_block_sees_its_context_and_itself_alone(weights):
    ids = ids_of(4)
    blocks, masked = ids.unflatten(1, (4, 16)), torch.tensor([[1.0, 0.5, 0.25, 0.75]]).repeat(2, 1)

    def logits(context_ids, noisy):
        left = form.context(weights, CONFIG, context_ids).layers
        return form.denoise(weights, CONFIG, noisy, masked, left).logits

    whole = logits(ids, blocks)
    later, others = ids.clone(), blocks.clone()
    later[:, 32:] = ids_of(2, seed=9)
    others[:, [0, 1, 3]] = CONFIG.mask_token_id
    torch.testing.assert_close(logits(later, others)[:, 2], whole[:, 2], rtol=1e-4, atol=1e-4)
    earlier, end = ids.clone(), blocks.clone()
    earlier[:, 31], end[:, 2, 15] = 4, CONFIG.mask_token_id
    assert (logits(earlier, blocks)[:, 2] - whole[:, 2]).abs().min(-1).values.max() > 1e-3
    assert ((logits(ids, end) - whole)[:, 2, :15].abs().amax((0, 2)) > 1e-3).all()  # bidirectional


def test_every_number_of_masks_is_as_likely():
    counts = stages.masks(torch.zeros(8, 32, 16), torch.Generator().manual_seed(0)).sum(-1).flatten()
    assert torch.bincount(counts).tolist() == [0] + [16] * 16


# ---------------------------------------------------------------------- training


class InterruptedTrainingError(Exception):
    pass


@pytest.fixture
def small_steps(monkeypatch, sides):
    """(progression, path, …) to a training of five steps a stage on little text, uncompiled."""
    monkeypatch.setattr(train, "SEQUENCES", 4)
    monkeypatch.setattr(train, "TOKENS", 64)
    monkeypatch.setattr(train, "EVALUATED_BATCHES", 2)
    monkeypatch.setattr(train, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(train, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    tokens = torch.from_numpy(corpus.tokens(sides[1], 0))
    data = train.Data(tokens, tokens)

    def run(progression, path, interrupt_at=None):
        heard = []

        def show(name, share, bits):
            heard.append((name, bits))
            if len(heard) == interrupt_at:
                raise InterruptedTrainingError

        train.train(progression, CONFIG, data, [Budget(steps=5)] * 2, path, show)
        return heard

    with torch.compiler.set_stance("force_eager"):
        yield run


def test_training_lowers_the_loss_of_both_towers_and_goes_on_where_it_was_interrupted(small_steps, tmp_path):
    whole = Progression.begin(CONFIG, 0)
    heard = small_steps(whole, tmp_path / "whole.pt")
    assert [name for name, _ in heard] == ["context tower"] * 5 + ["denoiser"] * 5
    bits = [bits for _, bits in heard]
    assert bits[0] == pytest.approx(8.02, abs=0.01)  # log2(260): it predicts nothing yet
    assert whole.held_out_bits[0] < 6.5
    assert whole.held_out_bits[1] < bits[5]
    for at in (4, 8):  # in either stage
        with pytest.raises(InterruptedTrainingError):
            small_steps(Progression.begin(CONFIG, 0), tmp_path / "part.pt", at)
        resumed = Progression.load(tmp_path / "part.pt")
        assert (resumed.stage, resumed.step) == divmod(at - 1, 5)
        assert len(small_steps(resumed, tmp_path / "part.pt")) == 10 - (at - 1)
        assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())


def test_a_training_with_another_seed_is_refused(tmp_path):
    Progression.begin(CONFIG, 0).save(tmp_path / "training.pt")
    with pytest.raises(InputError, match=r"training\.pt: an unfinished training with seed 0, not 1"):
        train.run(tmp_path, [], 1, "")


def test_a_training_without_length_is_refused():
    with pytest.raises(InputError, match="--minutes: found 0; expected more than 0"):
        Budget(seconds=0)
    with pytest.raises(InputError, match="--steps: found -1; expected more than 0"):
        Budget(steps=-1)


def test_weights_are_saved_by_the_names_of_the_checkpoint(tmp_path):
    save(initial(CONFIG, 0), tmp_path, {"seed": "0"})
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == form.shapes(CONFIG)
    assert metadata_of(tmp_path / "model.safetensors") == {"seed": "0"}


# ---------------------------------------------------------------------- what is shipped


def test_the_shipped_checkpoint_is_complete():
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size < 6e6
    tensors = load_file(path)
    assert set(metadata_of(path)) == {"command", "steps", "held_out_bits", "commit", "python", "torch"}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == form.shapes(CONFIG)
    for name, tensor in tensors.items():
        exact = name.endswith(EXACT)
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert tensor.isfinite().all(), name


def test_the_simulator_reads_its_config_and_counts_its_parameters():
    tower = tower_from_config(json.loads((FOLDER / "config.json").read_text()), "tiny", "config.json")
    assert (tower.towers, tower.notes) == (2, ())
    total = sum(torch.Size(shape).numel() for shape in form.shapes(CONFIG).values())
    assert total == 2 * tower.params + tower.time_params


def test_it_commits_templates_faster_than_code_and_faster_at_a_lower_threshold():
    cpu = torch.device("cpu")
    model = load(FOLDER, cpu, cpu, torch.float32)
    rows = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text().splitlines()]

    def tokens_per_forward(class_, gamma):
        prompts = [torch.tensor(corpus.encode(row["prompt"])) for row in rows if row["class"] == class_][:8]
        generated = two_tower(model, prompts, 64, gamma, 16)
        return sum(len(g.tokens) for g in generated) / sum(g.forwards for g in generated)

    template = tokens_per_forward("template", 0.8)
    assert template > 2
    assert template > 1.2 * tokens_per_forward("code", 0.8)
    assert tokens_per_forward("template", 0.5) > template > tokens_per_forward("template", 0.95)


def test_the_form_that_trains_equals_the_decoder():
    """Of the shipped weights: a prompt, and every block denoised beside the context before it."""
    cpu = torch.device("cpu")
    model = load(FOLDER, cpu, cpu, torch.float32)
    weights = {name: tensor.float() for name, tensor in load_file(FOLDER / "model.safetensors").items()}
    ids = ids_of(3)
    read = form.context(weights, CONFIG, ids)
    caches, rows = model.cache(2, 64), torch.arange(2)
    (hidden,) = model.context_pass([Segment(rows, ids)], caches)
    torch.testing.assert_close(model.context_lm_head(hidden), read.logits, rtol=1e-3, atol=1e-3)
    noisy, share = ids.unflatten(1, (3, 16)).clone(), torch.tensor([[1.0, 0.5, 0.25], [0.75, 1.0, 0.5]])
    noisy[..., ::2] = 3
    denoised = form.denoise(weights, CONFIG, noisy, share, read.layers)
    for block in range(3):
        caches = model.cache(2, 64)
        if block:
            model.context_pass([Segment(rows, ids[:, : 16 * block])], caches)
        logits = model.denoise(noisy[:, block], rows, share[:, block], caches)
        torch.testing.assert_close(logits, denoised.logits[:, block], rtol=1e-3, atol=1e-3)
