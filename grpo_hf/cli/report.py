"""`grpo-hf report RUN_FOLDER [OTHER ...]`: a page about what a run has left so far, or several runs side by side."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from grpo_hf.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and print its path; with --watch, again whenever a run has gone on, until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="grpo-hf report", description=__doc__)
    parser.add_argument("run_folder", type=Path, nargs="+", help="output_dir of runs, which may still be going")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="write it again as the run goes on, looking every so many seconds (10); the browser reads it again by itself",
    )
    args = parser.parse_args(argv)
    if args.watch is not None and not args.watch > 0:
        parser.error(f"--watch {args.watch:g} must be above 0 seconds")
    print(write_report(*args.run_folder, refresh=args.watch), flush=True)
    try:
        seen = changed_at(args.run_folder)
        while args.watch:
            time.sleep(args.watch)
            if (now := changed_at(args.run_folder)) != seen:
                seen = now
                write_report(*args.run_folder, refresh=args.watch)
    except KeyboardInterrupt:
        write_report(*args.run_folder)  # which is read no more
    return 0


def changed_at(folders: Sequence[Path]) -> list[float]:
    """When the record of each was written to."""
    return [(folder / "metrics.jsonl").stat().st_mtime for folder in folders]
