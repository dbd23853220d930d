"""Every kernel compiles for GPUs that are not here, at the real model's shapes, and spills nothing."""

import json
import os
import subprocess
import sys

import pytest

KERNELS = {
    "_attention_kernel",
    "_combine_kernel",
    "_conv_kernel",
    "_scan_kernel",
    "_decay_kernel",
    "_state_kernel",
    "_chunk_kernel",
    "_experts_kernel",
    "_norm_kernel",
    "_top_kernel",
    "_merge_kernel",
    "_commit_kernel",
}
SCRIPT = """
import dataclasses, json, sys
from calibrate.kernels.ahead_of_time import usages
print(json.dumps([dataclasses.asdict(usage) | {"fits": usage.fits} for usage in usages(sys.argv[1])]))
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_fit(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {usage["kernel"] for usage in found} == KERNELS
    assert [usage for usage in found if not usage["fits"]] == []
    assert all(usage["registers"] > 0 for usage in found)
