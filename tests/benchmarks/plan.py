"""Plans for the Azure conversation trace and for one ten times as fast; a report and pictures of its
pages, which take Chromium; not part of CI. Some minutes.

.venv/bin/python tests/benchmarks/plan.py AZURE_TRACE > reports/plan.md
"""

import base64
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser import chromium
from browser import show as browser_shows

ROOT = Path(__file__).parents[2]
REQUESTS = 6000  # the first 18 minutes
PLAN = ROOT / "scenarios" / "plans" / "azure_conversation.yaml"


def planned(trace: Path, times: int) -> dict:
    """The shipped plan on the trace; a picture of its page goes to reports."""
    name = f"plan_{times}x"
    workload = {"kind": "trace", "path": trace.name, "rate_scale": times, "limit": REQUESTS}
    asked = yaml.safe_load(PLAN.read_text()) | {"scenario": "scenario.yaml", "set": {"workload": workload}}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        shutil.copy(ROOT / "scenarios" / "quickstart.yaml", here / "scenario.yaml")
        (here / trace.name).symlink_to(trace.resolve())
        (here / f"{name}.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
        command = ["plan", f"{name}.yaml", "--out", "out", "--html", f"{name}.html", "--quiet"]
        subprocess.run([sys.executable, "-m", "twotower_sim", *command], cwd=here, check=True)
        photograph(here / f"{name}.html", ROOT / "reports" / f"{name}.png")
        return json.loads((here / "out" / "plan.json").read_text())


def photograph(page: Path, picture: Path) -> None:
    """The page down to where its candidates begin."""
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        browser_shows(browser, page)
        height = browser.execute_script("return document.getElementById('candidates').getBoundingClientRect().top")
        clip = {"x": 0, "y": 0, "width": 1280, "height": height, "scale": 1}
        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    picture.write_bytes(base64.b64decode(taken["data"]))


def show(times: int, found: dict) -> None:
    names = list(found["plan"]["objectives"])
    print(f"## {times} x the traffic\n\n{found['answer']}", end="")
    if load := found["load"]:
        print(f" It bears {load['bears']:.2f} times that load and breaks at {load['breaks']:.2f}.", end="")
    if fewer := found["one_replica_fewer"]:
        state = "/".join(dict.fromkeys(fewer["saturation"]))
        figures = ", ".join(f"{name} {of['mean']:,.0f} ms" for name, of in fewer["objectives"].items())
        print(f" One replica fewer is {state}" + (f": {figures}." if state == "STABLE" else "."), end="")
    print(
        f" \n\n![Its page](plan_{times}x.png)\n\n| fewest replicas of | replicas | GPUs | $/h | {', ms | '.join(names)}, ms |"
    )
    print("| --- |" + " --- |" * (3 + len(names)))
    for of in found["cheapest"]:
        figures = [interval(of["objectives"][name]) for name in names]
        cells = [of["candidate"], str(of["replicas"]), str(of["gpus"]), f"{of['usd_per_hour']:.2f}", *figures]
        print(f"| {' | '.join(cells)} |")
    print(
        f"\n{len(found['candidates'])} candidates meet the objectives, {len(found['dearer'])} cost more than others of their kind."
    )
    for name, why in found["given_up"].items():
        print(f"Given up: {name}: {why.partition('. ')[0]}.")
    print()


def interval(of: dict) -> str:
    return f"{of['mean']:,.0f} ± {of['high'] - of['mean']:,.0f}"


def main(trace: str) -> None:
    print(
        "# The least costly deployment for the Azure conversation trace\n\n"
        "Made by `python tests/benchmarks/plan.py AZURE_TRACE` from `scenarios/plans/azure_conversation.yaml` with the first 6,000 requests of\n"
        "the trace (18 minutes), three seeds (which draw commits and acceptance), objectives to be met at the bad end of the 95 % interval. Passes are modelled\n"
        "(roofline on each GPU), commits observed, acceptance of drafts given, prices those of the GPU files. Rows: the cheapest on each GPU type\n"
        "with each way of decoding. The pages themselves come with `--html`.\n"
    )
    for times in (1, 10):
        show(times, planned(Path(trace), times))


if __name__ == "__main__":
    main(sys.argv[1])
