"""The sorting recipe with and without dynamic sampling, for as many samples: `python -m benchmarks.dynamic_sampling`.

Both runs have the recipe's settings, but for the transformers engine and a learning rate that stays as it is after the
warm-up, so that a run of fewer steps has no shorter schedule. Without dynamic sampling a run takes --steps steps; with it,
as many as the same number of samples gives. Reported are the share of informative groups among those trained on, by step,
and exact sorts of held-out lists (greedy), by samples drawn. Writes benchmarks/results/dynamic_sampling.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml
from transformers import PrinterCallback, TrainerCallback

from grpo_hf import GRPOConfig, GRPOTrainer
from recipes.sorting_lm import exact_sort, make_data, make_model

RECIPE = Path(__file__).parents[1] / "recipes" / "sorting_lm.yaml"
NOT_SETTINGS = ("model_function", "dataset_function", "rewards", "headline", "output_dir")
ACCURACY = "eval_rewards/exact_sort/mean"


class Budget(TrainerCallback):
    """Counts samples, evaluates after every so many, and ends the run when they are used up."""

    def __init__(self, per_step: int, most: int, every: int):
        self.per_step, self.most, self.every, self.drawn, self.due = per_step, most, every, 0.0, every
        self.steps: list[dict[str, float]] = []
        self.accuracy: list[tuple[float, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line a step, and one an evaluation."""
        if "loss" in logs:
            self.drawn += self.per_step * logs.get("dynamic/sampled_per_kept", 1.0)
            informative = 1 - logs["frac_reward_zero_std"]
            self.steps.append({"samples": self.drawn, "informative": informative, "reward": logs["reward"]})
            control.should_evaluate = self.drawn >= self.due or self.drawn >= self.most
            self.due += self.every * int(self.drawn >= self.due)
            control.should_training_stop = self.drawn >= self.most
        elif ACCURACY in logs:
            self.accuracy.append((self.drawn, logs[ACCURACY]))


def run(dynamic: bool, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One training run."""
    recipe = yaml.safe_load(RECIPE.read_text())
    settings = {name: value for name, value in recipe.items() if name not in NOT_SETTINGS}
    settings |= {
        "use_vllm": False,
        "lr_scheduler_type": "constant_with_warmup",
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "eval_strategy": "no",
        "stop_at": None,
        "save_strategy": "no",
        "save_rollouts": False,
        "write_report": False,
        "disable_tqdm": True,
        "seed": seed,
        "solved_reward": 2.0,
        "dynamic_sampling": dynamic,
    }
    model, tokenizer = make_model(seed=seed)
    train, held_out = make_data(held_out=args.held_out)
    budget = Budget(args.batch, args.steps * args.batch, max(1, args.steps // args.evaluations) * args.batch)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(output_dir=folder, **settings)
        rewards: list[Any] = ["sorting", exact_sort]
        trainer = GRPOTrainer(model, rewards, config, train, held_out, tokenizer, callbacks=[budget])
        trainer.remove_callback(PrinterCallback)
        trainer.evaluate()
        trainer.train()
    return {"seed": seed, "dynamic_sampling": dynamic, "steps": budget.steps, "accuracy": budget.accuracy}


def main() -> None:
    """Both, for every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="of the run without dynamic sampling")
    parser.add_argument("--batch", type=int, default=512, help="completions of a step")
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "dynamic_sampling.json")
    args = parser.parse_args()
    results = [run(dynamic, args, seed) for seed in args.seeds for dynamic in (False, True)]
    args.output.write_text(
        json.dumps({"settings": vars(args) | {"output": args.output.name}, "runs": results}, indent=1) + "\n"
    )
    print("seed  dynamic  steps  samples  informative groups (first, mean, last step)  exact sorts held out (start -> end)")
    for result in results:
        shares = [step["informative"] for step in result["steps"]]
        print(
            f"{result['seed']:4}  {result['dynamic_sampling']!s:7}  {len(shares):5}  {result['steps'][-1]['samples']:7.0f}  "
            f"{shares[0]:.2f} {statistics.fmean(shares):.2f} {shares[-1]:.2f}  "
            f"{result['accuracy'][0][1]:.3f} -> {result['accuracy'][-1][1]:.3f}"
        )


if __name__ == "__main__":
    main()
