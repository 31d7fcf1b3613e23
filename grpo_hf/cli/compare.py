"""`grpo-hf compare RUN_A RUN_B`: two evaluations of the same rows, pair by pair."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from grpo_hf.evaluation.paired import Difference, differences
from grpo_hf.evaluation.record import UNNAMED, read_evaluation


def main(argv: Sequence[str] | None = None) -> int:
    """Print what B has over A in every measure, with its interval."""
    parser = argparse.ArgumentParser(
        prog="grpo-hf compare",
        description=__doc__,
        epilog="A run is the output_dir of `grpo-hf eval` or of training, of which the newest evaluation counts; or one of "
        "them: runs/sorting_lm/evaluations/step-000060.",
    )
    parser.add_argument("run_a", help="before")
    parser.add_argument("run_b", help="after")
    args = parser.parse_args(argv)
    before, after = read_evaluation(args.run_a), read_evaluation(args.run_b)
    if not before.keys() & after.keys():
        raise ValueError(f"A has evaluated {', '.join(before)} and B {', '.join(after)}: there is nothing to compare")
    for name in [name for name in before if name in after]:
        if name != UNNAMED:
            print(f"{name}:")
        print("\n".join(table(differences(before[name], after[name]), len(before[name]))))
    if alone := sorted(before.keys() ^ after.keys()):
        print(f"only one of them has evaluated {', '.join(alone)}")
    return 0


def table(found: dict[str, Difference], prompts: int) -> list[str]:
    """One line a measure."""
    if not found:
        return ["no prompt has a score in both"]
    names = {name: name.removeprefix("rewards/") for name in found}
    width = max(map(len, names.values()))
    lines = [f"{'':<{width}}      A       B     B - A   95 % interval          p   better  worse  of {prompts} prompts"]
    for name, item in found.items():
        change = item.estimate
        interval = "unknown" if math.isnan(change.low) else f"[{change.low:+.3f}, {change.high:+.3f}]"
        lines.append(
            f"{names[name]:<{width}} {item.before:6.3f}  {item.after:6.3f}   {change.value:+.3f}   "
            f"{interval:16}  {item.p_value:6.4f}  {item.better:6d} {item.worse:6d}"
        )
    return lines
