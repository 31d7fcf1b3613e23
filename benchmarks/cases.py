"""What the sides of a comparison train on: a case's model, tokenizer, prompts and completions, the same in every process."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from grpo_hf.types import Completion, Group, Prompt

VOCABULARY, GROUP_SIZE = 32_000, 8


@dataclass(frozen=True)
class Case:
    """What all sides train on."""

    prompt: int
    """Tokens of every prompt."""
    completion: int
    """Tokens of a completion at most; lengths are uniform between a quarter of that and the whole."""
    equal: bool = False
    """All completions have the whole length."""
    groups: int = 4
    """Prompts of an update."""
    group_size: int = GROUP_SIZE
    """Completions of a prompt."""
    rows: int = GROUP_SIZE
    """Completions that TRL and the padded reference forward at a time."""
    budget: int | None = None
    """Tokens that the packed side forwards at a time; None: a group."""
    flat: int = 0
    """Groups of an update whose rewards are all equal."""
    updates: int = 1
    """Optimizer steps of a rollout."""
    beta: float = 0.0
    """KL coefficient."""
    lora: bool = False
    """Train an adapter of rank 16 on every linear layer."""
    vocabulary: int = VOCABULARY
    """Of the model."""
    hidden: int = 256
    """Of the model: its width."""
    layers: int = 26
    """Of the model."""
    injected: bool = True
    """Completions are given; False: each side samples its own, all of the whole length, and the clock runs meanwhile."""


def make_model(case: Case) -> Qwen2ForCausalLM:
    """Random weights, 40 million unless the case says otherwise: Qwen2.5's proportions (hidden to intermediate 3 : 16, heads
    of 64, few of keys and values), with a fifth of them in tied embeddings, as in SmolLM2-135M and Llama-3.2-1B."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 16 // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=case.vocabulary - 1,
        pad_token_id=case.vocabulary - 2,
    )
    return Qwen2ForCausalLM(config)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word, w0 w1 ..., then <pad> and <eos>."""
    words = {word: number for number, word in enumerate([*(f"w{n}" for n in range(vocabulary - 2)), "<pad>", "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@dataclass
class Data:
    """The prompts and completions of a case; every rollout has the same."""

    prompts: list[list[int]]
    """Token ids."""
    completions: list[list[list[int]]]
    """Token ids by prompt and number."""
    flat: set[str]
    """Prompts, as text, whose completions all have the same reward."""

    def reward(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The mean of the words' numbers, which hardly ever is that of another completion; 0 for no signal."""
        return [
            0.0 if prompt in self.flat else fmean(int(word.removeprefix("w")) for word in text.split())
            for prompt, text in zip(prompts, completions, strict=True)
        ]


def text_of(ids: list[int]) -> str:
    """What make_tokenizer's tokenizer decodes."""
    return " ".join(f"w{number}" for number in ids)


def make_data(case: Case) -> Data:
    """Random tokens, the same in every process."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(case.vocabulary - 2, (length,), generator=generator).tolist()

    def length() -> int:
        low = case.completion if case.equal else case.completion // 4
        return int(torch.randint(low, case.completion + 1, (), generator=generator))

    prompts = [ids(case.prompt) for _ in range(case.groups * case.updates)]
    completions = [[ids(length()) for _ in range(case.group_size)] for _ in prompts]
    flat = {text_of(prompt) for number, prompt in enumerate(prompts) if number % case.groups < case.flat}
    return Data(prompts, completions, flat)


def groups_of(data: Data) -> list[Group]:
    """The data as groups, without rewards."""
    return [
        Group(Prompt(ids, "", {}, number), [Completion(made, truncated=True) for made in completions])
        for number, (ids, completions) in enumerate(zip(data.prompts, data.completions, strict=True))
    ]
