"""The commit law: distributions against brute force, the decoding rule in every draw, keyed luck."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import obeys_the_rule

from twotower_sim.commits import LEVELS, ConstantCommits, Difficulty, Figures, FittedCommits, steps_ahead
from twotower_sim.luck import MOST_FITTED, OBSERVED
from twotower_sim.plan import BlockPlans
from twotower_sim.profile import load_profile

FIGURES = load_profile(OBSERVED).commits.figures()


def law(class_="mixed", gamma=0.8, steps=16) -> FittedCommits:
    return FittedCommits(FIGURES, class_, gamma, 16, steps)


def drawn(law, requests=2000, blocks=16, seed=0):
    """Steps and sizes of the blocks of many requests."""
    request, block = np.divmod(np.arange(requests * blocks), blocks)
    steps = law.steps(seed, request, block)
    sizes = law.sizes(seed, request, block, steps)
    return steps, np.split(sizes, np.cumsum(steps)[:-1])


@settings(max_examples=40, deadline=None)
@given(
    gamma=st.floats(0.05, 0.99),
    steps=st.integers(1, 16),
    class_=st.sampled_from(["mixed", "math", "code"]),
    seed=st.integers(0, 2**63),
)
def test_every_draw_obeys_the_decoding_rule(gamma, steps, class_, seed):
    for sizes in drawn(law(class_, gamma, steps), requests=20, seed=seed)[1]:
        obeys_the_rule(sizes.tolist(), 16, steps)


@pytest.mark.parametrize("block_size", [1, 2, 7, 16, 32])
def test_other_block_sizes_obey_it_too(block_size):
    fitted = FittedCommits(FIGURES, "mixed", 0.8, block_size, max(1, block_size // 2))
    for sizes in drawn(fitted, requests=50)[1]:
        obeys_the_rule(sizes.tolist(), block_size, max(1, block_size // 2))


def test_commit_tables_are_distributions():
    for steps in (4, 16):
        tables = FIGURES.commit_tables(16, steps)
        np.testing.assert_allclose(tables[:, :, 1:].sum(axis=-1), 1)
        np.testing.assert_allclose(tables[-1, :, np.arange(17), np.arange(17)][1:], 1)  # the last step commits all


def test_steps_and_sizes_follow_the_chain():
    """Marginals of the exact draw against simulating the chain step by step."""
    fitted, rng, number = law(), np.random.default_rng(0), 40_000
    steps, sizes = drawn(fitted, requests=number // 16)
    means = FIGURES.level_means("mixed", 0.8, 16)
    weights = FIGURES.level_weights(means)
    tables = FIGURES.commit_tables(16, 16)
    block = np.minimum(np.tile(np.arange(16), number // 16), weights.shape[1] - 1)
    difficulty = rng.integers(0, 16, number)
    levels = (rng.random((number, 1)) > np.cumsum(weights[difficulty, block], axis=1)).sum(axis=1)
    levels = np.minimum(levels, len(LEVELS) - 1)
    masked, taken, first = np.full(number, 16), np.zeros(number, int), None
    for k in range(16):
        left = masked > 0
        chances = np.cumsum(tables[k, levels, masked], axis=1)
        committed = np.minimum((rng.random((number, 1)) > chances).sum(axis=1), masked) * left
        first = committed if first is None else first
        taken += left
        masked = masked - committed
    assert (masked == 0).all()
    assert share(steps) == pytest.approx(share(taken), abs=0.012)
    assert share(np.array([s[0] for s in sizes])) == pytest.approx(share(first), abs=0.012)
    second = np.array([s[1] for s in sizes if len(s) == 5])  # conditional on the steps, too
    assert len(second) > 500


def share(values: np.ndarray) -> list[float]:
    return (np.bincount(values, minlength=17) / len(values)).tolist()


def test_steps_ahead_agrees_with_counting_paths():
    """Three positions, two steps, by hand: done in one step, or in two."""
    tables = FIGURES.commit_tables(3, 2)
    ahead = steps_ahead(tables)[0, :, 3]
    np.testing.assert_allclose(ahead[:, 1], tables[0, :, 3, 3])
    np.testing.assert_allclose(ahead[:, 2], 1 - tables[0, :, 3, 3])


def test_a_lower_threshold_takes_fewer_steps():
    means = [drawn(law(gamma=gamma))[0].mean() for gamma in (0.5, 0.7, 0.8, 0.9, 0.95)]
    assert means == sorted(means)
    assert means[0] < 0.8 * means[-1]


def test_early_blocks_are_harder_and_requests_differ():
    steps = drawn(law("math"), requests=4000)[0].reshape(4000, 16)
    by_block = steps.mean(axis=0)
    assert by_block[0] > 1.5 * by_block[-1]
    of_request = steps.mean(axis=1)
    independent = steps.var(axis=0).mean() / 16
    assert of_request.var() > 2 * independent  # difficulty persists within a request


def test_a_request_keeps_its_luck():
    """Invariant 6: draws are keyed by seed, request and block, whatever else is drawn, in whatever order."""
    outputs = np.full(10_000, 100)
    one, other = (BlockPlans(law(), 3, outputs) for _ in range(2))
    for request in (9_999, 17, 4_096, 0, 17):
        assert one.of(request) == BlockPlans(law(), 3, outputs[: request + 1]).of(request)
    everything = other.blocks(0, 10_000)
    at = slice(everything.first[5000], everything.first[5001])
    assert one.of(5000) == everything.extend[at].tolist()
    assert one.of(5000) != BlockPlans(law(), 4, outputs).of(5000)
    sizes = one.sizes(5000)
    assert [len(s) for s in sizes] == everything.steps[at].tolist()


def test_constant_commits():
    steps, sizes = drawn(ConstantCommits(4, 16, 16), requests=2)
    assert set(steps.tolist()) == {4}
    assert sizes[0].tolist() == [4, 4, 4, 4]
    uneven = drawn(ConstantCommits(2.5, 16, 16), requests=1, blocks=1)[1][0]
    assert uneven.sum() == 16
    assert uneven[:-1].mean() == 2.5  # the last step has what is left
    with pytest.raises(ValueError, match="8 steps for a block of 16; steps_per_block allows 4"):
        ConstantCommits(2, 16, 4)


def test_figures_need_every_parameter():
    with pytest.raises(TypeError):
        Figures(gamma=1.0)


def test_where_each_class_was_measured():
    """Between measured points, and no further: mixed over gamma and T, math and code at one point."""
    classes = load_profile(OBSERVED).commits.classes
    mixed = classes["mixed"]
    assert all(mixed.covers(gamma, steps) for gamma, steps in [(0.5, 16), (0.95, 4), (0.7, 4), (0.65, 6), (0.8, 12)])
    assert not any(
        mixed.covers(gamma, steps) for gamma, steps in [(0.49, 16), (0.96, 8), (0.6, 4), (0.8, 3), (0.8, 17)]
    )
    for name in ("math", "code"):
        assert classes[name].covers(0.8, 16)
        assert not any(classes[name].covers(gamma, steps) for gamma, steps in [(0.7, 16), (0.8, 8)])


def test_blocks_beyond_the_measured_ones_are_as_hard_as_the_last_of_them():
    steps = drawn(law(), requests=6000, blocks=20)[0].reshape(6000, 20).mean(axis=0)
    measured = FIGURES.classes["mixed"].blocks
    assert measured == 8
    assert steps[:measured].tolist() == sorted(steps[:measured], reverse=True)
    assert steps[measured:].tolist() == pytest.approx([steps[measured - 1]] * 12, rel=0.04)


@pytest.mark.parametrize("concentration", [1e-6, 1e12])
@pytest.mark.parametrize("slope", [-1e4, 1e4])
@pytest.mark.parametrize("steps", [1, 4, 16])
@pytest.mark.filterwarnings("error")
def test_the_law_holds_at_the_bounds_of_its_figures(concentration, slope, steps):
    figures = Figures(slope, slope, slope, slope, slope, 1e-6, concentration, {"a": Difficulty(slope, 100, 4)})
    extreme = FittedCommits(figures, "a", 0.8, MOST_FITTED, steps)
    blocks = np.arange(50), np.zeros(50, np.int64)
    taken = extreme.steps(0, *blocks)
    assert (taken >= 1).all()
    assert (taken <= steps).all()
    assert extreme.sizes(0, *blocks, taken).sum() == 50 * MOST_FITTED


# ---------------------------------------------------------------------- classes of their own


def figures_with(**more) -> Figures:
    return replace(FIGURES, **more)


def drawn_steps(figures: Figures, class_: str) -> np.ndarray:
    law = FittedCommits(figures, class_, 0.8, 16, 16)
    return law.steps(3, np.arange(40_000), np.zeros(40_000, np.int64))


def test_a_share_of_blocks_is_harder():
    """Blocks are those of the easy law and of one that is lower, in the shares given; none is as if nothing was said."""
    easy, hard = drawn_steps(FIGURES, "math"), drawn_steps(figures_with(hard=1.0, hard_by=2.0), "math")
    mixed = drawn_steps(figures_with(hard=0.25, hard_by=2.0), "math")
    assert hard.mean() > easy.mean() + 2
    expected = 0.75 * easy.mean() + 0.25 * hard.mean()
    assert mixed.mean() == pytest.approx(expected, abs=4 * mixed.std() / 200)
    assert (drawn_steps(figures_with(hard=0.0, hard_by=9.0), "math") == easy).all()


def test_a_class_may_have_parameters_of_its_own():
    math = FIGURES.classes["math"]
    own = replace(math, own={"gamma": 0.1, "concentration": 5.0})
    apart = replace(FIGURES, classes=dict(FIGURES.classes) | {"math": own})
    shared = replace(FIGURES, gamma=0.1, concentration=5.0)
    assert (drawn_steps(apart, "math") == drawn_steps(shared, "math")).all()
    assert (drawn_steps(apart, "code") == drawn_steps(FIGURES, "code")).all()
    assert (drawn_steps(apart, "math") != drawn_steps(FIGURES, "math")).any()
