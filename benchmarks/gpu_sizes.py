"""What `benchmarks.gpu` measures: models in the shapes of Qwen2.5 with random weights, and samples of random tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_hf.packing.layout import LAYOUTS
from grpo_hf.types import PackedBatch, TrainingSample


@dataclass(frozen=True)
class Shape:
    """Groups of random tokens; completions are from a quarter of the longest to the longest, evenly spread."""

    prompt: int
    completion: int
    groups: int
    group_size: int = 8


@dataclass(frozen=True)
class Size:
    """A model, and what it is measured on."""

    config: dict[str, Any]
    shapes: tuple[Shape, ...]
    lora: bool = False
    tokens_per_microbatch: int = 16_384


def qwen(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    """A config's numbers."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "vocab_size": vocab}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}


ON_GPU = (Shape(512, 1024, groups=8), Shape(4096, 512, groups=4))
TINY = Size(qwen(64, 96, 2, 4, 2, 256, True), (Shape(12, 16, groups=2, group_size=4),), tokens_per_microbatch=128)
SIZES = {
    "tiny": TINY,
    "tiny-LoRA": replace(TINY, lora=True),
    "0.5B": Size(qwen(896, 4864, 24, 14, 2, 151_936, True), ON_GPU),
    "1.5B": Size(qwen(1536, 8960, 28, 12, 2, 151_936, True), ON_GPU),
    "7B-LoRA": Size(qwen(3584, 18_944, 28, 28, 4, 152_064, False), ON_GPU, lora=True),
}
"""Qwen2.5-0.5B, -1.5B and -7B, and two to try this file on."""


def make_model(size: Size, device: str, **config: Any) -> Any:
    """Random weights on the device, in float32; under LoRA a bfloat16 base with a float32 adapter of rank 16."""
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if size.lora else torch.float32
        model = Qwen2ForCausalLM._from_config(Qwen2Config(**(size.config | config)), dtype=dtype)
    if size.lora:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


def make_samples(shape: Shape, vocab: int) -> list[TrainingSample]:
    """Random tokens and advantages; the longest completion is as long as the shape says."""
    generator = torch.Generator().manual_seed(0)
    low = max(1, shape.completion // 4)

    def ids(length: int) -> list[int]:
        return torch.randint(vocab, (length,), generator=generator).tolist()

    lengths = torch.linspace(low, shape.completion, shape.groups * shape.group_size).long()
    shuffled = lengths[torch.randperm(len(lengths), generator=generator)].tolist()
    prompts = [ids(shape.prompt) for _ in range(shape.groups)]
    return [
        sample(prompts[number // shape.group_size], ids(length), number, advantage=(-1.0) ** number)
        for number, length in enumerate(shuffled)
    ]


def sample(prompt: list[int], completion: list[int], number: int, advantage: float = 1.0) -> TrainingSample:
    """One completion of a single turn."""
    is_target = torch.arange(len(prompt) + len(completion)) >= len(prompt)
    return TrainingSample(
        ids=(*prompt, *completion),
        is_target=is_target,
        advantages=is_target * advantage,
        completion=number,
        group=0,
        completion_length=len(completion),
        versions=torch.zeros(len(completion), dtype=torch.long),
    )


def plan(layout: str, samples: list[TrainingSample], budget: int, device: str) -> list[PackedBatch]:
    """An update's micro-batches on the device."""
    return [batch.to(torch.device(device)) for batch in LAYOUTS[layout](samples, tokens_per_microbatch=budget)]
