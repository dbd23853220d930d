"""Which way imports run, and what importing costs."""

import subprocess
import sys

from conftest import ROOT


def test_imports_run_one_way():
    done = subprocess.run([sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
                          cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_heavy_libraries_wait_until_they_are_needed():
    code = "import sys, twotower_sim.cli, twotower_sim.report; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "triton", "pandas", "scipy", "matplotlib"} & set(loaded)


def test_make_and_readme_say_the_same():
    readme = (ROOT / "README.md").read_text()
    rules = [line.strip() for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]
    assert len(rules) == 2
    assert all(rule in readme for rule in rules)
    assert len(readme.splitlines()) < 200
