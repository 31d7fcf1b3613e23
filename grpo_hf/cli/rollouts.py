"""`grpo-hf rollouts RUN_FOLDER`: look through a run's samples in the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Open the browser; q closes it."""
    parser = argparse.ArgumentParser(prog="grpo-hf rollouts", description=__doc__)
    parser.add_argument("run_folder", type=Path, help="a run's output_dir; the run may still be going")
    run_folder = parser.parse_args(argv).run_folder
    try:
        from grpo_hf.report.browser import Browser
    except ImportError as error:
        raise ImportError("grpo-hf rollouts needs the package textual: pip install textual") from error
    Browser(run_folder).run()
    return 0
