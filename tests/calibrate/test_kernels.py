"""Kernels and CPU paths against the naive versions in float64; on a GPU the kernels run natively, elsewhere interpreted."""

import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate import kernels
from calibrate.kernels import accuracy
from calibrate.kernels.accuracy import (
    ATTENTION,
    CONFIDENCE,
    DEVICE,
    EXPERTS,
    NORM,
    SCAN,
    attention_inputs,
    confidence_inputs,
    distance,
    errors,
    experts_inputs,
    norm_inputs,
    results,
    scan_inputs,
)
from calibrate.kernels.attention import _splits, triton_block_attention
from calibrate.kernels.confidence import naive_commit, torch_commit, triton_commit

TOLERANCE = {
    torch.float32: 3e-6 if DEVICE.type == "cpu" else 1e-5,  # tensor cores cut sums off, the interpreter rounds them
    torch.bfloat16: 1e-2,  # the interpreter truncates to bf16
}
CPU = torch.device("cpu")
few = settings(max_examples=12, deadline=None, derandomize=True)

CASES = {
    "a block, ragged contexts": (ATTENTION, partial(attention_inputs, tokens=16, heads=8, kv_heads=2, dim=64, contexts=[130, 0, 1, 64], causal=False)),
    "an extend": (ATTENTION, partial(attention_inputs, tokens=16, heads=8, kv_heads=2, dim=64, contexts=[70, 0], causal=True)),
    "a token": (ATTENTION, partial(attention_inputs, tokens=1, heads=4, kv_heads=4, dim=32, contexts=[200, 0, 65], causal=True)),
    "a prompt of several tiles": (ATTENTION, partial(attention_inputs, tokens=150, heads=2, kv_heads=1, dim=16, contexts=[0], causal=True)),
    "a prompt after a prefix": (ATTENTION, partial(attention_inputs, tokens=70, heads=4, kv_heads=1, dim=24, contexts=[90, 5], causal=True)),
    "scan a block": (SCAN, partial(scan_inputs, sequences=2, tokens=16, heads=4, dim=32, groups=2, state=64, taps=4, write=False)),
    "scan and advance": (SCAN, partial(scan_inputs, sequences=2, tokens=16, heads=4, dim=40, groups=1, state=24, taps=4, write=True)),
    "scan a token": (SCAN, partial(scan_inputs, sequences=3, tokens=1, heads=4, dim=16, groups=2, state=16, taps=4, write=True)),
    "scan fewer tokens than taps": (SCAN, partial(scan_inputs, sequences=2, tokens=2, heads=2, dim=16, groups=2, state=16, taps=5, write=True)),
    "scan a prompt": (SCAN, partial(scan_inputs, sequences=1, tokens=150, heads=2, dim=16, groups=1, state=16, taps=4, write=True)),
    "scan the most tokens one by one": (SCAN, partial(scan_inputs, sequences=1, tokens=128, heads=2, dim=16, groups=1, state=16, taps=4, write=True)),
    "scan a token more than a chunk": (SCAN, partial(scan_inputs, sequences=2, tokens=129, heads=3, dim=16, groups=1, state=40, taps=4, write=False)),
    "scan whole chunks": (SCAN, partial(scan_inputs, sequences=2, tokens=256, heads=4, dim=40, groups=2, state=24, taps=4, write=True)),
    "scan a part of a chunk last": (SCAN, partial(scan_inputs, sequences=3, tokens=300, heads=2, dim=64, groups=1, state=128, taps=4, write=True)),
    "scan without memory of inputs": (SCAN, partial(scan_inputs, sequences=1, tokens=5, heads=2, dim=16, groups=1, state=16, taps=1, write=True)),
    "experts of a block": (EXPERTS, partial(experts_inputs, tokens=16, width=84, hidden=58, experts=16, top=3)),
    "experts of a token": (EXPERTS, partial(experts_inputs, tokens=1, width=64, hidden=130, experts=16, top=6)),
    "more tokens of an expert than a tile": (EXPERTS, partial(experts_inputs, tokens=150, width=70, hidden=30, experts=3, top=2)),
    "many tokens of each expert": (EXPERTS, partial(experts_inputs, tokens=300, width=70, hidden=140, experts=3, top=2)),
    "norm": (NORM, partial(norm_inputs, sequences=2, tokens=3, width=84, modulated=False, modulate_first=False)),
    "norm after modulation": (NORM, partial(norm_inputs, sequences=2, tokens=3, width=84, modulated=True, modulate_first=True)),
    "norm before modulation": (NORM, partial(norm_inputs, sequences=2, tokens=3, width=84, modulated=True, modulate_first=False)),
    "confidence, one part": (CONFIDENCE, partial(confidence_inputs, rows=300, vocabulary=130)),
    "confidence, many parts": (CONFIDENCE, partial(confidence_inputs, rows=5, vocabulary=20_011)),
    "confidence, parts of several tiles": (CONFIDENCE, partial(confidence_inputs, rows=100, vocabulary=20_011)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel allocates and does not write is NaN, or far from any token."""
    empty = torch.empty

    def poisoned_empty(*size, **options):
        out = empty(*size, **options)
        return out.fill_(torch.nan if out.is_floating_point() else -(10**6))

    monkeypatch.setattr(torch, "empty", poisoned_empty)


def within(found, tolerance):
    """Unlike their maximum, false wherever one is NaN."""
    return all(error < tolerance for error in found.values())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_naive_version(name, dtype):
    kernel, make = CASES[name]
    found = errors(kernel, make(dtype))
    assert set(found) == {"torch", "triton"}
    assert within(found, TOLERANCE[dtype]), found


@few
@given(
    tokens=st.integers(1, 40),
    group=st.integers(1, 5),
    kv_heads=st.integers(1, 2),
    dim=st.integers(1, 40),
    contexts=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    causal=st.booleans(),
)
def test_attention_of_any_shape(tokens, group, kv_heads, dim, contexts, causal):
    inputs = attention_inputs(torch.float32, tokens, group * kv_heads, kv_heads, dim, contexts, causal)
    assert within(errors(ATTENTION, inputs), TOLERANCE[torch.float32])


@few
@given(
    sequences=st.integers(1, 2),
    tokens=st.integers(1, 40),
    group=st.integers(1, 3),
    dim=st.integers(1, 40),
    groups=st.integers(1, 2),
    state=st.integers(1, 40),
    taps=st.integers(1, 6),
    write=st.booleans(),
)
def test_scan_of_any_shape(sequences, tokens, group, dim, groups, state, taps, write):
    inputs = scan_inputs(torch.float32, sequences, tokens, group * groups, dim, groups, state, taps, write)
    assert within(errors(SCAN, inputs), TOLERANCE[torch.float32])


@few
@given(
    sequences=st.integers(1, 2),
    tokens=st.integers(129, 400),
    group=st.integers(1, 3),
    dim=st.integers(1, 40),
    groups=st.integers(1, 2),
    state=st.integers(1, 40),
    write=st.booleans(),
)
def test_long_scan_of_any_shape(sequences, tokens, group, dim, groups, state, write):
    inputs = scan_inputs(torch.float32, sequences, tokens, group * groups, dim, groups, state, 4, write)
    assert within(errors(SCAN, inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [-20.0, 4.0, 20.0], ids=["none", "strong", "total"])
def test_long_scans_decay_by_any_amount(scale, dtype):
    """From a state that every token is added to, up to one of which nothing is left after a token."""
    inputs = scan_inputs(dtype, 2, 200, heads=2, dim=16, groups=1, state=16, taps=4, write=True)
    inputs[8] = torch.full_like(inputs[8], scale)  # a_log
    found = errors(SCAN, inputs)
    assert within(found, TOLERANCE[dtype]), found


@few
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 90),
    hidden=st.integers(1, 90),
    experts=st.integers(1, 8),
    data=st.data(),
)
def test_experts_of_any_shape(tokens, width, hidden, experts, data):
    top = data.draw(st.integers(1, experts))
    found = errors(EXPERTS, experts_inputs(torch.float32, tokens, width, hidden, experts, top))
    assert within(found, TOLERANCE[torch.float32])


@pytest.mark.parametrize("path", ["naive", "torch", "triton"])
def test_a_denoise_leaves_the_states_and_an_extend_those_of_others(path):
    for write, tokens in product((False, True), (7, 150)):
        inputs = scan_inputs(torch.float32, 2, tokens, heads=2, dim=16, groups=1, state=16, taps=4, write=write)
        out = results(getattr(SCAN, path), inputs, DEVICE if path == "triton" else CPU)
        rows = inputs[4].tolist()
        for before, after in zip(inputs[2:4], out[3:5], strict=True):
            changed = {slot for slot in range(3) if not torch.equal(before[slot], after[slot])}
            assert changed == (set(rows) if write else set())


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_a_scan_goes_on_where_the_last_one_ended(path):
    """In steps of 1, 130, 16 and 142 tokens, as in one of 289."""
    lengths = [1, 130, 16, 142]
    scan, device = getattr(SCAN, path), DEVICE if path == "triton" else CPU
    inputs = scan_inputs(torch.float32, 1, sum(lengths), heads=2, dim=16, groups=1, state=16, taps=4, write=True)
    xbc, dt, *rest = (z.to(device) if isinstance(z, torch.Tensor) else z for z in inputs)
    whole, *_, conv_state, ssm_state = results(scan, inputs, device)[:5]
    parts = [scan(a, b, *rest) for a, b in zip(xbc.split(lengths, 1), dt.split(lengths, 1), strict=True)]
    for found, truth in ((torch.cat(parts, 1), whole), (rest[0], conv_state), (rest[1], ssm_state)):
        assert distance(found.cpu(), truth) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_a_scan_may_store_its_state_in_bf16(path):
    inputs = scan_inputs(torch.float32, 2, 16, heads=2, dim=16, groups=1, state=16, taps=4, write=True)
    inputs[3] = inputs[3].bfloat16()
    device = DEVICE if path == "triton" else CPU
    found, truth = results(getattr(SCAN, path), inputs, device), results(SCAN.naive, inputs, CPU, double=True)
    assert distance(found[0], truth[0]) < TOLERANCE[torch.float32]
    assert distance(found[4], truth[4]) < TOLERANCE[torch.bfloat16]


def test_programs_share_the_tokens_of_a_favoured_expert():
    """Of which there are five tiles, where two are expected."""
    inputs = experts_inputs(torch.bfloat16, 520, width=70, hidden=30, experts=4, top=1)
    inputs[3] = torch.cat([torch.full((519, 1), 2), torch.tensor([[3]])])
    found = errors(EXPERTS, inputs)
    assert within(found, TOLERANCE[torch.bfloat16]), found


@pytest.mark.parametrize("path", ["naive", "torch", "triton"])
def test_equal_logits_go_to_the_lower_token(path):
    logits = torch.zeros(3, 9000)
    logits[0, [5000, 8999]] = 2.0
    logits[1, [0, 1, 4096]] = 2.0
    tokens, probabilities = results(getattr(CONFIDENCE, path), [logits, 0], DEVICE if path == "triton" else CPU)[:2]
    assert tokens.tolist() == [5000, 1, 1]
    assert probabilities[2].item() == pytest.approx(1 / 8999, rel=1e-5)


@pytest.mark.parametrize("path", ["naive", "torch", "triton"])
def test_minus_one_excludes_no_token(path):
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    tokens, probabilities = results(getattr(CONFIDENCE, path), [logits, -1], DEVICE if path == "triton" else CPU)[:2]
    assert tokens.tolist() == [2]
    assert probabilities[0].item() == pytest.approx(logits.softmax(-1)[0, 2].item(), rel=1e-5)


MASK = 3
COMMIT = {
    "one at least": (0.99, 4, [MASK] * 4, [0.1, 0.5, 0.2, 0.4], [MASK, 11, MASK, MASK]),
    "all that are sure": (0.15, 4, [MASK] * 4, [0.1, 0.5, 0.2, 0.4], [MASK, 11, 12, 13]),
    "a share of the rest": (0.99, 2, [MASK] * 4, [0.1, 0.5, 0.2, 0.4], [MASK, 11, MASK, 13]),
    "all at the last step": (0.99, 1, [MASK] * 4, [0.1, 0.5, 0.2, 0.4], [10, 11, 12, 13]),
    "the lower of equals": (0.99, 4, [MASK] * 4, [0.1, 0.4, 0.4, 0.4], [MASK, 11, MASK, MASK]),
    "never a committed one": (0.3, 4, [MASK, 7, 8, MASK], [0.1, 0.9, 0.9, 0.2], [MASK, 7, 8, 13]),
    "not what is just as sure as gamma": (0.5, 4, [MASK] * 4, [0.5, 0.5, 0.75, 0.25], [MASK, MASK, 12, MASK]),
    "nothing where nothing is masked": (0.1, 1, [5, 6, 7, 8], [0.9, 0.9, 0.9, 0.9], [5, 6, 7, 8]),
}  # fmt: skip


@pytest.mark.parametrize("path", [naive_commit, torch_commit, triton_commit], ids=["naive", "torch", "triton"])
@pytest.mark.parametrize("name", COMMIT)
def test_commit(name, path):
    gamma, left, ids, sure, expected = COMMIT[name]
    inputs = [
        torch.tensor([ids]),
        torch.tensor([[10, 11, 12, 13]]),
        torch.tensor([sure]),
        gamma,
        torch.tensor([left]),
        MASK,
    ]
    committed, after = results(path, inputs, DEVICE if path is triton_commit else CPU)[:2]
    assert after.tolist() == [expected]
    assert committed.tolist() == [sum(a != b for a, b in zip(ids, expected, strict=True))]


@settings(few, max_examples=40)
@given(sequences=st.integers(1, 4), size=st.integers(1, 20), one_gamma=st.booleans(), seed=st.integers(0, 999))
def test_commit_of_any_block(sequences, size, one_gamma, seed):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(MASK, MASK + 2, (sequences, size), generator=random)
    tokens = torch.randint(10, 99, (sequences, size), generator=random)
    sure = torch.randint(0, 8, (sequences, size), generator=random) / 8  # with ties
    gamma = 0.5 if one_gamma else torch.rand(sequences, generator=random)
    left = torch.randint(1, size + 1, (sequences,), generator=random)
    inputs = [ids, tokens, sure, gamma, left, MASK]
    truth = results(naive_commit, inputs, CPU)
    for path, device in ((torch_commit, CPU), (triton_commit, DEVICE)):
        assert all(torch.equal(a, b) for a, b in zip(results(path, inputs, device), truth, strict=True))


def test_the_public_functions_choose_by_device(monkeypatch):
    """They take the arguments of the naive versions, on the CPU and on a GPU."""
    norm = norm_inputs(torch.float32, 2, 3, width=20, modulated=False, modulate_first=False)
    commit = [torch.full((1, 4), MASK), torch.arange(4)[None], torch.rand(1, 4), 0.9, torch.tensor([2]), MASK]
    calls = [
        (kernels.block_attention, ATTENTION.naive, attention_inputs(torch.float32, 2, 4, 2, 16, [5], causal=True)),
        (kernels.block_scan, SCAN.naive, scan_inputs(torch.float32, 1, 2, 2, 16, 1, 16, 4, write=True)),
        (kernels.grouped_experts, EXPERTS.naive, experts_inputs(torch.float32, 3, 16, 16, 4, 2)),
        (lambda *args: kernels.modulated_norm(*args[:3]), NORM.naive, norm),
        (kernels.confidence, CONFIDENCE.naive, confidence_inputs(torch.float32, 2, 40)),
        (kernels.commit, naive_commit, commit),
    ]
    for function, naive, inputs in calls:
        found, truth = results(function, inputs, DEVICE), results(naive, inputs, CPU, double=True)
        assert all(distance(a, b) < TOLERANCE[torch.float32] for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize(
    ("programs", "context", "splits"), [(1, 10**6, 128), (3, 10**6, 32), (200, 10**6, 1), (1, 300, 4), (1, 3, 1)]
)
def test_the_context_is_split_until_the_gpu_is_full(programs, context, splits):
    assert _splits(programs, context) == splits


def test_keys_and_values_of_other_layouts_are_refused():
    q, k, v, *rest = attention_inputs(torch.float32, 2, 2, 2, 16, [5], causal=True)
    with pytest.raises(ValueError, match="layout"):
        triton_block_attention(q, k, v.contiguous(), *rest)


def test_the_package_works_without_triton():
    script = """
import sys
sys.modules["triton"] = None
import torch
from calibrate.kernels.norm import modulated_norm, triton_modulated_norm
x = torch.ones(1, 1, 4)
assert torch.allclose(modulated_norm(x, x[0, 0], 0.0), x)
try:
    triton_modulated_norm(x, x[0, 0], 0.0, None, None, False)
except ImportError as error:
    assert "Triton" in str(error)
else:
    sys.exit("launched without Triton")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_table_of_accuracy_has_every_kernel():
    made = accuracy.cases(torch.bfloat16)
    assert {kernel for kernel, _ in made.values()} == {ATTENTION, SCAN, EXPERTS, NORM, CONFIDENCE}
