"""TRL's own tests of its GRPOTrainer, with the import swapped: which of them pass with this trainer in its place?

    git clone --depth 1 https://github.com/huggingface/trl
    python -m benchmarks.trl_suite trl/tests

Needs `pip install "grpo_hf[benchmarks,dev]"`. Text tests only, run once with TRL's trainer and once with ours; what does not
pass with TRL's says nothing and is left out. The hub is not needed: models of the same architectures with random weights,
and data sets with the same columns, are made on the spot under the names that the tests load. The result is in
benchmarks/results/trl_suite.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import trl

RESULT = Path(__file__).parent / "results" / "trl_suite.json"
LEFT_OUT = "not VLM and not vlm and not multimodal and not Slow and not TransformersContinuousBatching"


def outcomes(tests: Path, side: str, folder: Path, only: str | None) -> dict[str, str]:
    """Of each test that was run: "passed", or what it failed with."""
    report = folder / f"{side}.xml"
    chosen = f"({LEFT_OUT}) and ({only})" if only else LEFT_OUT
    command = [sys.executable, "-m", "pytest", str(tests / "tests" / "test_grpo_trainer.py"), "-p", "benchmarks.trl_hub"]
    command += ["-k", chosen, "--junitxml", str(report), "-p", "no:cacheprovider", "--confcutdir", str(tests)]
    command += [
        "--rootdir",
        str(tests),
        "--override-ini",
        "addopts=",
        "--numprocesses",
        "2",
        "--durations",
        "20",
        "--verbose",
    ]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(tests)])
    more = {"GRPO_SIDE": side, "HUB": str(folder / "hub"), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=os.environ | more, cwd=tests, check=False)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        found[name] = "passed" if problem is None else f"{problem.tag}: {(problem.get('message') or '')[:300]}"
    return found


def main() -> None:
    """Run both sides and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder tests/ of a checkout of TRL")
    parser.add_argument("--only", help="pytest's -k: run these, and write no result")
    parser.add_argument("--side", choices=("trl", "grpo_hf"), action="append", help="one side alone; the other is as it was")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copytree(args.tests, folder / "tests")
        sides = {side: outcomes(folder, side, folder, args.only) for side in args.side or ("trl", "grpo_hf")}
    for side, found in sides.items():
        print(side, f"{sum(value == 'passed' for value in found.values())} of {len(found)}")
    if args.only:
        for name, value in (item for found in sides.values() for item in found.items()):
            print(f"- {name}: {value}")
        return
    measured = json.loads(RESULT.read_text())["outcomes"] if RESULT.is_file() else {}
    measured |= sides
    known = {name for name, value in measured.get("trl", {}).items() if value == "passed"}
    failed = {
        name: value for name, value in sorted(measured.get("grpo_hf", {}).items()) if name in known and value != "passed"
    }
    print(f"of {len(known)} that TRL passes, {len(known) - len(failed)} pass")
    for name, why in failed.items():
        print(f"- {name}: {why}")
    summary = {"trl": trl.__version__, "pass with TRL": len(known), "pass with grpo_hf": len(known) - len(failed)}
    RESULT.write_text(json.dumps(summary | {"fail with grpo_hf": failed, "outcomes": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
