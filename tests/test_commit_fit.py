"""The fit of the commit law to public measurements, and how far its figures can be trusted."""

import numpy as np
import pytest

from calibrate.commit_fit import CLASSES, PARAMETERS, Observations, errors, figures, fit, loss, read, steps_moments
from twotower_sim.commits import steps_ahead
from twotower_sim.profile import load_profile
from twotower_sim.simulation import OBSERVED


@pytest.fixture(scope="module")
def seen(data) -> Observations:
    return read(data / "observed")


def shipped() -> np.ndarray:
    """The figures of the shipped profile, as the optimiser sees them."""
    law = load_profile(OBSERVED).commits.figures()
    values = [getattr(law, name) for name in PARAMETERS]
    classes = [law.classes[name] for name in CLASSES]
    sds = np.log([of.sd for of in classes])
    return np.array([*(of.mean for of in classes), *sds, *values[:5], *np.log(values[5:])])


def test_what_was_measured(seen):
    assert len(seen.configurations) == 12
    assert len(seen.prompts) == 5
    assert sum(len(prompt.blocks) for prompt in seen.prompts) == 44
    at = next(c for c in seen.configurations if str(c) == "mixed gamma 0.8 T 16")
    assert at.steps.mean() == pytest.approx(10.54, abs=0.01)


def test_the_shipped_figures_are_the_fit(seen):
    """No direction leads downhill from them, beyond their rounding to four digits."""
    x, best = shipped(), loss(shipped(), seen)
    for i in range(len(x)):
        for step in (-0.05, 0.05):
            moved = x.copy()
            moved[i] += step
            assert loss(moved, seen) > best - 1e-3


def test_mean_nfe_of_every_configuration(seen):
    assert max(abs(error) for error in errors(figures(shipped()), seen.configurations).values()) < 0.05
    listed = load_profile(OBSERVED).commits.fit
    for key, error in errors(figures(shipped()), seen.configurations).items():
        assert listed[f"NFE error, {key}"] == pytest.approx(error, abs=2e-3)


def test_spread_between_prompts_is_of_the_observed_size(seen):
    law = figures(shipped())
    ratios = []
    for at in seen.configurations:
        ahead = steps_ahead(law.commit_tables(16, at.steps_per_block))[0, :, 16]
        ratios.append(steps_moments(law, at, ahead)[1] ** 0.5 / at.steps.std(ddof=1))
    assert 0.7 < np.exp(np.mean(np.log(ratios))) < 1.4


def test_the_default_point_is_predicted_without_it(seen):
    """Within 10 % of its mean NFE; all configurations: ``python -m calibrate.commit_fit … --leave-one-out``."""
    left_out = "mixed gamma 0.8 T 16"
    at = next(c for c in seen.configurations if str(c) == left_out)
    rest = Observations([c for c in seen.configurations if c is not at], seen.prompts)
    refitted = fit(rest, shipped())
    assert not np.allclose(refitted, shipped(), atol=1e-3)  # it did learn without it
    assert abs(errors(figures(refitted), [at])[left_out]) < 0.10
