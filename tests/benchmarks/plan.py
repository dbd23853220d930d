"""Plans for traffic as Azure had it and for ten times as much: python tests/benchmarks/plan.py > reports/plan.md. Some
minutes."""

import json
import tempfile
from pathlib import Path

from twotower_sim.plan_report import plan_and_report
from twotower_sim.result_cache import ResultCache
from twotower_sim.workers import Workers

PLAN = Path(__file__).parents[2] / "scenarios" / "plans" / "azure_conversation.yaml"


def show(times: int, requests: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"workload.rate_scale={times}", f"workload.requests={requests}"]
        plan_and_report(PLAN, overrides, Path(folder) / "out", ResultCache(Path(folder) / "cache"), Workers(), quiet=True)
        found = json.loads((Path(folder) / "out" / "plan.json").read_text())
    names = list(found["plan"]["objectives"])
    print(f"## {times} x the traffic\n\n{found['answer']}", end="")
    if load := found["load"]:
        print(f" It bears {load['bears']:.2f} times that load and breaks at {load['breaks']:.2f}.", end="")
    if fewer := found["one_replica_fewer"]:
        state = "/".join(dict.fromkeys(fewer["saturation"]))
        figures = ", ".join(f"{name} {of['mean']:,.0f} ms" for name, of in fewer["objectives"].items())
        print(f" One replica fewer is {state}" + (f": {figures}." if state == "STABLE" else "."), end="")
    print(f"\n\n| fewest replicas of | replicas | GPUs | $/h | {' | '.join(f'{name}, ms' for name in names)} |")
    print("| --- |" + " --- |" * (3 + len(names)))
    for of in found["candidates"]:
        figures = [
            f"{of['objectives'][name]['mean']:,.0f} ± {of['objectives'][name]['high'] - of['objectives'][name]['mean']:,.0f}"
            for name in names
        ]
        print(
            f"| {of['candidate']} | {of['replicas']} | {of['gpus']} | {of['usd_per_hour']:.2f} | {' | '.join(figures)} |"
        )
    for name, why in found["given_up"].items():
        print(f"\nGiven up: {name}: {why.partition('. ')[0]}.")
    print()


def main() -> None:
    print(
        "# The least costly deployment for traffic as Azure had it\n\n"
        "Made by `python tests/benchmarks/plan.py` from `scenarios/plans/azure_conversation.yaml`: load drawn from the shipped fingerprint,\n"
        "three seeds, objectives to be met at the bad end of the 95 % interval. Passes are modelled (roofline on each GPU), commits observed,\n"
        "acceptance of drafts given, prices those of the GPU files.\n"
    )
    for times, requests in ((1, 3000), (10, 6000)):
        show(times, requests)


if __name__ == "__main__":
    main()
