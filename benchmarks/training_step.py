"""The training phase beside its rivals: `python -m benchmarks.training_step`.

Everything between sampling and the end of the optimizer step, in float32 on this machine's CPU, without gradient
checkpointing. Every side runs in a fresh process of its own (sides/); all are given the same completions and rewards,
their first gradients are compared (cosine above 0.9999, or the command ends), and then they take turns. The first step, in
which the optimizer makes its state, is not counted.

    trl             TRL's GRPOTrainer with its defaults
    trl_head        the same, its head told to score completion tokens only
    trl_async_tree  AsyncGRPOTrainer's token trie in a plain loop, with torch's SDPA where it has a kernel for Hopper GPUs
    prefix_grouper  PrefixGrouper in the same loop, with torch's SDPA
    liger           Liger's fused GRPO loss in the same loop, over padded rows
    padded          our padded layout, with our head
    grpo_hf         ours

A side whose package is not installed is left out. Every case's figures are written to benchmarks/results/training_step.json
as soon as they are there, beside those of the cases that are not measured this time; then come the table and
benchmarks/results/training_step.png. Needs `pip install grpo_hf[benchmarks]`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.side_by_side import RESULTS, arguments, measure, setting
from benchmarks.sides import is_installed

CASES = {
    "192 / 64, equal lengths": Case(192, 64, equal=True),
    "512 / 128": Case(512, 128),
    "128 / 512": Case(128, 512, budget=2048),
    "2,048 / 64": Case(2048, 64, rows=4),
    "512 / 128, half without signal": Case(512, 128, flat=2),
    "192 / 64, equal, KL": Case(192, 64, equal=True, beta=0.04),
    "192 / 64, equal, LoRA": Case(192, 64, equal=True, lora=True),
    "192 / 64, equal, two updates": Case(192, 64, equal=True, updates=2),
    "shared system prompt": Case(64, 64, equal=True, system=512, groups=8, group_size=4, budget=4096),
    "four turns": Case(128, 32, equal=True, turns=4, tool=32),
    "sampled, temperature 0.7": Case(96, 24, recorded="sorting.json", groups=8, budget=2048, vocabulary=49_154),
}
"""Prompt / completion tokens; 4 groups of 8 unless the case says otherwise.

"Shared system prompt": 8 prompts of 64 tokens behind the same 512, groups of 4, completions of 64. "Four turns": 32 tokens
each, with what a tool answered, 32 tokens too, between them. "Sampled": benchmarks/record.py.
"""

SIDES = ("trl", "trl_head", "trl_async_tree", "prefix_grouper", "liger", "padded", "grpo_hf")
OWN = ("padded", "grpo_hf")
OUTPUT = RESULTS / "training_step.json"


def fastest_rival(result: dict[str, Any]) -> str | None:
    """Of the sides that were measured and are not ours."""
    rivals = [side for side in SIDES if side in result and side not in OWN]
    return min(rivals, key=lambda side: result[side]["wall_s"], default=None)


def table(name: str, result: dict[str, Any]) -> str:
    """One line a side; multiples are of ours."""
    lines = [
        f"{name:31}{'seconds a step':>22}{'cpu s':>9}{'tokens':>9}{'MiB':>8}"
        f"{'time x':>9}{'cpu x':>8}{'tokens x':>9}{'MiB x':>7}"
    ]
    best = fastest_rival(result)
    for side in filter(result.__contains__, SIDES):
        taken = result[side]
        low, high = taken["wall_spread_s"]
        line = (
            f"  {side + (' (fastest rival)' if side == best else ''):29}{taken['wall_s']:8.2f} ({low:.2f}-{high:.2f})".ljust(
                53
            )
        )
        line += f"{taken['cpu_s']:9.2f}{taken['tokens_forwarded']:9.0f}{taken['peak_mib']:8.0f}"
        if over := result.get(f"{side}_over_grpo_hf"):
            line += f"{over['wall_s']:9.2f}{over['cpu_s']:8.2f}{over['tokens_forwarded']:9.2f}{over['peak_mib']:7.2f}"
        lines.append(line)
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Times and peaks of the other sides, as multiples of ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sides = [side for side in SIDES[:-1] if any(side in result for result in results.values())]
    height = 0.8 / len(sides)
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.2 * len(results) * len(sides) + 1.5), sharey=True, layout="constrained")
    for axis, quantity, title in zip(axes, ("wall_s", "peak_mib"), ("time of a step", "peak memory"), strict=True):
        for number, side in enumerate(sides):
            found = {
                place: result[f"{side}_over_grpo_hf"] for place, result in enumerate(results.values()) if side in result
            }
            places = [place + (number - (len(sides) - 1) / 2) * height for place in found]
            bars = axis.barh(places, [over[quantity] for over in found.values()], height=height, label=side)
            axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
        axis.axvline(1, color="black", linewidth=1)
        axis.margins(x=0.12)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=f"{title}, as a multiple of grpo_hf's", yticks=range(len(results)), yticklabels=list(results))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sides))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, write, show."""
    args = arguments(__doc__, CASES, SIDES[:-1])
    asked = [side for side in SIDES if side in (*(args.side or SIDES), SIDES[-1])]
    sides = [side for side in asked if is_installed(side)]
    if missing := set(asked) - set(sides):
        print(f"not installed, left out: {', '.join(sorted(missing))}")
    written = json.loads(OUTPUT.read_text())["cases"] if OUTPUT.exists() else {}
    for name in args.case or CASES:
        written[name] = measure(CASES[name], sides, args.repeats)
        written[name]["fastest_rival"] = fastest_rival(written[name])
        print(table(name, written[name]), flush=True)
        written = {name: written[name] for name in CASES if name in written}
        OUTPUT.write_text(json.dumps({"setting": setting(), "cases": written}, indent=1) + "\n")
    plot(written, OUTPUT.with_suffix(".png"))
    print("\nfastest rival / ours")
    for name, result in written.items():
        if best := fastest_rival(result):
            over = result[f"{best}_over_grpo_hf"]
            print(f"{name:31} {best:16}{over['wall_s']:6.2f} x the time, {over['tokens_forwarded']:5.2f} x the tokens")


if __name__ == "__main__":
    main()
