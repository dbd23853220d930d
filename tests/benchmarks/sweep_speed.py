"""200 points of the Azure conversation trace as a sweep: on one core, on two, and on two Dask workers, each in a process of its
own with an empty cache; not part of CI.

.venv/bin/python tests/benchmarks/sweep_speed.py AZURE_TRACE [ROUNDS] > reports/sweep_speed.md
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

STUDY = {
    "design": {
        "kind": "grid",
        "axes": {
            "scheduler.max_num_seqs": [8, 16, 32, 64, 128],
            "decoding.gamma": [0.5, 0.6, 0.7, 0.8, 0.9],
            "deployment.replicas": [1, 2, 4, 8],
            "deployment.gpu": ["h100-sxm", "h200"],
        },
    },
    "metrics": ["time_to_first_token.p90", "request_latency.p90", "cost.usd_per_million_output_tokens"],
}
POINTS = 200


def study(folder: Path, trace: str) -> Path:
    scenario = {"workload": {"kind": "trace", "path": str(Path(trace).resolve())}}
    (folder / "scenario.yaml").write_text(json.dumps(scenario))
    path = folder / "study.yaml"
    path.write_text(json.dumps(STUDY | {"scenario": "scenario.yaml"}))
    return path


def timed(path: Path, *options: str) -> tuple[float, bytes]:
    """Wall time of the whole command, and what it found."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "twotower_sim", "sweep", str(path), "--no-cache", "--quiet", "--out", out]
        started = time.perf_counter()
        subprocess.run([*command, *options], check=True)
        return time.perf_counter() - started, (Path(out) / "sweep.json").read_bytes()


@contextmanager
def dask_cluster(folder: Path, workers: int):
    """A scheduler and workers as one starts them on a cluster: processes that talk over loopback."""
    with ExitStack() as running:

        def start(*words: str) -> None:
            log = running.enter_context((folder / f"{words[0]}.log").open("w"))
            process = subprocess.Popen([str(Path(sys.executable).parent / "dask"), *words], stdout=log, stderr=log)
            running.callback(process.wait)
            running.callback(process.terminate)

        found = folder / "scheduler.json"
        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(found))
        while not found.exists():
            time.sleep(0.05)
        start("worker", "--scheduler-file", str(found), "--nworkers", str(workers), "--nthreads", "1", "--no-dashboard")
        yield json.loads(found.read_text())["address"]


def main(trace: str, rounds: int = 1) -> None:
    with tempfile.TemporaryDirectory() as name, dask_cluster(Path(name), 2) as address:
        path = study(Path(name), trace)
        ways = {
            "one process": ("--jobs", "1"),
            "two processes": ("--jobs", "2"),
            "two Dask workers": ("--backend", "dask", "--scheduler", address),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        found = set()
        for _ in range(rounds):
            for way, options in ways.items():
                seconds, result = timed(path, *options)
                times[way].append(seconds)
                found.add(result)
                print(f"{way}: {seconds:.1f} s", file=sys.stderr, flush=True)
    (result,) = found
    assert len(json.loads(result)["points"]) == POINTS
    one = times["one process"]
    print(
        f"# {POINTS} points of the Azure conversation trace on two cores\n\n"
        "Made by `python tests/benchmarks/sweep_speed.py AZURE_TRACE` on a shared machine of two cores: 19,366 requests a point,\n"
        f"the whole command each time, nothing cached, {rounds} round{'s' * (rounds > 1)} in turn. All wrote the same `sweep.json`, to the byte.\n\n"
        "| | wall time, s | median | speed-up of each round | median |\n| --- | --- | --- | --- | --- |"
    )
    for way, taken in times.items():
        ups = [a / b for a, b in zip(one, taken, strict=True)]
        print(
            f"| {way} | {', '.join(f'{of:.1f}' for of in taken)} | {median(taken):.1f} "
            f"| {', '.join(f'{of:.2f}' for of in ups)} | {median(ups):.2f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
