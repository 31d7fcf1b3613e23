"""One side: python -m benchmarks.sides '{"side": "trl", "case": {...}, "model": FOLDER, "folder": FOLDER}'

reads a line from standard input for each rollout, trains on the case's completions, and answers with a JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pkgutil import resolve_name

from benchmarks.cases import Case, make_data
from benchmarks.sides import SIDES, gradient_file
from benchmarks.sides.clock import Clock


def main() -> None:
    """Train until standard input ends."""
    spec = json.loads(sys.argv[1])
    case, folder = Case(**spec["case"]), Path(spec["folder"])
    clock = Clock(case, gradient_file(folder, spec["side"]))
    resolve_name(SIDES[spec["side"]])(case, spec["model"], str(folder / spec["side"]), make_data(case), clock)


if __name__ == "__main__":
    main()
