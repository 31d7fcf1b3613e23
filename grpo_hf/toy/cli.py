"""``grpo-hf toy``: the lecture's experiments side by side, then what solves its task."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from grpo_hf.toy.experiments import BACK_TO_THE_LECTURE, LECTURE, Table, frozen_ratio_gradients, variance_example
from grpo_hf.toy.train import ToyResult, ToySettings, train

HEADER = f"{'':36}{'reward: min':>12}{'mean':>7}{'max':>7}  {'all sorted':>10}  {'sorted, by seed'}"
LEGEND = """\
reward: of the greedy answers, the lecture's points for inclusion and ordering, averaged over prompts; 5.00 is sorted.
all sorted: seeds on which the greedy policy sorts all prompts exactly; by seed: how many of the prompts it sorts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments, print the tables and draw the curves."""
    args = build_parser().parse_args(argv)
    start = time.perf_counter()
    torch.set_num_threads(1)  # tensors of a few hundred numbers: more threads only wait for each other
    args.output_dir.mkdir(parents=True, exist_ok=True)

    print_small_examples()
    base = ToySettings()
    samples = f"{args.epochs} epochs x {base.num_responses} responses a prompt"
    print(f"\nThe lecture's experiments: prompts {[list(prompt) for prompt in base.prompts]}, {samples}\n{LEGEND}")
    lecture: dict[str, ToyResult] = {}
    for heading, table in LECTURE.items():
        lecture |= run_table(heading, table, args)
    print(f"\nWhat solves it, in the same {samples}")
    solving = run_table("the solving setting, and with one ingredient as the lecture has it", BACK_TO_THE_LECTURE, args)

    print(f"\ncurves: {draw_rewards(args.output_dir, lecture)}, {draw_sorted(args.output_dir, lecture, solving)}")
    print(f"{len(lecture) + len(solving)} settings x {len(args.seeds)} seeds in {time.perf_counter() - start:.1f} s")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The options of ``grpo-hf toy``."""
    parser = argparse.ArgumentParser(prog="grpo-hf toy", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="default: 0 to 9")
    parser.add_argument("--epochs", type=_positive, default=100, help="times that answers are sampled; default: 100")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/toy"), help="default: runs/toy")
    return parser


def print_small_examples() -> None:
    """The lecture's two calculations without a model."""
    not_held, held = frozen_ratio_gradients()
    print(f"Gradient of the ratio p(w) / p_old at w = 2: {held:.4f} with p_old held constant, {not_held:.4f} without.")
    raw, centered = variance_example()
    print(f"Variance of the rewards 11, 9 | 0, 2: {raw:.2f}, and {centered:.2f} less each state's mean.")


def run_table(heading: str, table: Table, args: argparse.Namespace) -> dict[str, ToyResult]:
    """Train every row on all seeds, printing as they finish."""
    print(f"\n{heading}\n{HEADER}")
    results = {}
    for label, settings in table.items():
        results[label] = train(replace(settings, num_epochs=args.epochs), args.seeds)
        print(table_row(label, results[label], num_prompts=len(settings.prompts)), flush=True)
    return results


def table_row(label: str, result: ToyResult, *, num_prompts: int) -> str:
    """One setting over all seeds."""
    reward, num_sorted = result.lecture_reward, result.num_sorted[-1]
    solved = f"{(num_sorted == num_prompts).sum()}/{len(num_sorted)}"
    by_seed = " ".join(str(count) for count in num_sorted.tolist())
    return f"  {label:34}{reward.min():12.2f}{reward.mean():7.2f}{reward.max():7.2f}  {solved:>10}  {by_seed}"


def draw_rewards(output_dir: Path, results: dict[str, ToyResult]) -> Path:
    """The lecture's learning curves: the reward of the sampled answers."""
    from grpo_hf.report.curves import learning_curves

    return learning_curves(
        output_dir / "lecture.png",
        {label: result.rewards.mean(1).tolist() for label, result in results.items()},
        title="The lecture's settings (5.00 is sorted)",
        xlabel="epoch",
        ylabel="reward of sampled answers, mean over seeds",
    )


def draw_sorted(output_dir: Path, lecture: dict[str, ToyResult], solving: dict[str, ToyResult]) -> Path:
    """Exactly sorted prompts, which compare across rewards."""
    from grpo_hf.report.curves import learning_curves

    curves = {"lecture: centered": lecture["centered"], **solving}
    return learning_curves(
        output_dir / "solving.png",
        {label: result.num_sorted.float().mean(1).tolist() for label, result in curves.items()},
        title="What solves the sorting task",
        xlabel="epoch",
        ylabel="prompts sorted exactly (greedy), mean over seeds",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value
