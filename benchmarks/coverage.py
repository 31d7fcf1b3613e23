"""How often an interval of 95 % holds the truth: this package's beside m ± 1.96 s / sqrt(P).

    python -m benchmarks.coverage

Evaluations are simulated: each prompt has its own chance of a right answer, drawn from a beta distribution with the true
mean, and so many samples. benchmarks/results/coverage.json has the result.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from grpo_hf.evaluation.intervals import mean_of_shares

RESULT = Path(__file__).parent / "results" / "coverage.json"
ROUNDS = 2000
TRUTHS = {
    "0.02": (0.1, 4.9),
    "0.5, all or none": (0.05, 0.05),
    "0.5, alike": (20.0, 20.0),
    "0.6": (3.0, 2.0),
    "0.98": (9.8, 0.2),
}


def main() -> None:
    """Print and save a row for each truth, number of prompts and number of samples."""
    rows = []
    print("| truth | prompts | samples | this | m ± 1.96 s/√P |\n|---|---|---|---|---|")
    for name, (a, b) in TRUTHS.items():
        truth = a / (a + b)
        for prompts in (20, 200):
            for samples in (1, 8):
                rng = np.random.default_rng(0)
                values = rng.binomial(samples, rng.beta(a, b, (ROUNDS, prompts))) / samples
                intervals = [mean_of_shares(list(row), samples) for row in values]
                ours = float(np.mean([item.low <= truth <= item.high for item in intervals]))
                plain = [abs(row.mean() - truth) <= 1.96 * row.std(ddof=1) / math.sqrt(prompts) for row in values]
                rows.append(
                    {"truth": name, "prompts": prompts, "samples": samples, "ours": ours, "plain": float(np.mean(plain))}
                )
                print(f"| {name} | {prompts} | {samples} | {ours:.3f} | {rows[-1]['plain']:.3f} |")
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
