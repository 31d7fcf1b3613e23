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
    if args.watch is None:
        print(write_report(*args.run_folder))
    else:
        watch(args.run_folder, args.watch)
    return 0


def watch(folders: Sequence[Path], seconds: float) -> None:
    """Write the page whenever a run has logged more, until Ctrl-C; before its first line, and while it is moved, wait."""
    seen: list[int] | None = None
    try:
        while True:
            if all(now := sizes(folders)) and now != seen:
                page = write_report(*folders, refresh=seconds)
                if seen is None:
                    print(page, flush=True)
                seen = now
            time.sleep(seconds)
    except KeyboardInterrupt:
        if seen is not None:
            write_report(*folders)  # for the last time: no browser need read it again


def sizes(folders: Sequence[Path]) -> list[int]:
    """Bytes of each run's log so far; 0 where there is none."""
    logs = [folder / "metrics.jsonl" for folder in folders]
    return [log.stat().st_size if log.exists() else 0 for log in logs]
