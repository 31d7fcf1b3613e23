"""`grpo-hf eval MODEL --data FILE --reward NAME`: sample held-out rows and score them: how good is a model, how surely?"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from grpo_hf.cli.recipe import RunArguments, parse
from grpo_hf.cli.train import build_trainer
from grpo_hf.evaluation.estimates import estimates_of
from grpo_hf.evaluation.intervals import Estimate
from grpo_hf.evaluation.record import FOLDER, UNNAMED, read_evaluation
from grpo_hf.training.config import GRPOConfig

SHOWN = 3
"""Answers that are shown, of the first prompts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of every reward's avg@k, pass@k and maj@k; the samples stay in the output folder."""
    given = list(argv or [])
    model = given.pop(0) if given and not given[0].startswith("-") else None
    args, rest = arguments().parse_known_args(given)
    run, config = parse([*([args.recipe] if args.recipe else []), *rest])
    run, config = evaluated(run, config, model, args)
    trainer = build_trainer(run, config)
    with trainer.folder.lock():
        trainer.folder.begin()  # an earlier evaluation in the folder is set aside
        trainer.evaluate()
    if trainer.is_world_process_zero():
        for name, questions in read_evaluation(str(config.output_dir)).items():
            shown = "" if name == UNNAMED else f"{name}: "
            print(f"{shown}{len(questions)} prompts, {len(questions[0].rewards)} samples each")
            print("\n".join(table(estimates_of(questions))))
            for question in questions[:SHOWN]:
                print(
                    f"row {question.row}: reward {question.rewards[0]:g} for {' '.join(question.answers[0].split())!r:.100}"
                )
        print(f"samples: {Path(str(config.output_dir)) / FOLDER}")
    return 0


def arguments() -> argparse.ArgumentParser:
    """What is evaluated; all else is as in a recipe."""
    parser = argparse.ArgumentParser(
        prog="grpo-hf eval",
        usage="grpo-hf eval [MODEL] [--recipe RECIPE] [--data DATA] [--reward REWARD ...] [--SETTING VALUE ...]",
        description=__doc__,
        epilog="MODEL is a hub name, a folder, or a LoRA adapter's; without it the recipe's. Every setting of a recipe can "
        "be given too: --prompt_template, --system_prompt, --max_completion_length, --use_vllm, --vllm_mode server, ... Of "
        "training's settings only those of sampling matter.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help="take data, prompts, rewards and sampling from this recipe")
    parser.add_argument("--data", help="a .jsonl, .json, .csv or .parquet file, or a dataset's name; default: the recipe's")
    parser.add_argument("--split", default="test", help="of a dataset given by name")
    parser.add_argument("--reward", action="append", help="a name, or {name: math, mode: strict}; repeatable")
    parser.add_argument("--k", type=int, help="samples of each prompt, for avg@k, pass@k and maj@k; default: 8")
    parser.add_argument("--temperature", type=float, help="they are sampled at; 0 is greedy; default: the recipe's, else 1")
    parser.add_argument("--limit", type=int, help="the first rows only")
    parser.add_argument("--output", help="the folder for samples and metrics; default: runs/eval")
    return parser


def evaluated(
    run: RunArguments, config: GRPOConfig, model: str | None, args: argparse.Namespace
) -> tuple[RunArguments, GRPOConfig]:
    """The recipe's run with what the command line says, and without what only training needs."""
    if model is None and not args.recipe:
        raise ValueError("say what to evaluate: grpo-hf eval MODEL --data FILE --reward NAME, or --recipe RECIPE")
    changed: dict[str, Any] = {"teacher": None, "use_peft": False, "headline": None}
    if model is not None:
        changed |= {"model_name_or_path": model, "model_function": None, "model_options": {}}
    if args.data is not None:
        changed |= {"dataset_name": args.data, "dataset_test_file": args.data, "dataset_function": None}
        changed |= {"dataset_train_split": args.split, "dataset_test_split": args.split}
    if args.reward:
        changed["eval_rewards"] = [yaml.safe_load(spec) for spec in args.reward]
        changed["rewards"] = run.rewards or changed["eval_rewards"]
    if args.limit is not None:
        changed["max_eval_samples"] = args.limit
    if args.k is not None and args.k < 1:
        raise ValueError(f"--k {args.k}, but at least 1 sample of each prompt is needed")
    samples = args.k or config.num_generations_eval or config.num_generations
    config.num_generations_eval = samples
    config.eval_temperature = config.eval_temperature if args.temperature is None else args.temperature
    config.output_dir = args.output or "runs/eval"
    config.save_rollouts, config.write_report, config.report_to = True, False, []
    config.stop_at, config.load_best_model_at_end = None, False  # name rewards that may not be those of this evaluation
    config.beta = 0.0
    # The smallest rollout, since none is made.
    config.per_device_train_batch_size, config.steps_per_generation = config.num_generations, 1
    config.gradient_accumulation_steps, config.generation_batch_size = 1, None
    return replace(run, **changed), config


def table(estimates: dict[str, Estimate]) -> list[str]:
    """One line an estimate."""
    if not estimates:
        return ["no reward has given any sample a score"]
    names = {name: name.removeprefix("rewards/") for name in estimates}
    width = max(map(len, names.values()))
    lines = [f"{'':<{width}}   mean   95 % interval"]
    for name, item in estimates.items():
        interval = "unknown" if math.isnan(item.low) else f"[{item.low:.3f}, {item.high:.3f}]"
        lines.append(f"{names[name]:<{width}}  {item.value:6.3f}  {interval}")
    return lines
