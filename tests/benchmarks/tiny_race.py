"""Wall time of the tiny two-tower against its own context tower, on this CPU; not part of CI.

.venv/bin/python tests/benchmarks/tiny_race.py > reports/tiny_race.md
"""

import statistics
import time
from collections.abc import Callable

import torch

from calibrate.checkpoint import load
from calibrate.generate import autoregressive, two_tower
from calibrate.prompts import read_prompts
from calibrate.tiny import FOLDER
from calibrate.tokens import Bytes

NEW_TOKENS, GAMMA, STEPS, RUNS = 192, 0.8, 16, 5


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    model = load(FOLDER, cpu, cpu, torch.float32)
    prompts = read_prompts(FOLDER / "prompts.jsonl")
    print("# The tiny two-tower against its own context tower\n")
    print(
        f"Wall time of {NEW_TOKENS} new tokens, prompts of 128 bytes, greedy, gamma {GAMMA}, T {STEPS}, fp32 on one core; medians of"
    )
    print(
        f"{RUNS} interleaved pairs; measured by `python tests/benchmarks/tiny_race.py`. Bits a byte and answers at each gamma and T:"
    )
    print("`twotower-sim profile show reports/tiny-cpu.profile.json.gz`.\n")
    print("| prompts | batch | NFE a block | two towers, s | autoregressive, s | speed-up | of pairs |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for class_ in sorted({prompt.class_ for prompt in prompts}, reverse=True):
        ids = [torch.tensor(Bytes().encode(prompt.prompt)) for prompt in prompts if prompt.class_ == class_]
        for batch in (1, 2, 4, 8, 16):
            pairs, steps = [], []
            for run in range(RUNS):
                part = [ids[(run * batch + i) % len(ids)] for i in range(batch)]
                made = two_tower(model, part, NEW_TOKENS, GAMMA, STEPS)
                steps += [len(block) for sequence in made for block in sequence.blocks]
                two = seconds(lambda part=part: two_tower(model, part, NEW_TOKENS, GAMMA, STEPS))
                pairs.append((two, seconds(lambda part=part: autoregressive(model, part, NEW_TOKENS))))
            two_s, alone_s = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratios = sorted(alone / two for two, alone in pairs)
            row = class_, batch, f"{statistics.mean(steps):.2f}", f"{two_s:.2f}", f"{alone_s:.2f}"
            spread = f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print("| " + " | ".join(map(str, row + spread)) + " |", flush=True)


if __name__ == "__main__":
    main()
