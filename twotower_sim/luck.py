"""The commits that a scenario asks for: a law for every gamma that a block may get, and who gets which."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twotower_sim import scenario as ask
from twotower_sim.commits import CommitLaw, ConstantCommits, FittedCommits, PerRequestCommits
from twotower_sim.errors import InputError
from twotower_sim.model import Tower
from twotower_sim.plan import BlockPlans
from twotower_sim.profile import CommitClass, CommitFigures, Profile, Section, load_profile

OBSERVED = "observed-h100"
PUBLISHED = {"nemotron-twotower-30b-a3b": "nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16"}
"""Names under which models of the presets are measured."""
MOST_FITTED = 64  # block size up to which the commit law is tabulated

Decoding = ask.TwoTower | ask.BlockDiffusion


def published_quality(model: str, decoding: Decoding, gamma: float) -> float | None:
    """Share of the autoregressive baseline's aggregate quality that a threshold keeps, where it is published (arXiv
    2606.26493: 98.7 % at gamma 0.8 in blocks of 16 with up to 16 steps); None elsewhere."""
    point = decoding.kind, decoding.block_size, decoding.steps_per_block, gamma
    return 0.987 if model in PUBLISHED and point == ("two_tower", 16, 16, 0.8) else None


def quality_of(scenario: ask.Scenario) -> float | None:
    """The least share of the autoregressive model's quality that any of its requests gets; None where it is not
    published."""
    decoding = scenario.decoding
    if isinstance(decoding, ask.MockAr):
        return None
    if not isinstance(decoding, Decoding):
        return 1.0  # the model itself; drafts are verified
    known = [published_quality(scenario.model, decoding, gamma) for gamma in decoding.gammas]
    return None if None in known else min(of for of in known if of is not None)


@dataclass(frozen=True)
class BlockLuck:
    """The luck of all blocks at every gamma; a *level* is an index into ``gammas``, which rise."""

    gammas: list[float]
    base: np.ndarray  # level of each request by its class
    queue: list[tuple[int, int]]  # (waiting, level): from so many waiting requests on at most that level; rising
    plans: BlockPlans  # of all requests at their base level
    by_level: list[BlockPlans]

    def steps(self, request: int, level: int) -> list[int]:
        """Denoise steps of the blocks of a request at a level."""
        return self.by_level[level].steps(request)

    def level(self, request: int, waiting: int) -> int:
        """Level of a block that starts while ``waiting`` requests wait."""
        level = int(self.base[request])
        for least, most in reversed(self.queue):
            if waiting >= least:
                return min(level, most)
        return level


def luck_of(
    scenario: ask.Scenario,
    decoding: Decoding,
    tower: Tower,
    base: Path,
    output_tokens: np.ndarray,
    classes: np.ndarray,
    warnings: list[str],
) -> tuple[BlockLuck, str]:
    """All luck of a run and its provenance; ``classes`` is each request's index into ``workload.class_names``."""
    gammas = decoding.gammas
    laws, source = _laws(scenario, decoding, tower, base, output_tokens, warnings)
    by_level = [BlockPlans(law, scenario.seed, output_tokens) for law in laws]
    of_class = [decoding.gamma_by_class.get(name, decoding.gamma) for name in scenario.workload.class_names or [""]]
    levels = np.array([gammas.index(gamma) for gamma in of_class])[classes]
    policy = decoding.gamma_policy
    queue = []
    if isinstance(policy, ask.GammaByQueue):
        queue = [(level.waiting, gammas.index(level.gamma)) for level in policy.levels]
    used = sorted(set(levels.tolist()))
    plans = by_level[used[0]]
    if len(used) > 1:
        plans = BlockPlans(PerRequestCommits(laws, levels), scenario.seed, output_tokens)
    return BlockLuck(gammas, levels, queue, plans, by_level), source


def load_section(section: Section, name: str, base: Path, warnings: list[str]) -> Profile:
    """A profile by name or path, with a warning where random weights make that section no checkpoint's."""
    profile = load_profile(name, base)
    if profile.of(section).weights == "random":
        warnings.append(f"{section} of {name}: with random weights, so its routing and commits are no checkpoint's")
    return profile


def _laws(
    scenario: ask.Scenario,
    decoding: Decoding,
    tower: Tower,
    base: Path,
    output_tokens: np.ndarray,
    warnings: list[str],
) -> tuple[list[CommitLaw], str]:
    """The law of commits at every gamma of the scenario, and where its figures are from."""
    commits = scenario.commits
    if isinstance(commits, ask.ConstantCommits):
        try:
            constant = ConstantCommits(commits.tokens_per_step, decoding.block_size, decoding.most_steps)
        except ValueError as error:
            raise InputError(f"commits.tokens_per_step: {error}") from None
        return [constant] * len(decoding.gammas), "given: constant tokens_per_step in the scenario"
    name = _profile_of(scenario)
    profile = load_section("commits", name, base, warnings)
    figures = profile.commits
    if figures is None:
        raise InputError(f"{name}: the profile holds no commits")
    if commits.class_ not in figures.classes:
        raise InputError(f"commits.class: found {commits.class_!r}; {name} has {', '.join(figures.classes)}")
    for gamma in decoding.gammas:
        _check_point(commits, figures, gamma, decoding, warnings)
    of = figures.classes[commits.class_]
    if beyond := _share_beyond(output_tokens, decoding.block_size, of.blocks):
        warnings.append(
            f"{beyond:.0%} of all blocks come after the {of.blocks} of an answer that were measured for class "
            f"{commits.class_}; they are taken to be as hard as the last of these"
        )
    source = profile.of("commits")
    if source.model not in (tower.name, PUBLISHED.get(scenario.model)):
        warnings.append(f"commits were {source.kind} on {source.model}, not on {tower.name}")
    if decoding.block_size > MOST_FITTED:
        raise InputError(
            f"decoding.block_size: found {decoding.block_size}; beyond {MOST_FITTED} use commits.kind constant"
        )
    return [
        FittedCommits(figures.figures(), commits.class_, gamma, decoding.block_size, decoding.most_steps)
        for gamma in decoding.gammas
    ], str(source)


def _profile_of(scenario: ask.Scenario) -> str:
    if not isinstance(scenario.commits, ask.ProfileCommits):
        return OBSERVED
    shared = scenario.latency.path if isinstance(scenario.latency, ask.ProfileLatency) else ""
    return scenario.commits.path or shared  # the scenario's validator sees to it that there is one


def _check_point(
    commits: ask.ObservedCommits | ask.ProfileCommits,
    figures: CommitFigures,
    gamma: float,
    decoding: Decoding,
    warnings: list[str],
) -> None:
    """Raises InputError, or warns, where an operating point was not measured."""
    outside = _outside(figures.block_size, figures.classes[commits.class_], commits.class_, gamma, decoding)
    if outside and not commits.extrapolate:
        raise InputError(f"{outside}; set commits.extrapolate to go beyond")
    if outside:
        warnings.append(f"commits are extrapolated: {outside}")


def _outside(block_size: int, of: CommitClass, name: str, gamma: float, decoding: Decoding) -> str:
    """What of an operating point was not measured for a class of commits; empty if all was."""
    if decoding.block_size != block_size:
        return f"decoding.block_size: found {decoding.block_size}; commits were measured at {block_size}"
    if of.covers(gamma, decoding.steps_per_block):
        return ""
    points = ", ".join(f"({known:g}, {steps})" for known, steps in of.points)
    found = f"decoding.gamma {gamma:g} with steps_per_block {decoding.steps_per_block}"
    return f"{found}: class {name} was measured at (gamma, steps) {points}, and this lies not between"


def _share_beyond(output_tokens: np.ndarray, block_size: int, measured: int) -> float:
    blocks = -(-output_tokens // block_size)
    return float(np.maximum(blocks - measured, 0).sum() / blocks.sum())
