"""`grpo-hf report RUN_FOLDER`: write report.html from what a run has left so far."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from grpo_hf.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and print its path."""
    parser = argparse.ArgumentParser(prog="grpo-hf report", description=__doc__)
    parser.add_argument("run_folder", type=Path, help="a run's output_dir; the run may still be going")
    print(write_report(parser.parse_args(argv).run_folder))
    return 0
