"""Tiny trainers, and what they are made of: a test makes what it needs in a moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.trainer import GRPOTrainer
from tests.samples import UNEVEN, VOCAB, even_words, group, random_groups, samples_of
from tests.tiny_models import FAMILIES, SIZES, WORDS, gradient_of, relative_error, tiny_model, tiny_tokenizer

__all__ = [
    "FAMILIES",
    "SIZES",
    "UNEVEN",
    "VOCAB",
    "WORDS",
    "even_words",
    "gradient_of",
    "group",
    "random_groups",
    "relative_error",
    "samples_of",
    "tiny_model",
    "tiny_tokenizer",
]

PROMPTS = [{"prompt": prompt} for prompt in ("w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w1 w2", "w3 w2 w1", "w9 w9 w9 w9")]


def tiny_trainer(
    folder: Path,
    *,
    model: PreTrainedModel | None = None,
    family: str = "qwen2",
    reward: Callable[..., Any] = even_words,
    dataset: list[dict[str, Any]] = PROMPTS,
    eval_dataset: Any = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    peft_config: Any = None,
    reward_processing_classes: Any = None,
    **settings: Any,
) -> GRPOTrainer:
    """A trainer that leaves nothing behind; its completions are of uneven lengths, since one token in five ends them."""
    if model is None:
        model = tiny_model(family)
        model.generation_config.eos_token_id = list(range(VOCAB - 20, VOCAB))
    defaults = {
        "max_steps": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 1e9,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "save_rollouts": False,
        "write_report": False,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **(defaults | settings)),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer or tiny_tokenizer(),
        reward_processing_classes=reward_processing_classes,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy it."""
        self.steps.append(gradient_of(kwargs["model"]))
