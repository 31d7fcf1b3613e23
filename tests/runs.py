"""What tests of whole runs share: reading a trainer's log, comparing weights, acting after a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback

from grpo_hf import GRPOConfig, GRPOTrainer
from tests.tiny import PROMPTS, VOCAB, even_words, tiny_model, tiny_tokenizer

SAMPLE_NAMES = {
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/even_words/mean",
    "rewards/even_words/std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/mean_terminated_length",
    "completions/min_terminated_length",
    "completions/max_terminated_length",
    "completions/clipped_ratio",
    *(f"rewards/even_words/outcomes/{outcome}" for outcome in ("no_answer", "timeout", "crash", "error", "bad_gold")),
}
"""TRL's names of what training and evaluation log of their samples, with the verifier even_words."""


def logs(trainer: GRPOTrainer) -> list[dict[str, Any]]:
    """The log lines of training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def values(trainer: GRPOTrainer, name: str) -> list[float]:
    """One metric, by log line."""
    return [entry[name] for entry in logs(trainer)]


OF_THE_CLOCK = ("time/", "perf/", "tokens_per_second", "train_runtime", "_per_second", "/seconds/")
"""Parts of the names of metrics that no two runs have in common."""


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """A log line less what is of the clock."""
    return {name: value for name, value in line.items() if not any(part in name for part in OF_THE_CLOCK)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """To the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def lora() -> LoraConfig:
    """A new one each time: PEFT writes into it."""
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


class AfterStep(TrainerCallback):
    """Calls a function with the trainer's state and model after every step."""

    def __init__(self, function: Callable[[Any, Any], Any]):
        self.function = function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call it."""
        self.function(state, kwargs["model"])


def held_out_trainer(
    folder: Path, held_out: Any, *, reward: Any = even_words, eval_reward_funcs: Any = None, **settings: Any
) -> GRPOTrainer:
    """A tiny trainer with held-out prompts."""
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(VOCAB - 20, VOCAB))
    quiet = {"save_rollouts": False, "write_report": False, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
    sizes = {"max_steps": 3, "num_generations": 4, "max_completion_length": 8, "logging_steps": 1, "learning_rate": 1e-2}
    machine = {"use_cpu": True, "gradient_checkpointing": False}
    args = GRPOConfig(output_dir=str(folder), **(quiet | sizes | machine | settings))
    return GRPOTrainer(model, reward, args, PROMPTS, held_out, tiny_tokenizer(), eval_reward_funcs=eval_reward_funcs)


class StopAfter(TrainerCallback):
    """Ends the run as a kill between two steps would: what is not on disk is lost."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
