"""Whole steps beside TRL's GRPOTrainer, sampling included: `python -m benchmarks.whole_step`.

Every side samples its own completions, all of the whole length (random weights hardly ever end one), scores them and takes
the optimizer step. On this machine TRL samples with transformers: its vLLM in the training process loads weights in a way
that vLLM's CPU build refuses, and its server needs NCCL. So ours is there twice, with the same engine as TRL and with vLLM.
Float32, no gradient checkpointing, 4 groups of 8; sides/ says the rest. Writes benchmarks/results/whole_step.json.
"""

from __future__ import annotations

import json

from benchmarks.cases import Case
from benchmarks.side_by_side import RESULTS, arguments, measure, setting

CASES = {
    "192 / 64": Case(192, 64, equal=True, injected=False),
    "64 / 192": Case(64, 192, equal=True, injected=False),
}
"""Prompt / completion tokens."""
SIDES = ("trl", "grpo_hf", "grpo_hf_vllm")


def main() -> None:
    """Measure, write, show."""
    args = arguments(__doc__, CASES)
    results = {name: measure(CASES[name], SIDES, args.repeats) for name in args.case or CASES}
    (RESULTS / "whole_step.json").write_text(json.dumps({"setting": setting(), "cases": results}, indent=1) + "\n")
    print(
        f"{'prompt / completion':22}{'TRL s':>8}{'ours s':>8}{'ours, vLLM s':>14}{'TRL / ours':>12}{'TRL / ours, vLLM':>18}"
    )
    for name, result in results.items():
        trl, ours, vllm = (result[side]["wall_s"] for side in SIDES)
        print(f"{name:22}{trl:8.2f}{ours:8.2f}{vllm:14.2f}{trl / ours:12.2f}{trl / vllm:18.2f}")


if __name__ == "__main__":
    main()
