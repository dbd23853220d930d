"""Time and memory over the number of two-tower requests on four replicas; not part of CI.

.venv/bin/python tests/benchmarks/scaling.py [REQUESTS ...]
"""

import os
import subprocess
import sys
import tempfile
import time

SCENARIO = """\
workload:
  kind: synthetic
  requests: REQUESTS
  arrivals: {kind: poisson, rate_rps: 60}
  input_tokens: {kind: lognormal, mean: 1024, cv: 1}
  output_tokens: {kind: lognormal, mean: 256, cv: 0.7}
deployment: {gpu: b200, replicas: 4, placement: {kind: colocated}}
scheduler: {max_num_seqs: 256}
"""


def main() -> None:
    counts = [int(count) for count in sys.argv[1:]] or [23_000, 230_000, 2_300_000]
    for requests in counts:
        with tempfile.TemporaryDirectory() as folder:
            with open(f"{folder}/s.yaml", "w") as file:
                file.write(SCENARIO.replace("REQUESTS", str(requests)))
            command = [sys.executable, "-m", "twotower_sim", "run", f"{folder}/s.yaml", "--out", folder, "--quiet"]
            started = time.perf_counter()
            process = subprocess.Popen(command)
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - started
        assert status == 0
        per_request = f"{1e6 * wall / requests:.1f} us a request"
        print(f"{requests:>9,} requests: {wall:6.1f} s, {per_request}, {usage.ru_maxrss / 1024:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
