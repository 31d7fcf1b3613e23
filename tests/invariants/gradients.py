"""The gradient of samples, by a layout and one row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from grpo_hf.algorithm.aggregation import Denominators
from grpo_hf.algorithm.logits import entropy, token_logprobs
from grpo_hf.algorithm.losses import LOSSES
from grpo_hf.algorithm.objective import grpo_objective
from grpo_hf.packing.attention import TOKEN_TREE
from grpo_hf.packing.layout import LAYOUTS
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.training.models import causal_lm
from grpo_hf.types import TokenBatch, TrainingSample
from tests.tiny_models import gradient_of, tiny_model

OBJECTIVE = grpo_objective(*LOSSES["grpo"], entropy_coef=0.1)
TEMPERATURE = 0.7


def make_model(family: str, *, lora: bool = False, checkpointing: bool = False, **changes: Any) -> nn.Module:
    """In training mode, with its own eager attention."""
    model: Any = tiny_model(family, **changes)
    model.set_attn_implementation("eager")
    if lora:  # init_lora_weights=False: adapters that already do something
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def gradient_of_layout(model: nn.Module, samples: Sequence[TrainingSample], layout: str, budget: int) -> dict[str, Tensor]:
    """As a training step takes it, micro-batch by micro-batch."""
    model.zero_grad()
    lm: Any = causal_lm(model)
    lm.set_attn_implementation(TOKEN_TREE)
    for batch in LAYOUTS[layout](samples, tokens_per_microbatch=budget):
        add_gradient(batch.tokens(*batch_logprobs(lm, batch, temperature=TEMPERATURE)), samples)
    return gradient_of(model)


def gradient_of_rows(model: nn.Module, samples: Sequence[TrainingSample]) -> dict[str, Tensor]:
    """One sample at a time through the model's own eager forward: full logits, torch's own autograd, nothing shared."""
    model.zero_grad()
    for item in samples:
        targets = item.is_target.nonzero().squeeze(1)
        ids = torch.tensor([item.ids])
        logits = model(input_ids=ids).logits[0, targets - 1]
        logprobs = token_logprobs(logits, ids[0, targets], TEMPERATURE)
        batch = TokenBatch(
            logprobs=logprobs,
            entropy=entropy(logits, TEMPERATURE),
            advantages=item.advantages[targets],
            old_logprobs=logprobs.detach(),
            completion=torch.zeros_like(targets),
            lengths=torch.tensor([item.completion_length]),
        )
        add_gradient(batch, samples)
    return gradient_of(model)


def add_gradient(batch: TokenBatch, samples: Sequence[TrainingSample]) -> None:
    """Of some of the samples, with the denominators of all."""
    tokens, completions = sum(int(item.is_target.sum()) for item in samples), len({item.completion for item in samples})
    counts = Denominators(tokens, completions, tokens, num_processes=1, max_completion_length=16, update_tokens=tokens)
    loss, _ = OBJECTIVE(batch, counts)
    loss.backward()
