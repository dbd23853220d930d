"""Fit the commit law to public measurements of the real model and write them as a profile.

    python -m calibrate.commit_fit OBSERVED_DIR PROFILE.json [--leave-one-out]

OBSERVED_DIR holds ``h100_block_commits.jsonl`` (commits of every step: maximum likelihood), ``h100_nfe.csv``
(steps per prompt over gamma and T: means, with their standard errors, and variances) and
``moe_distinct_experts.json``. ``--leave-one-out`` also fits without each configuration in turn and prints the
error of its predicted mean NFE.
"""

import argparse
import csv
import json
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from twotower_sim.commits import DIFFICULTIES, Difficulty, Figures, steps_ahead
from twotower_sim.profile import CommitClass, CommitFigures, Profile, Provenance, RoutingFigures

SETS = {"mixed prompts": "mixed", "math": "math", "code block sweep": "code"}
CLASSES = ("mixed", "math", "code")
BLOCK_SIZE = 16
MEASURED_BLOCKS = {"mixed": 8, "math": 16, "code": 16}
PARAMETERS = ("gamma", "committed", "steps", "steps_committed", "block", "block_sd", "concentration")
START = np.array([-4.0, -2.6, -3.1, 0.3, -0.2, 0.2, 0.8, 0.7, 1.8, -9.0, 1.7, 0.2, 0.0])


@dataclass(frozen=True)
class Configuration:
    """Prompts of one class at one operating point; ``steps`` is each prompt's mean steps a block."""

    class_: str
    gamma: float
    steps_per_block: int
    blocks: int
    steps: np.ndarray

    def __str__(self) -> str:
        return f"{self.class_} gamma {self.gamma:g} T {self.steps_per_block}"


@dataclass(frozen=True)
class Prompt:
    """The sizes of one prompt's commits, a list for each block."""

    class_: str
    gamma: float
    steps_per_block: int
    blocks: list[list[int]]


@dataclass(frozen=True)
class Observations:
    configurations: list[Configuration]
    prompts: list[Prompt]


def read(folder: Path) -> Observations:
    rows = [row for row in csv.DictReader((folder / "h100_nfe.csv").open()) if row["mode"] == "diff"]
    groups: dict[tuple[str, float, int, int], list[float]] = {}
    for row in rows:
        blocks = int(row["new_tokens"]) // int(row["block_size"])
        key = (SETS[row["set"]], float(row["gamma"]), int(row["steps_per_block"]), blocks)
        groups.setdefault(key, []).append(int(row["nfe"]) / blocks)
    prompts = []
    for line in (folder / "h100_block_commits.jsonl").read_text().splitlines():
        row = json.loads(line)
        class_ = "code" if "code" in row["domain"] else "math"
        prompts.append(Prompt(class_, row["gamma"], row["steps_per_block"], row["commits_per_pass"]))
    configurations = [
        Configuration(class_, gamma, steps_per_block, blocks, np.array(steps))
        for (class_, gamma, steps_per_block, blocks), steps in sorted(groups.items())
    ]
    return Observations(configurations, prompts)


def figures(x: np.ndarray) -> Figures:
    """Parameters as the optimiser sees them: standard deviations and the concentration as logarithms."""
    sds = np.exp(x[3:6])
    classes = {
        name: Difficulty(float(mean), float(sd), MEASURED_BLOCKS[name])
        for name, mean, sd in zip(CLASSES, x[:3], sds, strict=True)
    }
    values = [*x[6:11], *np.exp(x[11:13])]
    parameters = {name: float(value) for name, value in zip(PARAMETERS, values, strict=True)}
    return Figures(classes=classes, **parameters)


def steps_moments(law: Figures, at: Configuration, ahead: np.ndarray) -> tuple[float, float]:
    """Mean over requests of the steps a block, and the variance between requests' means."""
    weights = law.level_weights(law.level_means(at.class_, at.gamma, at.steps_per_block)[:, : at.blocks])
    counts = np.arange(at.steps_per_block + 1)
    first, second = weights @ (ahead @ counts), weights @ (ahead @ counts**2)
    of_request = first.mean(axis=1)
    return float(of_request.mean()), float(of_request.var() + (second - first**2).mean() / at.blocks)


def log_likelihood(law: Figures, prompts: list[Prompt], tables: dict[int, np.ndarray]) -> float:
    """Of all commit sizes, with the difficulties of requests and blocks integrated out."""
    total = 0.0
    for prompt in prompts:
        table, size = tables[prompt.steps_per_block], BLOCK_SIZE
        weights = law.level_weights(law.level_means(prompt.class_, prompt.gamma, prompt.steps_per_block))
        by_difficulty = np.zeros(len(DIFFICULTIES))
        for b, sizes in enumerate(prompt.blocks):
            masked = size - np.cumsum([0, *sizes[:-1]])
            chance = np.prod(table[np.arange(len(sizes)), :, masked, sizes], axis=0)  # by level
            by_difficulty += np.log(weights[:, min(b, weights.shape[1] - 1)] @ chance)
        total += np.logaddexp.reduce(by_difficulty) - log(len(DIFFICULTIES))
    return float(total)


def loss(x: np.ndarray, seen: Observations) -> float:
    """Negative log-likelihood of the steps, plus Gaussian errors of means and log variances of the totals, plus a
    weak prior that code prompts vary as math prompts do."""
    law = figures(x)
    used = {at.steps_per_block for at in seen.configurations} | {at.steps_per_block for at in seen.prompts}
    tables = {steps: law.commit_tables(BLOCK_SIZE, steps) for steps in used}
    ahead = {steps: steps_ahead(table)[0, :, BLOCK_SIZE] for steps, table in tables.items()}
    total = -log_likelihood(law, seen.prompts, tables)
    for at in seen.configurations:
        mean, variance = steps_moments(law, at, ahead[at.steps_per_block])
        observed = at.steps.var(ddof=1)
        total += (mean - at.steps.mean()) ** 2 / (2 * max(observed, 0.3) / len(at.steps))
        total += len(at.steps) / 8 * log(variance / observed) ** 2
    sds = np.exp(x[3:6])
    return total + 0.5 * (sds[2] - sds[1]) ** 2


def fit(seen: Observations, start: np.ndarray = START) -> np.ndarray:
    return minimize(loss, start, args=(seen,), method="L-BFGS-B", options={"maxiter": 200}).x


def errors(law: Figures, configurations: list[Configuration]) -> dict[str, float]:
    """Relative error of the mean NFE of each configuration."""
    out = {}
    for at in configurations:
        ahead = steps_ahead(law.commit_tables(BLOCK_SIZE, at.steps_per_block))[0, :, BLOCK_SIZE]
        out[str(at)] = steps_moments(law, at, ahead)[0] / float(at.steps.mean()) - 1
    return out


def leave_one_out(seen: Observations, start: np.ndarray) -> dict[str, float]:
    """The same with the configuration left out of the fit. A class measured at one operating point only has
    nothing left to be fitted to but its step sizes."""
    out: dict[str, float] = {}
    for left in seen.configurations:
        rest = [at for at in seen.configurations if at is not left]
        out |= errors(figures(fit(Observations(rest, seen.prompts), start)), [left])
    return out


def profile(x: np.ndarray, seen: Observations, folder: Path) -> Profile:
    law, operating = figures(x), seen.configurations
    moe = json.loads((folder / "moe_distinct_experts.json").read_text())
    within = moe["distinct_experts_first_n_tokens_of_a_block"]
    unions = {int(k) * BLOCK_SIZE: v for k, v in moe["distinct_experts_union_of_k_random_blocks"].items() if int(k) > 1}
    singles = moe["distinct_experts_union_of_k_single_tokens_of_different_blocks"]
    classes = {
        name: CommitClass(
            mean=round(of.mean, 4),
            sd=round(of.sd, 4),
            blocks=of.blocks,
            points=[(at.gamma, at.steps_per_block) for at in operating if at.class_ == name],
        )
        for name, of in law.classes.items()
    }
    tables = {16: law.commit_tables(BLOCK_SIZE, 16)}
    parameters = {name: round(getattr(law, name), 4) for name in PARAMETERS}
    forwards = sum(len(sizes) for prompt in seen.prompts for sizes in prompt.blocks)
    return Profile(
        provenance=Provenance(
            kind="observed",
            source="github junze-eng/twotower-repro: NFE per prompt, commits per pass and gate records",
            device="2 x H100 80 GB",
            model="nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16",
            date="2026-11",
            notes=[
                "math and code were measured at gamma 0.8, T 16 only; elsewhere they would shift as mixed does",
                "mixed was measured on the first 128 tokens of answers, math and code on 256",
                "math prompts ran past their answers, so their late blocks are easier than an answer's",
                "experts were counted on three math prompts: lower bounds for a mixed batch",
            ],
        ),
        commits=CommitFigures(
            **parameters,
            block_size=BLOCK_SIZE,
            classes=classes,
            fit={f"log-likelihood of {forwards} steps": round(log_likelihood(law, seen.prompts, tables), 2)}
            | {f"NFE error, {key}": round(value, 4) for key, value in errors(law, operating).items()},
        ),
        routing=RoutingFigures(
            experts=128, experts_per_token=6, blocks={int(k): v for k, v in within.items()} | unions, singles=singles
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("observed", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--leave-one-out", action="store_true")
    options = parser.parse_args()
    seen = read(options.observed)
    x = fit(seen)
    written = profile(x, seen, options.observed)
    options.profile.write_text(written.model_dump_json(indent=1, exclude_none=True) + "\n", encoding="utf-8")
    left_out = leave_one_out(seen, x) if options.leave_one_out else {}
    for at, error in errors(figures(x), seen.configurations).items():
        print(f"{at:28} NFE error {error:+6.1%}", f"left out {left_out[at]:+6.1%}" if left_out else "")


if __name__ == "__main__":
    main()
