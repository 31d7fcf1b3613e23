"""Invariant 1."""

from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_hf.algorithm.aggregation import Denominators
from grpo_hf.algorithm.logits import entropy, token_logprobs
from grpo_hf.algorithm.objective import Objective
from grpo_hf.packing.attention import TOKEN_TREE
from grpo_hf.packing.layout import LAYOUTS
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.training.models import causal_lm
from tests.tiny import FAMILIES, gradient_of, random_groups, relative_error, tiny_model

OBJECTIVE = Objective(loss_type="grpo", entropy_coef=0.1)
TEMPERATURE = 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradient_is_padded_gradient(family: str) -> None:
    """Packed gradient = padded gradient (float32, relative error < 1e-5), for uneven prompt and completion lengths, G = 1,
    one-token completions, and several groups, with and without LoRA, with and without gradient checkpointing.

    Both layouts are held against rows without any padding, one at a time, through the model's own eager forward.
    """
    groups, worst = random_groups(), 0.0
    for lora, checkpointing in product((False, True), (False, True)):
        expected = gradient_of_rows(make_model(family, lora, checkpointing), groups)
        for layout, budget in (("packed", 40), ("packed", 1000), ("padded", 1000)):
            model = make_model(family, lora, checkpointing)
            causal_lm(model).set_attn_implementation(TOKEN_TREE)
            batches = LAYOUTS[layout](groups, tokens_per_microbatch=budget)
            assert len(batches) > 1 or budget == 1000
            for batch in batches:
                logprobs, batch_entropy = batch_logprobs(causal_lm(model), batch, temperature=TEMPERATURE)
                add_gradient(groups, logprobs, batch_entropy, batch.advantages, batch.sequence)
            error = relative_error(gradient_of(model), expected)
            worst = max(worst, error)
            assert error < 1e-5, f"{family}, lora {lora}, checkpointing {checkpointing}, {layout}, budget {budget}"
    print(f"\n{family}: worst relative gradient error {worst:.1e}")


def make_model(family: str, lora: bool, checkpointing: bool) -> torch.nn.Module:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    if lora:  # init_lora_weights=False: adapters that already do something
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def gradient_of_rows(model, groups) -> dict[str, torch.Tensor]:
    """One completion at a time, full logits, torch's own autograd."""
    for group in groups:
        for completion in group.completions:
            start = len(group.prompt.ids)
            logits = model(input_ids=torch.tensor([group.prompt.ids + completion.ids])).logits[0, start - 1 : -1]
            logprobs = token_logprobs(logits, torch.tensor(completion.ids), TEMPERATURE)
            sequence = torch.zeros(len(completion.ids), dtype=torch.long)
            add_gradient(groups, logprobs, entropy(logits, TEMPERATURE), torch.tensor([completion.advantage]), sequence)
    return gradient_of(model)


def add_gradient(groups, logprobs, batch_entropy, advantages, sequence) -> None:
    lengths = [len(completion.ids) for group in groups for completion in group.completions]
    denominators = Denominators(sum(lengths), len(lengths), sum(lengths), num_processes=1, max_completion_length=16)
    loss, _ = OBJECTIVE(logprobs, batch_entropy, advantages, sequence, denominators, old_logprobs=logprobs.detach())
    loss.backward()
