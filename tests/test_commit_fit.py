"""The fit of the commit law to public measurements, and how far its figures can be trusted."""

from dataclasses import replace

import numpy as np
import pytest

from calibrate.commit_fit import (
    HARD,
    PARAMETERS,
    Configuration,
    Likelihood,
    Observations,
    Prompt,
    errors,
    figures,
    fit,
    fit_alone,
    loss,
    steps_moments,
    together,
    vector,
)
from calibrate.observed import BLOCKS_OF, read
from twotower_sim.commits import FittedCommits, steps_ahead
from twotower_sim.luck import OBSERVED
from twotower_sim.profile import load_profile


@pytest.fixture(scope="module")
def seen(data) -> Observations:
    return read(data / "observed")


def shipped() -> np.ndarray:
    """The figures of the shipped profile, as the optimiser sees them."""
    return vector(load_profile(OBSERVED).commits.figures())


def law():
    return figures(shipped(), BLOCKS_OF)


def test_what_was_measured(seen):
    assert len(seen.configurations) == 12
    assert len(seen.prompts) == 5
    assert sum(len(prompt.blocks) for prompt in seen.prompts) == 44
    at = next(c for c in seen.configurations if str(c) == "mixed gamma 0.8 T 16")
    assert at.steps.mean() == pytest.approx(10.54, abs=0.01)


def test_the_shipped_figures_are_the_fit(seen):
    """No direction leads downhill from them, beyond their rounding to four digits."""
    x, likelihood = shipped(), Likelihood(seen)
    best = loss(x, seen, likelihood)
    for i in range(len(x)):
        for step in (-0.05, 0.05):
            moved = x.copy()
            moved[i] += step
            assert loss(moved, seen, likelihood) > best - 1e-3


def test_mean_nfe_of_every_configuration(seen):
    assert max(abs(error) for error in errors(law(), seen.configurations, 16).values()) < 0.05
    listed = load_profile(OBSERVED).commits.fit
    for key, error in errors(law(), seen.configurations, 16).items():
        assert listed[f"NFE error, {key}"] == pytest.approx(error, abs=2e-3)


def test_spread_between_prompts_is_of_the_observed_size(seen):
    ratios = []
    for at in seen.configurations:
        ahead = steps_ahead(law().commit_tables(16, at.steps_per_block))[0, :, 16]
        ratios.append(steps_moments(law(), at, ahead)[1] ** 0.5 / at.steps.std(ddof=1))
    assert 0.7 < np.exp(np.mean(np.log(ratios))) < 1.4


def test_the_default_point_is_predicted_without_it(seen):
    """Within 10 % of its mean NFE; all configurations: ``python -m calibrate.observed … --leave-one-out``."""
    left_out = "mixed gamma 0.8 T 16"
    at = next(c for c in seen.configurations if str(c) == left_out)
    rest = replace(seen, configurations=[c for c in seen.configurations if c is not at])
    refitted = fit(rest, shipped())
    assert not np.allclose(refitted, shipped(), atol=1e-3)  # it did learn without it
    assert abs(errors(figures(refitted, BLOCKS_OF), [at], 16)[left_out]) < 0.10


def test_the_fit_finds_the_law_that_commits_were_drawn_from():
    """Two classes at two thresholds, from step sizes alone."""
    truth = law()
    prompts = []
    for class_ in ("math", "code"):
        for gamma in (0.6, 0.9):
            drawn = FittedCommits(truth, class_, gamma, 16, 16)
            requests, blocks = np.repeat(np.arange(60), 8), np.tile(np.arange(8), 60)
            steps = drawn.steps(7, requests, blocks)
            ends = np.cumsum(steps)
            sizes = np.split(drawn.sizes(7, requests, blocks, steps), ends[:-1])
            lists = [part.tolist() for part in sizes]
            prompts += [Prompt(class_, gamma, 16, lists[8 * i : 8 * i + 8]) for i in range(60)]
    seen = Observations({"math": 8, "code": 8}, 16, prompts)
    found = figures(fit(seen), seen.blocks_of)
    assert max(map(abs, errors(found, seen.totals(), 16).values())) < 0.03
    assert found.classes["math"].mean - found.classes["code"].mean == pytest.approx(
        truth.classes["math"].mean - truth.classes["code"].mean, abs=0.3
    )


def test_one_class_alone_finds_its_hard_blocks():
    """A law whose blocks are now and then hard comes back with its mean and its spread of steps; two classes go into
    one section, each as it was fitted."""
    alone = []
    for class_, hard in (("math", 0.1), ("code", 0.0)):
        truth = replace(law(), hard=hard, hard_by=2.0)
        drawn = FittedCommits(truth, class_, 0.8, 16, 16)
        requests, blocks = np.repeat(np.arange(80), 6), np.tile(np.arange(6), 80)
        steps = drawn.steps(5, requests, blocks)
        lists = [part.tolist() for part in np.split(drawn.sizes(5, requests, blocks, steps), np.cumsum(steps)[:-1])]
        found = fit_alone([Prompt(class_, 0.8, 16, lists[6 * i : 6 * i + 6]) for i in range(80)], 16)
        again = FittedCommits(found.figures(), class_, 0.8, 16, 16).steps(6, np.arange(20_000), np.zeros(20_000, int))
        first = drawn.steps(6, np.arange(20_000), np.zeros(20_000, int))
        assert again.mean() == pytest.approx(first.mean(), rel=0.05)
        assert again.std() == pytest.approx(first.std(), rel=0.1)
        alone.append(found)
    both = together(alone)
    for one, name in zip(alone, ("math", "code"), strict=True):
        mine = both.figures().of(name)
        assert {p: getattr(mine, p) for p in PARAMETERS + HARD} == {p: getattr(one, p) for p in PARAMETERS + HARD}


def test_a_configuration_is_left_out_with_the_prompts_that_are_in_it():
    at = Configuration("math", 0.8, 16, 16, np.array([5.0, 6.0]), frozenset({"a", "b"}))
    prompts = [Prompt("math", 0.8, 16, [[16]], name) for name in ("a", "b", "c")] + [
        Prompt("code", 0.8, 16, [[16]], "a")
    ]
    left = Observations({"math": 1, "code": 1}, 16, prompts, [at]).without(at)
    assert not left.configurations
    assert [(prompt.class_, prompt.name) for prompt in left.prompts] == [("math", "c"), ("code", "a")]
