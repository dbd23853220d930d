"""The profile of public measurements of the real model.

    python -m calibrate.observed OBSERVED_DIR PROFILE.json [--leave-one-out]

OBSERVED_DIR holds ``h100_block_commits.jsonl`` (commits of every step), ``h100_nfe.csv`` (steps per prompt over gamma
and T) and ``moe_distinct_experts.json``. ``--leave-one-out`` also fits without each configuration in turn and prints
the error of its predicted mean NFE.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from calibrate.commit_fit import (
    Configuration,
    Observations,
    Prompt,
    commit_figures,
    errors,
    figures,
    fit,
    leave_one_out,
)
from twotower_sim.profile import Profile, Provenance, RoutingFigures, save_profile

SETS = {"mixed prompts": "mixed", "math": "math", "code block sweep": "code"}
BLOCKS_OF = {"mixed": 8, "math": 16, "code": 16}
BLOCK_SIZE = 16
START = np.array([-4.0, -2.6, -3.1, 0.3, -0.2, 0.2, 0.8, 0.7, 1.8, -9.0, 1.7, 0.2, 0.0])


def read(folder: Path) -> Observations:
    rows = [row for row in csv.DictReader((folder / "h100_nfe.csv").open()) if row["block_size"] == str(BLOCK_SIZE)]
    groups: dict[tuple[str, float, int, int], dict[str, float]] = {}
    for row in rows:
        blocks = int(row["new_tokens"]) // int(row["block_size"])
        key = (SETS[row["set"]], float(row["gamma"]), int(row["steps_per_block"]), blocks)
        groups.setdefault(key, {})[row["prompt_id"]] = int(row["nfe"]) / blocks
    configurations = [
        Configuration(*at, np.array(list(steps.values())), frozenset(steps)) for at, steps in sorted(groups.items())
    ]
    prompts = []
    for line in (folder / "h100_block_commits.jsonl").read_text().splitlines():
        row = json.loads(line)
        class_ = "code" if "code" in row["domain"] else "math"
        prompts.append(Prompt(class_, row["gamma"], row["steps_per_block"], row["commits_per_pass"], row["prompt_id"]))
    return Observations(BLOCKS_OF, BLOCK_SIZE, prompts, configurations, alike=[("code", "math")])


def profile(x: np.ndarray, seen: Observations, folder: Path) -> Profile:
    moe = json.loads((folder / "moe_distinct_experts.json").read_text())
    within = moe["distinct_experts_first_n_tokens_of_a_block"]
    unions = {int(k) * BLOCK_SIZE: v for k, v in moe["distinct_experts_union_of_k_random_blocks"].items() if int(k) > 1}
    singles = moe["distinct_experts_union_of_k_single_tokens_of_different_blocks"]
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
        commits=commit_figures(x, seen),
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
    x = fit(seen, START)
    save_profile(profile(x, seen, options.observed), options.profile)
    left_out: dict[str, float] = {}
    for left, law in leave_one_out(seen, x) if options.leave_one_out else ():
        left_out |= errors(law, [left], seen.block_size)
    for at, error in errors(figures(x, seen.blocks_of), seen.configurations, seen.block_size).items():
        print(f"{at:28} NFE error {error:+6.1%}", f"left out {left_out[at]:+6.1%}" if left_out else "")


if __name__ == "__main__":
    main()
