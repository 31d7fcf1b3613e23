"""What the sides that are a transformers.Trainer are told, in the words that they share."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback

from benchmarks.cases import Case, Data, load_model, make_tokenizer, text_of
from benchmarks.sides.clock import Clock


class AtSteps(TrainerCallback):
    """Tells the clock of optimizer steps."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradient is there."""
        self.clock.before_step(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights have moved."""
        self.clock.after_step(state.global_step)


def arguments_of(case: Case, model: str, data: Data, clock: Clock) -> dict[str, Any]:
    """What both trainers are made of, but for their settings; many rows, since an epoch has an end."""
    from datasets import Dataset

    return {
        "model": load_model(case, model) if case.lora else model,
        "reward_funcs": data.reward,
        "train_dataset": Dataset.from_list([{"prompt": text_of(ids)} for ids in data.prompts] * 100),
        "processing_class": make_tokenizer(case.vocabulary),
        "callbacks": [AtSteps(clock)],
    }


def settings_of(case: Case, folder: str) -> dict[str, Any]:
    """Both trainers' defaults, but for these."""
    accumulation = case.groups * case.group_size // case.rows // int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "output_dir": folder,
        "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": accumulation * case.updates,
        "num_generations": case.group_size,
        "max_completion_length": case.longest_completion,
        "beta": case.beta,
        "learning_rate": 1e-6,
        "max_grad_norm": 1e9,  # measured, never reached: updates that are scaled one by one would not add up
        "max_steps": 1_000_000,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
