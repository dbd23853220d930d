"""Every way to decode in every model of time: one formula for numbers and arrays, more work never for less time, the
modes that are the same where they meet, and costs that can be added up on paper."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import CONTEXT, SEQUENCES, TOKENS, grid, measured_profile

from twotower_sim.affine import (
    Pass,
    Prefill,
    autoregressive_affine,
    block_diffusion_affine,
    mock_ar_affine,
    speculative_affine,
    two_tower_affine,
)
from twotower_sim.costing import OBSERVED
from twotower_sim.drafter import ModelDrafter, MtpDrafter, NgramDrafter
from twotower_sim.errors import InputError
from twotower_sim.gpu import load_gpu
from twotower_sim.latency import NO_PREFILL, Host
from twotower_sim.measured import (
    Hull,
    autoregressive_measured,
    block_diffusion_measured,
    mock_ar_measured,
    speculative_measured,
    two_tower_measured,
)
from twotower_sim.model import load_tower
from twotower_sim.profile import Profile, load_profile
from twotower_sim.roofline import (
    Deployment,
    autoregressive_roofline,
    block_diffusion_roofline,
    mock_ar_roofline,
    speculative_roofline,
    two_tower_roofline,
)
from twotower_sim.routing import INDEPENDENT, observed_routing

H100 = load_gpu("h100-sxm", Path())
NANO = load_tower("nemotron-3-nano-30b-a3b", Path())
TOWER = load_tower("nemotron-twotower-30b-a3b", Path())
ROUTING = observed_routing(load_profile(OBSERVED).routing.model_dump())
SMALL = replace(NANO, pattern="M*-" * 8, hidden=1024, mlp_width=4096, experts=0, experts_per_token=0)
SEQS, BUDGET = 64, 4096
TOGETHER, APART = Deployment(H100), Deployment(H100, link=H100.fastest_link)
HOSTS = {"none": Host(), "paid": Host(0.003), "hidden": Host(0.003, hidden=True)}
DRAFTERS = {"ngram": NgramDrafter(1e-3), "mtp": MtpDrafter(), "model": ModelDrafter(SMALL)}


def two_tower(on=TOGETHER, size=16):
    return two_tower_roofline(TOWER, on, ROUTING, size, SEQS, BUDGET)


def mock_ar(on=TOGETHER):
    return mock_ar_roofline(TOWER, on, ROUTING, SEQS, BUDGET)


def autoregressive(on=TOGETHER, tower=NANO, routing=ROUTING):
    return autoregressive_roofline(tower, on, routing, SEQS, BUDGET)


def speculative(on=TOGETHER, drafts=3, drafter=DRAFTERS["mtp"]):
    return speculative_roofline(NANO, on, ROUTING, drafts, drafter, SEQS, BUDGET)


def block_diffusion(on=TOGETHER, size=32):
    return block_diffusion_roofline(NANO, on, ROUTING, size, SEQS, BUDGET)


def measured(block_sizes=(16,), split=True):
    """The profile made by hand, with every block size taking the same."""
    profile = measured_profile(split=split)
    points = {"block_size": list(block_sizes), "sequences": SEQUENCES, "context": CONTEXT, "tokens": TOKENS}
    for name in ("denoise", "extend"):
        profile["latency"]["passes"][name] = grid(name, points)
    profile["latency"]["passes"]["extend+prefill"]["at_block_size"] = block_sizes[0]
    return Profile.model_validate(profile).latency


HULL = Hull("hand.json")
PREFILL, DENOISE, EXTEND = Prefill(20, 0.05), Pass(8, 0.5, 1e-4), Pass(6, 0.25, 2e-4)
DECODE, DRAFT, SENT = Pass(5, 0.125, 1e-4), Pass(2, 0.0625, 5e-5), Pass(0.5, 1, 0.01)


def modes(host=HOSTS["none"]):
    """Every builder, by a name that says what it is."""
    for where, on in (
        ("together", TOGETHER),
        ("apart", APART),
        ("eager", Deployment(H100, cuda_graphs=False)),
        ("uneven", replace(APART, tensor_parallel=2, denoiser_tensor_parallel=4, expert_parallel=True)),
    ):
        on = replace(on, host=host)
        yield f"two_tower {where}", two_tower(on)
        yield f"mock_ar {where}", mock_ar(on)
        if on.link is None:
            yield f"autoregressive {where}", autoregressive(on)
            yield f"block_diffusion {where}", block_diffusion(on)
            for name, drafter in DRAFTERS.items():
                yield f"speculative {name} {where}", speculative(on, drafter=drafter)
    for compose in ("sum", "max"):
        end = compose, host, SEQS
        yield f"autoregressive {compose}", autoregressive_affine(PREFILL, DECODE, *end)
        yield f"speculative {compose}", speculative_affine(PREFILL, DECODE, DRAFT, *end)
        yield f"block_diffusion {compose}", block_diffusion_affine(PREFILL, DENOISE, EXTEND, *end)
        for sent in (None, SENT):
            two = two_tower_affine(PREFILL, DENOISE, EXTEND, *end, block_size=16, transfer=sent)
            yield f"two_tower {compose} {sent}", two
            yield f"mock_ar {compose} {sent}", mock_ar_affine(PREFILL, DENOISE, DECODE, *end, transfer=sent)
    end = host, SEQS, False
    for split in (False, True):
        yield f"two_tower measured {split}", two_tower_measured(measured(), HULL, 16, split, *end)
        yield f"mock_ar measured {split}", mock_ar_measured(measured((1,)), HULL, split, *end)
    yield "autoregressive measured", autoregressive_measured(measured(), HULL, *end)
    yield "block_diffusion measured", block_diffusion_measured(measured((32,)), HULL, 32, *end)
    yield "speculative measured", speculative_measured(measured((4,)), HULL, 3, 1e-3, *end)


ALL = dict(modes())
NAMES = pytest.mark.parametrize("name", ALL)


def shapes(count, seed=0):
    """Random rounds without prompts: columns n, context, n_extend, extend_context."""
    rng = np.random.default_rng(seed)
    n, extends = (rng.integers(0, SEQS // 2 + 1, count) for _ in range(2))
    means = rng.integers(1, 4000, (2, count))
    return n, means[0] * n, extends, means[1] * extends


@NAMES
@pytest.mark.parametrize("host", HOSTS)
def test_many_rounds_cost_the_very_floats_of_one(name, host):
    latency, columns = dict(modes(HOSTS[host]))[name] if host != "none" else ALL[name], shapes(200)
    many = np.broadcast_arrays(*latency.decode_many(*columns))
    for i, shape in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        assert latency.decode(*shape) == tuple(float(column[i]) for column in many)


@NAMES
@pytest.mark.parametrize("argument", range(4))
def test_more_work_never_costs_less(name, argument):
    latency, shape, previous = ALL[name], [8, 8000, 4, 4000], (0.0, 0.0, 0.0)
    for value in (1, 2, 3, 5, 8, 13, 21, 32):
        shape[argument] = value * (1000 if argument % 2 else 1)
        if argument % 2 == 0:  # the mean context stays
            shape[argument + 1] = value * 1000
        cost = latency.decode(*shape)
        assert all(now >= before for now, before in zip(cost, previous, strict=True))
        previous = cost


@NAMES
def test_prompts_add_to_a_round_less_than_a_round_of_their_own(name):
    latency, prompts = ALL[name], (512, 512 * 513 // 2, 512, 1)
    blocks = "two_tower" in name or "block_diffusion" in name
    shape = (8, 8000, 4, 4000) if blocks else (8, 8000, 0, 0)
    alone, mix = latency.decode(*shape), latency.mixed(*shape, *prompts)
    own = latency.mixed(0, 0, 0, 0, *prompts)
    assert all(now >= before for now, before in zip(mix, alone, strict=True))
    assert max(alone[1], own[1]) <= mix[1] <= 1.01 * (alone[1] + own[1])
    assert latency.round(*shape, prompts) == mix
    assert latency.round(*shape, NO_PREFILL) == alone


@pytest.mark.parametrize("host", HOSTS)
def test_one_pass_of_several_is_the_round_that_one_pass_gives(host):
    """The engine adds up rounds of several passes itself, with the latency's host and transfer."""
    for name, latency in modes(HOSTS[host]):
        if not name.startswith(("two_tower", "block_diffusion")):
            continue
        size = 32 if "block_diffusion" in name else 16
        for prefill in (NO_PREFILL, (512, 512 * 513 // 2, 512, 1)):
            for shape in ((8, 8000, 4, 4000), (8, 8000, 0, 0), (0, 0, 4, 4000)):
                sent = shape[2] * size + prefill[0]
                assert latency.forwards(1, False, *shape, prefill, sent) == latency.round(*shape, prefill), name


def test_host_work_is_paid_or_hidden():
    shape = 8, 8000, 4, 4000
    rounds = {host: {name: latency.decode(*shape)[2] for name, latency in modes(HOSTS[host])} for host in HOSTS}
    for name, seconds in rounds["none"].items():
        assert rounds["paid"][name] == pytest.approx(seconds + 0.003)
        assert rounds["hidden"][name] == max(seconds, 0.003)


# ---------------------------------------------------------------------- where modes meet


def test_without_drafts_speculation_is_autoregressive():
    plain, none = autoregressive(), speculative(drafts=0, drafter=NgramDrafter())
    for shape in zip(*(column.tolist() for column in shapes(100)), strict=True):
        assert none.decode(*shape) == plain.decode(*shape)
    affine = [
        speculative_affine(PREFILL, DECODE, Pass(), "sum", Host(), SEQS),
        autoregressive_affine(PREFILL, DECODE, "sum", Host(), SEQS),
    ]
    for shape in ((5, 5000, 0, 0, *NO_PREFILL), (5, 5000, 0, 0, 100, 5050, 100, 1)):
        assert affine[0].round(*shape[:4], shape[4:]) == affine[1].round(*shape[:4], shape[4:])


def test_a_verify_pass_costs_more_than_a_token_and_less_than_its_tokens():
    """Why drafts pay at small batches: the weights that a token reads serve all of its drafts, but for the experts."""
    token = autoregressive().decode(1, 1000, 0, 0)[1]
    verify = [speculative(drafts=k).decode(1, 1000, 0, 0)[1] for k in (1, 3, 7)]
    assert token < verify[0] < verify[1] < verify[2] < 8 * token
    assert verify[1] < 4 * token


def test_drafts_are_forwards_in_turn():
    one, three = (speculative(drafts=k).decode(8, 8000, 0, 0)[0] for k in (1, 3))
    assert three == pytest.approx(3 * one, rel=1e-3)
    dense = load_gpu("h100-sxm", Path())
    token = autoregressive(Deployment(dense), tower=SMALL).decode(8, 8000, 0, 0)[1]
    assert speculative(drafts=1, drafter=ModelDrafter(SMALL)).decode(8, 8000, 0, 0)[0] == token


def test_a_multi_token_module_costs_what_it_reads():
    """At batch one and without gaps: the projection, an attention layer, an MoE layer's experts and the head."""
    fast = H100.efficiency.model_copy(update={"memory": 1.0, "kernel_gap_us": 0.0, "graph_launch_us": 0.0})
    on = Deployment(H100.model_copy(update={"efficiency": fast}))
    drafter_s = speculative(on, drafts=1).decode(1, 0, 0, 0)[0]
    layer = NANO.attention_params + NANO.moe_dense_params + 6 * NANO.expert_params
    read = 2 * (2 * NANO.hidden**2 + layer + NANO.head_params)
    assert drafter_s == pytest.approx(read / 3350e9, rel=0.01)


def test_drafters_read_the_prompts_too():
    prompts = 1024, 1024 * 1025 // 2, 1024, 1
    for name, drafter in DRAFTERS.items():
        latency = speculative(drafter=drafter)
        alone, mix = latency.decode(4, 4000, 0, 0)[0], latency.mixed(4, 4000, 0, 0, *prompts)[0]
        assert (mix == alone) == (name == "ngram")
    assert speculative().mixed(0, 0, 0, 0, *prompts)[0] > 0  # a prompt that is not yet complete


def test_mock_ar_takes_a_token_through_both_towers():
    """Each tower costs about what autoregressive decoding does; the context tower is spared the head."""
    together, apart, plain = mock_ar(), mock_ar(APART), autoregressive(tower=TOWER)
    token_s = plain.decode(8, 8000, 0, 0)[1]
    denoiser_s, context_s, round_s = together.decode(8, 8000, 0, 0)
    assert denoiser_s < token_s  # it leaves the state as it is
    assert denoiser_s == pytest.approx(token_s, rel=0.15)
    head_s = TOWER.head_params * 2 / (3350e9 * H100.efficiency.memory)
    assert context_s == pytest.approx(token_s - head_s, rel=0.01)
    assert round_s == denoiser_s + context_s
    sent_s = apart.transfer(8, 8)
    assert apart.decode(8, 8000, 0, 0) == (denoiser_s, context_s, max(denoiser_s, context_s + sent_s))
    assert sent_s == pytest.approx(8 * (TOWER.state_bytes + 6144) / 450e9 + H100.fastest_link.latency_s, rel=1e-6)


def test_block_diffusion_shares_one_forward():
    latency = block_diffusion(size=16)
    denoise, extend = latency.decode(8, 8000, 0, 0)[1], latency.decode(0, 0, 8, 8000)[1]
    both = latency.decode(8, 8000, 8, 8000)
    assert max(denoise, extend) < both[1] < 0.8 * (denoise + extend)
    assert both[0] == 0
    assert both[2] == both[1]
    assert latency.one_forward
    towers = two_tower(size=16)
    assert extend == towers.decode(0, 0, 8, 8000)[1]
    assert denoise == pytest.approx(towers.decode(8, 8000, 0, 0)[0], rel=0.02)  # but for time conditioning


def test_blocks_of_one_token_are_nearly_autoregressive():
    one, plain = block_diffusion(size=1), autoregressive()
    for n in (1, 8, 64):
        ours, theirs = one.decode(n, n * 1000, 0, 0)[1], plain.decode(n, n * 1000, 0, 0)[1]
        written_s = n * NANO.state_bytes / (3350e9 * H100.efficiency.memory)  # denoising leaves the state
        assert ours == pytest.approx(theirs - written_s, rel=1e-6)


def test_blocks_of_256_have_room_in_the_round():
    latency = block_diffusion_roofline(NANO, TOGETHER, ROUTING, 256, 16, BUDGET)
    assert latency.decode(16, 16_000, 0, 0)[1] > latency.decode(1, 1000, 0, 0)[1] > 0


# ---------------------------------------------------------------------- on more GPUs


def test_experts_of_one_gpu_are_all_there():
    for build in (two_tower, autoregressive, block_diffusion, mock_ar):
        off, on = (build(replace(TOGETHER, expert_parallel=ep)) for ep in (False, True))
        assert on.decode(16, 16_000, 4, 4000) == off.decode(16, 16_000, 4, 4000)


def test_expert_parallelism_waits_for_the_busiest_gpu_and_for_what_it_sends():
    slow = H100.model_copy(update={"links": {"slow": H100.links["pcie"].model_copy(update={"latency_us": 1000})}})
    for gpu, tokens in ((H100, 1), (H100, 64), (slow, 1)):
        on = Deployment(gpu, tensor_parallel=4)
        off, ep = (autoregressive(replace(on, expert_parallel=ep)).decode(tokens, 0, 0, 0)[1] for ep in (False, True))
        assert ep > off
        if gpu is slow:
            assert ep - off == pytest.approx(2 * 23 * 1e-3, rel=0.02)


@pytest.mark.parametrize(("tokens", "gpus"), [(4, 2), (4, 8), (16, 4), (64, 8)])
def test_the_busiest_gpu_by_simulation(tokens, gpus):
    """Independent routing: the largest number of distinct experts on a GPU, as a share of all it has."""
    free = H100.model_copy(
        update={"links": {"fast": H100.links["nvlink"].model_copy(update={"gb_per_s": 1e9, "latency_us": 0})}}
    )
    rng = np.random.default_rng(0)
    draws = rng.permuted(np.tile(np.arange(128), (2000 * tokens, 1)), axis=1)[:, :6].reshape(2000, -1)
    touched = np.zeros((2000, 128), bool)
    np.put_along_axis(touched, draws, True, axis=1)
    busiest = touched.reshape(2000, gpus, -1).sum(axis=2).max(axis=1).mean() / (128 // gpus)
    on = Deployment(free, tensor_parallel=gpus)
    off, ep = (
        autoregressive(replace(on, expert_parallel=ep), routing=INDEPENDENT).decode(tokens, 0, 0, 0)[1]
        for ep in (False, True)
    )
    read_s = 23 * 128 * NANO.expert_params * 2 / (3350e9 * H100.efficiency.memory * gpus)
    assert (ep - off) / read_s == pytest.approx(busiest - touched.mean(), abs=0.02)


def test_each_tower_has_its_own_degree():
    even, more = (replace(APART, tensor_parallel=1, denoiser_tensor_parallel=n) for n in (None, 2))
    shape = 32, 32_000, 8, 8000
    assert two_tower(more).decode(*shape)[0] < two_tower(even).decode(*shape)[0]
    assert two_tower(more).decode(*shape)[1] == two_tower(even).decode(*shape)[1]
    assert two_tower(more).transfer(8, 128) == two_tower(even).transfer(8, 128)  # one GPU sends
    both = replace(APART, tensor_parallel=2)
    hop_s = H100.fastest_link.latency_s
    alone, two = two_tower(even).transfer(8, 128) - hop_s, two_tower(both).transfer(8, 128) - hop_s
    assert two == pytest.approx(alone / 2)
    assert two_tower(replace(both, denoiser_tensor_parallel=4)).transfer(8, 128) - hop_s == pytest.approx(two)
    assert two_tower(both).transfer(0, 0) == 0


# ---------------------------------------------------------------------- on paper


def test_affine_rounds_add_up_on_paper():
    """n = 4 of 1,000 tokens of context, 2 extends of 500; a prompt of 100 tokens."""
    prompt, end = (100, 5050, 100, 1), ("sum", Host(0.001), SEQS)

    def ms(*figures):
        return tuple(pytest.approx(figure * 1e-3) for figure in figures)

    two = two_tower_affine(PREFILL, DENOISE, EXTEND, *end, block_size=16, transfer=SENT)
    denoise, extend = 8 + 4 * 0.5 + 0.4, 6 + 2 * 0.25 + 0.2
    assert two.decode(4, 4000, 2, 1000) == ms(denoise, extend, 1 + denoise + extend + 0.5 + 2 + 0.32)
    assert two.decode(4, 4000, 0, 0) == ms(denoise, 0, 1 + denoise)
    assert two.mixed(4, 4000, 2, 1000, *prompt) == ms(denoise, extend + 25, 1 + denoise + extend + 25 + 0.5 + 3 + 1.32)
    mock = mock_ar_affine(PREFILL, DENOISE, DECODE, *end)
    decode = 5 + 0.5 + 0.4
    assert mock.decode(4, 4000, 0, 0) == ms(denoise, decode, 1 + denoise + decode)
    assert mock.mixed(4, 4000, 0, 0, *prompt) == ms(denoise, decode + 25, 1 + denoise + decode + 25)
    drafts = speculative_affine(PREFILL, DECODE, DRAFT, *end)
    draft = 2 + 0.25 + 0.2
    assert drafts.decode(4, 4000, 0, 0) == ms(draft, decode, 1 + draft + decode)
    assert drafts.mixed(4, 4000, 0, 0, *prompt) == ms(draft, decode + 25, 1 + draft + decode + 25)
    one = block_diffusion_affine(PREFILL, DENOISE, EXTEND, *end)
    assert one.decode(4, 4000, 2, 1000) == ms(0, denoise + extend, 1 + denoise + extend)
    assert one.mixed(4, 4000, 2, 1000, *prompt) == ms(0, denoise + extend + 25, 1 + denoise + extend + 25)


def test_affine_rounds_of_passes_at_the_same_time():
    end = "max", Host(0.1, hidden=True), SEQS
    two = two_tower_affine(PREFILL, DENOISE, EXTEND, *end, block_size=16, transfer=SENT)
    assert two.mixed(4, 4000, 2, 1000, 100, 5050, 100, 1)[2] == 0.1  # host work outlasts them
    end = "max", Host(), SEQS
    two = two_tower_affine(PREFILL, DENOISE, EXTEND, *end, block_size=16, transfer=SENT)
    assert two.decode(4, 4000, 2, 1000)[2] == pytest.approx(10.4e-3)
    assert two.decode(1, 0, 2, 1000)[2] == pytest.approx((6.7 + 2.82) * 1e-3)  # the transfer comes after the extend
    drafts = speculative_affine(PREFILL, DECODE, DRAFT, *end)
    assert drafts.mixed(4, 4000, 0, 0, 100, 5050, 100, 1) == tuple(map(pytest.approx, (2.45e-3, 25e-3, 27.45e-3)))
    assert block_diffusion_affine(PREFILL, DENOISE, EXTEND, *end).decode(4, 4000, 2, 1000)[2] == pytest.approx(10.4e-3)


# ---------------------------------------------------------------------- measured


def test_measured_modes_take_the_grids_that_they_say():
    of, end = measured((1, 4)), (Host(), SEQS, False)
    known = two_tower_measured(of, HULL, 1, True, *end)
    tokens = autoregressive_measured(of, HULL, *end)
    mock = mock_ar_measured(of, HULL, True, *end)
    denoiser_s, context_s, round_s = mock.decode(4, 4 * 257, 0, 0)  # the newest token is not in the cache
    assert denoiser_s == known.decode(4, 4 * 256, 0, 0)[0]
    assert context_s == tokens.decode(4, 4 * 257, 0, 0)[1]
    assert round_s == max(denoiser_s, context_s + mock.transfer(4, 4))
    verify = two_tower_measured(of, HULL, 4, False, *end).decode(0, 0, 4, 4 * 256)[1]
    drafts = speculative_measured(of, HULL, 3, 1e-3, *end)
    assert drafts.decode(4, 4 * 257, 0, 0) == (1e-3, verify, 1e-3 + verify)
    assert drafts.decode(0, 0, 0, 0) == (0, 0, 0)
    blocks = block_diffusion_measured(of, HULL, 4, *end)
    assert blocks.decode(4, 1024, 4, 1024)[2] == sum(blocks.decode(4, 1024, 4, 1024)[:2])
    assert not blocks.one_forward


def test_what_was_not_measured_is_said():
    end = Host(), SEQS, False
    with pytest.raises(InputError, match="decoding.block_size: found 1; hand.json: denoise was measured at 16"):
        mock_ar_measured(measured(), HULL, True, *end)
    with pytest.raises(
        InputError, match="decoding.draft_tokens: found 3, verified as an extend pass of 4 tokens; hand"
    ):
        speculative_measured(measured(), HULL, 3, 0.0, *end)
    with pytest.raises(InputError, match="holds no transfer, which this scenario needs"):
        mock_ar_measured(measured((1,), split=False), HULL, True, *end)
    with pytest.raises(InputError, match=r"holds no extend\+prefill for decoding.block_size 16"):
        block_diffusion_measured(measured((4, 16)), HULL, 16, Host(), SEQS, True)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, SEQS), st.integers(0, 100_000))
def test_drafting_more_never_costs_less(drafts, n, mean):
    fewer, more = (SPECULATIVE[k].decode(n, n * mean, 0, 0) for k in (drafts - 1, drafts))
    assert all(a <= b for a, b in zip(fewer, more, strict=True))


SPECULATIVE = [speculative(drafts=k, drafter=MtpDrafter() if k else NgramDrafter()) for k in range(9)]
