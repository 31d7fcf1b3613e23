"""What runs have learned: a held-out metric over their updates and minutes, into benchmarks/results/learned.json.

python recipes/train.py recipes/smollm2_digits.yaml
python -m benchmarks.learned runs/smollm2_digits --metric rewards/exact_sort/mean
"""

from __future__ import annotations

import argparse
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from grpo_hf.report import read_metrics

RESULTS = Path(__file__).parent / "results" / "learned.json"


def learned(run_dir: Path, metric: str) -> dict[str, Any]:
    """At each evaluation: finished updates, the minutes that they took, evaluations among them, and the metric.

    A log line's times are means over the updates since the line before it, so every update must have its own.
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    seconds = accumulate(sum(value for name, value in line.items() if name.startswith("time/")) for line in lines)
    found = [(line, sofar) for line, sofar in zip(lines, seconds, strict=True) if f"eval_{metric}" in line]
    if not found:
        raise SystemExit(f"{run_dir} has no eval_{metric}")
    return {
        "metric": metric,
        "updates": [line["step"] for line, _ in found],
        "minutes": [round(sofar / 60, 2) for _, sofar in found],
        "values": [round(line[f"eval_{metric}"], 4) for line, _ in found],
    }


def main() -> None:
    """Add the runs to the file, under their folders' names, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output_dir of runs with logging_steps: 1")
    parser.add_argument("--metric", required=True, help="a held-out metric without eval_, such as rewards/exact_sort/mean")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for run in args.runs:
        results[run.resolve().name] = learned(run, args.metric)
        print(run.resolve().name, json.dumps(results[run.resolve().name]))
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
