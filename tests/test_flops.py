"""The floating-point operations of an update, against those that torch counts, and attention's against the definition."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from grpo_hf.packing.layout import packed_batch, padded_batch
from grpo_hf.toy.hf_model import SortingConfig, SortingForCausalLM
from grpo_hf.training.adapters import with_adapter
from grpo_hf.training.throughput import Cost, cost_of, update_flops
from tests.runs import lora
from tests.samples import UNEVEN, VOCAB, random_groups, random_samples, samples_of
from tests.tiny_models import MIXTURES, tiny_model

IDS = torch.arange(24).view(2, 12)


def counted(model: Any) -> int:
    """What torch sees of products of weights, forward and backward; attention's are batched, and have other names."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=IDS).logits.sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in by_operator.items() if operator.__name__ in ("mm", "addmm"))


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_full_weights_are_what_torch_counts(family: str) -> None:
    model = tiny_model(family)
    cost = cost_of(model)
    assert IDS.numel() * (cost.token + cost.scored) == counted(model)


def test_frozen_weights_have_no_gradient() -> None:
    adapted = get_peft_model(tiny_model(), lora())
    adapted.enable_input_require_grads()  # as gradient checkpointing does; else the first layer's inputs need none
    cost = cost_of(adapted.get_base_model())
    assert IDS.numel() * (cost.token + cost.scored) == counted(adapted)
    assert cost.scored == 4 * VOCAB * 32


def test_a_reference_adapter_is_no_part_of_an_update() -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    alone = cost_of(adapted.get_base_model())
    _, reference = with_adapter(adapted, None, needs_reference=True)
    assert reference is not None and cost_of(adapted.get_base_model()) == alone


def test_padding_is_not_useful_and_repeated_prompts_are_counted() -> None:
    cost = Cost(token=1, scored=0, pair=0, windows=Counter())
    groups = random_groups(UNEVEN)
    rows = sum(len(g.prompt.ids) + len(c.ids) - 1 for g in groups for c in g.completions)
    assert update_flops(cost, [padded_batch(samples_of(groups))]) == rows
    assert update_flops(cost, [packed_batch(samples_of(groups))]) == rows - sum(
        len(g.prompt.ids) * (len(g.completions) - 1) for g in groups
    )


def test_a_position_with_several_targets_is_put_through_the_head_once() -> None:
    cost = Cost(token=0, scored=1, pair=0, windows=Counter())
    samples = random_samples([(7, [5, 1, 3])])
    assert update_flops(cost, [padded_batch(samples)]) == 5 + 1 + 3
    assert update_flops(cost, [packed_batch(samples)]) == 5 + 1 + 3 - 2


@pytest.mark.parametrize("window", [None, 1, 4])
def test_attention_counts_the_pairs_that_may_look(window: int | None) -> None:
    """A prompt of 3, and completions of which 2 and 0 tokens are inputs: 1 + 2 + 3 + 4 + 5 pairs without a window."""
    batch = packed_batch(random_samples([(3, [3, 1])]))
    cost = Cost(token=0, scored=0, pair=7, windows=Counter({window: 2}))
    assert update_flops(cost, [batch]) == 2 * 7 * {None: 15, 1: 5, 4: 14}[window]


def test_windows_and_head_sizes_come_from_the_config() -> None:
    """4 heads of 8; 2 products forward, 4 backward, 2 operations each. Gemma 2 has its window in every other layer."""
    assert {family: cost_of(tiny_model(family)).pair for family in ("qwen2", "gpt2", "gemma2")} == dict.fromkeys(
        ("qwen2", "gpt2", "gemma2"), 12 * 32
    )
    assert cost_of(tiny_model("qwen2")).windows == Counter({None: 2})
    assert cost_of(tiny_model("mistral")).windows == Counter({4: 2})
    assert cost_of(tiny_model("gemma2")).windows == Counter({4: 1, None: 1})


def test_of_experts_those_that_a_token_is_sent_to() -> None:
    """2 of 4, of 3 products each."""
    sizes = MIXTURES["qwen3_moe"]
    assert (sizes["num_experts"], sizes["num_experts_per_tok"], sizes["moe_intermediate_size"]) == (4, 2, 16)
    attention = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32)
    assert cost_of(tiny_model("qwen3_moe")).token == 6 * (attention + 2 * (4 * 32 + 2 * 3 * 32 * 16))


def test_a_model_without_attention_heads_has_a_cost_too() -> None:
    cost = cost_of(SortingForCausalLM(SortingConfig()))
    assert cost.token > 0 and cost.scored == 6 * 5 * 10
    assert not cost.windows


def test_what_only_keeps_a_process_busy_is_not_counted() -> None:
    batch = packed_batch(random_samples())
    batch.weight = 0.0
    assert update_flops(cost_of(tiny_model()), [batch]) == 0
