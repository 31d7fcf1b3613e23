"""`grpo-hf train RECIPE.yaml`, and what `accelerate launch recipes/train.py RECIPE.yaml` runs."""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from accelerate import PartialState
from datasets import Dataset, load_dataset
from peft import LoraConfig

from grpo_hf.cli.data import FORMATS
from grpo_hf.cli.mistakes import MISTAKES
from grpo_hf.cli.recipe import RunArguments, help_text, parse
from grpo_hf.report import write_report
from grpo_hf.rewards import check_columns, get_rewards
from grpo_hf.rewards.loading import load_function
from grpo_hf.rollout.prompts import checked_dataset
from grpo_hf.training.agents import make_toolbox, rewards_of
from grpo_hf.training.checkpoints import resume_point
from grpo_hf.training.checks import checked_rewards, with_environment
from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.folder import check_writable
from grpo_hf.training.stopping import RunStopped
from grpo_hf.training.trainer import GRPOTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or "--help" in arguments:
        print(help_text())
        return 0 if arguments else 2
    run, config = parse(arguments)
    status = 0
    try:
        run_recipe(run, config)
    except RunStopped as stopped:
        status = int(str(stopped.code))
    except KeyboardInterrupt:  # while a run trains, see GRPOTrainer.train
        print(
            "stopped outside of training; a run that has begun goes on with --resume_from_checkpoint auto", file=sys.stderr
        )
        return 128 + signal.SIGINT
    # gloo's threads abort a process that ends before they do: let go of the wrapped model, then of the process group. vLLM
    # in this process does the latter itself, with its engine.
    gc.collect()
    if PartialState().num_processes > 1 and not (config.use_vllm and config.vllm_mode == "colocate"):
        PartialState().destroy_process_group()
    return status


def run_recipe(run: RunArguments, config: GRPOConfig) -> None:
    """Evaluate, train, evaluate again, save, report."""
    wants_report, config.write_report = config.write_report, False  # it comes after the last evaluation
    folder = Path(str(config.output_dir))
    checkpoint = resume_point(config.resume_from_checkpoint, folder)
    trainer = build_trainer(run, config)
    headline = f"eval_rewards/{run.headline or trainer.eval_scorer.rewards[0].name}/mean"
    before = None
    if trainer.eval_prompts:
        before = first_value(folder, headline) if checkpoint else trainer.evaluate().get(headline)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except MISTAKES as error:  # not in the settings: those are checked before
        raise RuntimeError(f"training has failed: {error}") from error
    after = last_value(trainer, headline) if trainer.eval_prompts else None
    trainer.save_model()
    if trainer.is_world_process_zero():
        if wants_report:
            print(f"report: {write_report(folder)}")
        if before is not None and after is not None:
            held_out = sum(map(len, trainer.eval_prompts.values()))
            print(f"{headline.split('/')[1]} {before:.3f} -> {after:.3f} held-out {held_out}")


def build_trainer(run: RunArguments, config: GRPOConfig) -> GRPOTrainer:
    """The trainer that a recipe describes; checks its settings before it makes a model."""
    for names in (("model_name_or_path", "model_function"), ("dataset_name", "dataset_function", "environments")):
        if sum(getattr(run, name) is not None for name in names) != 1:
            raise ValueError(f"set {' or '.join(names)}, one of them")
    if isinstance(run.tools, str):
        raise ValueError(f"tools is a list; got {run.tools!r}: write [{run.tools}]")
    tools, environments = [named(spec) for spec in run.tools], run.environment_factory
    if isinstance(environments, dict):
        environments = {key: named(spec) for key, spec in environments.items()}
    elif environments is not None:
        environments = named(environments)
    train, held_out = (None, None) if run.environments is not None else load_data(run)
    rewards = get_rewards(run.rewards)
    owned = []
    if train is not None:
        toolbox = make_toolbox(tools, environments, None, config)
        owned = rewards_of(toolbox)
        rewards, _ = checked_rewards(run.rewards, config, owned=owned)
        rows = with_environment(train, "train_dataset", config, toolbox) if toolbox else train
        check_columns(rewards, checked_dataset(rows, "train_dataset").column_names, "train_dataset")
    measured = get_rewards(run.eval_rewards) or rewards
    if run.headline not in (None, *(known := [reward.name for reward in measured])):
        raise ValueError(f"headline={run.headline!r} is none of the rewards, which are {', '.join(known)}")
    check_writable(Path(str(config.output_dir)))
    model: Any = run.model_name_or_path
    tokenizer = None
    if run.model_function is not None:
        model, tokenizer = named(run.model_function)(seed=config.seed, **run.model_options)
    peft_config = None
    if run.use_peft:
        peft_config = LoraConfig(
            r=run.lora_r,
            lora_alpha=run.lora_alpha,
            lora_dropout=run.lora_dropout,
            target_modules=run.lora_target_modules,
            task_type="CAUSAL_LM",
        )
    return GRPOTrainer(
        model,
        list(rewards[: len(rewards) - len(owned)]),  # it adds its environments' itself
        config,
        train,
        held_out,
        tokenizer,
        peft_config=peft_config,
        tools=tools,
        environment_factory=environments,
        teacher=run.teacher,
        eval_reward_funcs=run.eval_rewards or None,
        environments=run.environments,
    )


def load_data(run: RunArguments) -> tuple[Dataset, Dataset | None]:
    """The training rows and the held-out rows, with their prompts made."""
    if run.dataset_function is not None:
        made = named(run.dataset_function)(**run.dataset_options)
        train, held_out = (Dataset.from_list(part) if isinstance(part, list) else part for part in made)
    elif (suffix := Path(str(run.dataset_name)).suffix) in FORMATS:
        files = {"train": run.dataset_name} | ({"test": run.dataset_test_file} if run.dataset_test_file else {})
        loaded = load_dataset(FORMATS[suffix], data_files=files)
        train, held_out = loaded["train"], loaded.get("test")
    else:
        loaded = load_dataset(str(run.dataset_name), run.dataset_config)
        train = loaded[run.dataset_train_split]
        held_out = loaded[run.dataset_test_split] if run.dataset_test_split else None
    if held_out is not None and run.max_eval_samples is not None:
        held_out = held_out.select(range(min(run.max_eval_samples, len(held_out))))
    return with_prompts(train, run), None if held_out is None else with_prompts(held_out, run)


def with_prompts(rows: Dataset, run: RunArguments) -> Dataset:
    """Add the prompt column that the recipe's template makes."""
    if run.prompt_template is None and run.system_prompt is None:
        return rows
    template = run.prompt_template or "{prompt}"
    missing = {column for _, column, *_ in Formatter().parse(template) if column} - set(rows.column_names)
    if missing:
        raise ValueError(f"prompt_template={template!r} asks for {sorted(missing)}; the dataset has {rows.column_names}")

    system = [{"role": "system", "content": run.system_prompt}] if run.system_prompt else []

    def prompt(row: dict[str, Any]) -> dict[str, Any]:
        if run.prompt_template is None and isinstance(row["prompt"], list):
            return {"prompt": [*system, *row["prompt"]]}
        text = template.format(**row)
        return {"prompt": text if run.system_prompt is None else [*system, {"role": "user", "content": text}]}

    return rows.map(prompt)


def named(spec: str) -> Callable[..., Any]:
    """`path/file.py:function` or `package.module:function`."""
    place, colon, attribute = str(spec).rpartition(":")
    if not colon:
        raise ValueError(f"{spec!r} names no function; write path/file.py:function or package.module:function")
    return load_function(place, attribute, spec)


def last_value(trainer: GRPOTrainer, name: str) -> float | None:
    """The held-out value of the weights that training ended with; measured again only if the last step did not."""
    logged = trainer.state.log_history if not trainer.args.load_best_model_at_end else []
    found = [entry[name] for entry in logged if name in entry and entry["step"] == trainer.state.global_step]
    return found[-1] if found else trainer.evaluate().get(name)


def first_value(folder: Path, name: str) -> float | None:
    """The first logged value of a metric, from the part of the run before it was resumed."""
    path = folder / "metrics.jsonl"
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.endswith("}") and (entry := json.loads(line)).get(name) is not None:
                return entry[name]
    return None
