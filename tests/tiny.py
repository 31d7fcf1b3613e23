"""Tiny random models, groups, tokenizers and trainers: a test makes what it needs in a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.trainer import GRPOTrainer
from grpo_hf.types import Completion, Group, Prompt

torch.set_num_threads(1)  # at these sizes threads wait for each other more than they work, on a busy machine above all

WORDS = [f"w{number}" for number in range(95)]
VOCAB = len(WORDS) + 2

# The usual weights, std 0.02, hardly tell one token from another at this size: attention would be an average, whatever
# the mask. These are times larger, and make a wrong mask, window or cap plain.
STD = 0.3
SPECIAL = {"bos_token_id": None, "pad_token_id": VOCAB - 2, "eos_token_id": VOCAB - 1}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": STD,
    **SPECIAL,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": STD,
    **SPECIAL,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=4, attn_logit_softcapping=1.0, final_logit_softcapping=3.0)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, **NO_DROPOUT)),
}
"""One of each family; Mistral's and Gemma 2's windows are shorter than the sequences, Gemma 2 caps its scores."""

UNEVEN = [(7, [5, 1, 3]), (1, [4]), (12, [1, 9, 2, 6]), (7, [2, 8])]
"""Groups as (prompt length, completion lengths): of one and of several completions, some of one token."""


def tiny_model(family: str = "qwen2", seed: int = 0) -> PreTrainedModel:
    """A model of the family with random weights and biases."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=STD)
    return model.eval()


def random_groups(shapes: Sequence[tuple[int, list[int]]] = UNEVEN, *, seed: int = 0, vocab: int = VOCAB) -> list[Group]:
    """A group for each (prompt length, completion lengths), with random ids and advantages."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(vocab, (length,), generator=generator).tolist()

    def completion(length: int) -> Completion:
        return Completion(ids(length), truncated=False, advantage=torch.randn((), generator=generator).item())

    return [group(ids(prompt), map(completion, completions), number) for number, (prompt, completions) in enumerate(shapes)]


def group(prompt: list[int], completions: Iterable[Completion | list[int]], index: int = 0) -> Group:
    """A group from token ids."""
    made = [item if isinstance(item, Completion) else Completion(item, truncated=False) for item in completions]
    return Group(Prompt(ids=prompt, raw="", row={}, index=index), made)


def tiny_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token a word, then <pad> and <eos>."""
    vocabulary = {word: number for number, word in enumerate([*words, "<pad>", "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


PROMPTS = [{"prompt": prompt} for prompt in ("w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w1 w2", "w3 w2 w1", "w9 w9 w9 w9")]


def even_words(completion: str) -> float:
    """A reward that tells random completions apart."""
    return float(sum(int(word.removeprefix("w")) % 2 == 0 for word in completion.split()))


def tiny_trainer(
    folder: Path,
    *,
    model: PreTrainedModel | None = None,
    reward: Callable[..., Any] = even_words,
    dataset: list[dict[str, Any]] = PROMPTS,
    tokenizer: PreTrainedTokenizerFast | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    peft_config: Any = None,
    reward_processing_classes: Any = None,
    **settings: Any,
) -> GRPOTrainer:
    """A trainer that leaves nothing behind; its completions are of uneven lengths, since one token in five ends them."""
    if model is None:
        model = tiny_model()
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


def gradient_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole gradient, by parameter."""
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in trained}


def relative_error(gradient: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|g - expected| / |expected|, over all parameters."""
    assert gradient.keys() == expected.keys()
    difference = torch.cat([(gradient[name] - expected[name]).flatten() for name in expected])
    return (difference.norm() / torch.cat([part.flatten() for part in expected.values()]).norm()).item()
