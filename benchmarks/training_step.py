"""The training phase beside TRL's GRPOTrainer: `python -m benchmarks.training_step`.

Everything between sampling and the end of the optimizer step, in float32 on this machine's CPU, without gradient
checkpointing: TRL with its defaults, our packed layout, and our padded layout with the same fused head ("padded"), which
says what is left where TRL's head is not what holds it back. Every side is a real trainer in a fresh process of its own
(sides.py); all are given the same completions and rewards, their first gradients are compared (cosine above 0.9999, or
the command ends), and then they take turns. The first step, in which the optimizer makes its state, is not counted.

Every case's figures are written to benchmarks/results/training_step.json as soon as they are there, beside those of the
cases that are not measured this time; then come the table and benchmarks/results/training_step.png.
Needs `pip install grpo_hf[benchmarks]`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.side_by_side import RESULTS, arguments, measure, setting
from grpo_hf.packing.layout import TOKENS_PER_MICROBATCH

CASES = {
    "192 / 64, equal lengths": Case(192, 64, equal=True),
    "512 / 128": Case(512, 128),
    "128 / 512": Case(128, 512, budget=TOKENS_PER_MICROBATCH["cpu"]),
    "2,048 / 64": Case(2048, 64, rows=4),
    "512 / 128, half without signal": Case(512, 128, flat=2),
    "192 / 64, equal, KL": Case(192, 64, equal=True, beta=0.04),
    "192 / 64, equal, LoRA": Case(192, 64, equal=True, lora=True),
    "192 / 64, equal, two updates": Case(192, 64, equal=True, updates=2),
}
"""Prompt / completion tokens. An update has 4 groups of 8 completions."""

SIDES = ("trl", "padded", "grpo_hf")
OUTPUT = RESULTS / "training_step.json"


def seconds(measured: dict[str, Any]) -> str:
    """The median, the fastest and the slowest."""
    low, high = measured["wall_spread_s"]
    return f"{measured['wall_s']:.2f} ({low:.1f}-{high:.1f})"


def table(results: dict[str, Any]) -> str:
    """One line a case."""
    lines = [
        f"{'':31}{'seconds a step, fastest and slowest':^66}{'TRL / ours':^29}{'padded / ours':^29}",
        f"{'prompt / completion':31}{'TRL':>22}{'padded':>22}{'ours':>22}"
        + 2 * f"{'time':>8}{'cpu':>7}{'tokens':>7}{'peak':>7}",
    ]
    for name, result in results.items():
        line = f"{name:31}" + "".join(f"{seconds(result[side]):>22}" for side in SIDES)
        for side in ("trl", "padded"):
            ratios = result[f"{side}_over_grpo_hf"]
            line += (
                f"{ratios['wall_s']:8.2f}{ratios['cpu_s']:7.2f}{ratios['tokens_forwarded']:7.2f}{ratios['peak_mib']:7.2f}"
            )
        lines.append(line)
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Times and peaks of TRL and the padded layout, as multiples of ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 0.6 * len(results) + 1.5), sharey=True, layout="constrained")
    for axis, quantity, title in zip(axes, ("wall_s", "peak_mib"), ("time of a step", "peak memory"), strict=True):
        for shift, side, label in ((-0.2, "trl", "TRL"), (0.2, "padded", "padded, our head")):
            ratios = [result[f"{side}_over_grpo_hf"][quantity] for result in results.values()]
            bars = axis.barh([place + shift for place in range(len(ratios))], ratios, height=0.38, label=label)
            axis.bar_label(bars, fmt="%.1f", padding=2)
        axis.axvline(1, color="black", linewidth=1)
        axis.margins(x=0.12)
        axis.set(title=f"{title}, as a multiple of grpo_hf's", yticks=range(len(results)), yticklabels=list(results))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, write, show."""
    args = arguments(__doc__, CASES)
    written = json.loads(OUTPUT.read_text())["cases"] if OUTPUT.exists() else {}
    for name in args.case or CASES:
        written[name] = measure(CASES[name], SIDES, args.repeats)
        print(table({name: written[name]}), flush=True)
        written = {name: written[name] for name in CASES if name in written}
        OUTPUT.write_text(json.dumps({"setting": setting(), "cases": written}, indent=1) + "\n")
    print(f"\n{table(written)}")
    plot(written, OUTPUT.with_suffix(".png"))


if __name__ == "__main__":
    main()
