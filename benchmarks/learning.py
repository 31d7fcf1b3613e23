"""What a sample and a second teach, beside TRL: `python -m benchmarks.learning`.

Each side trains the same model on the same prompts, rewards, batch, learning rate and number of completions; after every
few updates the same function samples held-out lists greedily with transformers, off the clock. TRL samples with
transformers, since its vLLM modes do not run on a CPU; ours with vLLM in process. A run ends above --until in two
evaluations in a row, or when its samples are used up. Runs that benchmarks/results/learning.json holds are not run again,
so that the command can be stopped and started; --again forgets them. Needs `pip install "grpo_hf[benchmarks]"`, and for
SmolLM2 `make .venv/smollm2`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from benchmarks.side_by_side import setting
from grpo_hf.reward_fns.sorting import sorting
from recipes import smollm2, sorting_lm

RESULT = Path(__file__).parent / "results" / "learning.json"
LEVEL = 0.9
"""Samples and seconds are counted until this share of held-out lists is sorted exactly."""
SIDES = ("trl", "trl_head", "grpo_hf", "grpo_hf_dynamic")
"""TRL as it is; TRL whose head is told to score completions only; ours; ours with dynamic sampling."""


@dataclass(frozen=True)
class Task:
    """What is learned."""

    make_model: Callable[..., tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    make_data: Callable[[], tuple[Dataset, Dataset]]
    separator: str
    """Stands between the numbers of an answer."""
    settings: dict[str, Any]
    """Where both trainers' defaults are not taken."""
    every: int
    """Updates between two evaluations."""
    most: int
    """Samples drawn at most."""


def two_shot() -> tuple[Dataset, Dataset]:
    """SmolLM2's lists of 3 or 4 digits behind two solved ones, which all prompts share."""

    def shown(row: dict[str, Any]) -> dict[str, Any]:
        solved = {"7, 2, 5": "2, 5, 7", "9, 0, 4, 1": "0, 1, 4, 9"}
        turns = [{"role": "system", "content": "Answer with the numbers only, separated by commas."}]
        for listed, answer in solved.items():
            turns.append({"role": "user", "content": f"Sort these numbers in ascending order: {listed}"})
            turns.append({"role": "assistant", "content": answer})
        return {"prompt": [*turns, {"role": "user", "content": row["prompt"]}]}

    train, held_out = smollm2.make_numbers(lengths=(3, 4), below=10, train=2048, held_out=100)
    return train.map(shown), held_out.map(shown)


TASKS = {
    "decoder": Task(
        sorting_lm.make_model,
        lambda: sorting_lm.make_data(held_out=500),
        " ",
        {
            "learning_rate": 3e-4,
            "warmup_steps": 10,
            "max_completion_length": 12,
            "per_device_train_batch_size": 256,
            "gradient_accumulation_steps": 1,
        },
        every=10,
        most=256 * 160,
    ),
    "smollm2": Task(
        lambda *, seed: smollm2.make_model(seed=seed),
        two_shot,
        ", ",
        {
            "learning_rate": 2e-5,
            "warmup_steps": 2,
            "max_completion_length": 12,
            "per_device_train_batch_size": 16,  # TRL's rows of one forward pass
            "gradient_accumulation_steps": 8,
        },
        every=5,
        most=128 * 60,
    ),
}


def text_of(completion: Any) -> str:
    """What the model wrote, of a chat or not."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def in_place(completions: list[Any], numbers: list[list[int]], **kwargs: Any) -> list[float]:
    """The share of the numbers that are where they belong."""
    return [sorting(text_of(made), listed) for made, listed in zip(completions, numbers, strict=True)]


def exact(separator: str) -> Callable[..., list[float]]:
    """1 for the sorted list and nothing else."""

    def exact_sort(completions: list[Any], numbers: list[list[int]], **kwargs: Any) -> list[float]:
        answers = (separator.join(map(str, sorted(listed))) for listed in numbers)
        return [float(text_of(made).strip() == answer) for made, answer in zip(completions, answers, strict=True)]

    return exact_sort


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, task: Task) -> float:
    """The share of held-out lists that are sorted exactly, greedy."""
    prompts = [
        row if isinstance(row, str) else tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False)
        for row in rows["prompt"]
    ]
    batch = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    was_training = model.training
    model.eval()
    with torch.no_grad():
        made = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=task.settings["max_completion_length"],
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return statistics.fmean(exact(task.separator)(texts, rows["numbers"]))


class Curve(TrainerCallback):
    """Held-out accuracy over samples and seconds; evaluations stop the clock."""

    def __init__(self, measure: Callable[[PreTrainedModel], float], batch: int, task: Task, until: float):
        self.measure, self.batch, self.task, self.until = measure, batch, task, until
        self.samples, self.seconds, self.began = 0.0, 0.0, 0.0
        self.points: list[tuple[float, float, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model as it was."""
        self.add(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log every update, since a log says how many samples it took."""
        self.seconds += time.perf_counter() - self.began
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """After an update."""
        if "loss" not in logs:
            return
        self.samples += self.batch * logs.get("dynamic/sampled_per_kept", 1.0)
        spent = self.samples >= self.task.most
        if state.global_step % self.task.every == 0 or spent:
            self.add(kwargs["model"])
        held = len(self.points) > 1 and all(point[2] >= self.until for point in self.points[-2:])
        control.should_training_stop |= spent or held

    def add(self, model: PreTrainedModel) -> None:
        """Evaluate."""
        self.points.append((self.samples, self.seconds, self.measure(model)))
        print(f"{self.samples:8.0f} samples {self.seconds:8.1f} s  {self.points[-1][2]:.3f}", file=sys.stderr, flush=True)
        self.began = time.perf_counter()


def run(task: Task, side: str, seed: int, until: float) -> list[tuple[float, float, float]]:
    """One run in this process: samples, seconds and held-out accuracy at each evaluation."""
    ours = side.startswith("grpo_hf")
    if ours:
        from grpo_hf import GRPOConfig, GRPOTrainer

        more = {"use_vllm": True, "save_rollouts": False, "write_report": False}
        more |= {"dynamic_sampling": side == "grpo_hf_dynamic"}
    else:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        if side == "trl_head":
            import trl.trainer.utils

            trl.trainer.utils._use_triton = lambda device: True
        from trl import GRPOConfig, GRPOTrainer

        more = {}
    model, tokenizer = task.make_model(seed=seed)
    train, held_out = task.make_data()
    batch = task.settings["per_device_train_batch_size"] * task.settings["gradient_accumulation_steps"]
    curve = Curve(lambda trained: accuracy(trained, tokenizer, held_out, task), batch, task, until)
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "output_dir": folder,
            "num_generations": 8,
            "max_steps": task.most // batch,
            "lr_scheduler_type": "constant_with_warmup",
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "seed": seed,
        }
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[in_place, exact(task.separator)],
            args=GRPOConfig(**shared, **task.settings, **more),
            train_dataset=train,
            processing_class=tokenizer,
            callbacks=[curve],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return curve.points


def reached(points: list[tuple[float, float, float]], axis: int, level: float = LEVEL) -> float:
    """Samples (``axis`` 0) or seconds (1) at which accuracy first reaches the level, on a line between two evaluations; inf:
    never.

    >>> reached([(0, 0, 0.5), (100, 8, 0.7), (200, 16, 1.0)], 0, 0.85)
    150.0
    """
    for before, after in pairwise(points):
        if after[2] >= level > before[2]:
            return before[axis] + (after[axis] - before[axis]) * (level - before[2]) / (after[2] - before[2])
    return float("inf")


def show(runs: dict[str, list[tuple[float, float, float]]]) -> None:
    """A line for each task and side: medians over its seeds, and how many times the plain run's they are."""
    print(
        f"{'task':10}{'side':18}{'seeds':>6}{'samples to 90 %':>18}{'s to 90 %':>12}{'x ours':>10}{'x ours':>8}{'last':>8}"
    )
    for task in TASKS:
        found = {side: [runs[name] for name in sorted(runs) if name.startswith(f"{task}/{side}/")] for side in SIDES}
        middle = {
            side: [statistics.median(reached(points, axis) for points in curves) for axis in (0, 1)]
            for side, curves in found.items()
            if curves
        }
        for side, (samples, seconds) in middle.items():
            times = (
                [value / ours for value, ours in zip((samples, seconds), middle["grpo_hf"], strict=True)]
                if ("grpo_hf" in middle)
                else [float("nan")] * 2
            )
            last = statistics.median(points[-1][2] for points in found[side])
            print(
                f"{task:10}{side:18}{len(found[side]):6}{samples:18.0f}{seconds:12.0f}{times[0]:10.2f}{times[1]:8.2f}{last:8.3f}"
            )


def main() -> None:
    """Run what is missing, each in a process of its own, and show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="this one only; may be given again")
    parser.add_argument("--side", action="append", choices=SIDES, help="this one only; may be given again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--until", type=float, default=0.95, help="held-out accuracy that ends a run")
    parser.add_argument("--again", action="store_true", help="also what the file holds")
    parser.add_argument("--here", action="store_true", help="one run in this process, printed as JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(run(TASKS[args.task[0]], args.side[0], args.seeds[0], args.until)))
        return
    for seed in args.seeds:
        for task in args.task or TASKS:
            for side in args.side or SIDES:
                result = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": {}}
                name = f"{task}/{side}/{seed}"
                if name in result["runs"] and not args.again:
                    continue
                print(name, file=sys.stderr, flush=True)
                command = ["--task", task, "--side", side, "--seeds", str(seed), "--until", str(args.until), "--here"]
                made = subprocess.run(
                    [sys.executable, "-m", "benchmarks.learning", *command],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                )
                points = json.loads(made.stdout.splitlines()[-1])
                result["runs"][name] = [[round(number, 3) for number in point] for point in points]
                result["setting"] = setting()
                RESULT.write_text(json.dumps(result, indent=None, sort_keys=True).replace('], "', '],\n"') + "\n")
    show(json.loads(RESULT.read_text())["runs"])


if __name__ == "__main__":
    main()
