"""What the sides of a comparison train on: a case's model, tokenizer, prompts and completions, the same in every process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY, GROUP_SIZE = 32_000, 8
RECORDED = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """What all sides train on."""

    prompt: int
    """Tokens of every prompt, behind the system prompt where there is one."""
    completion: int
    """Tokens that the model sampled in a turn, at most; lengths are uniform between a quarter of that and the whole."""
    equal: bool = False
    """All turns have the whole length."""
    system: int = 0
    """Tokens of a system prompt that all prompts begin with."""
    turns: int = 1
    """Times that the model speaks in a completion."""
    tool: int = 0
    """Tokens of what a tool answers between two turns; nobody trains on them."""
    recorded: str | None = None
    """A file of benchmarks/data whose prompts and completions replace random ones; the sizes here are then its largest."""
    groups: int = 4
    """Prompts of an update."""
    group_size: int = GROUP_SIZE
    """Completions of a prompt."""
    rows: int = GROUP_SIZE
    """Completions that sides with padded rows forward at a time."""
    budget: int | None = None
    """Tokens that sides without padding forward at a time; None: a group."""
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

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt, the system prompt included."""
        return self.system + self.prompt

    @property
    def longest_completion(self) -> int:
        """Tokens of all turns and of what tools answered."""
        return self.turns * self.completion + (self.turns - 1) * self.tool

    @property
    def tokens(self) -> int:
        """Tokens that sides without padding forward at a time."""
        return self.budget or self.longest_prompt + self.group_size * self.longest_completion


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


def load_model(case: Case, path: str) -> Any:
    """What make_model has saved, in float32; with an adapter whose random weights are the same on all sides."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if not case.lora:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, adapter)


def base_of(model: Any) -> Any:
    """The causal language model itself, its adapter's layers inside."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word, w0 w1 ..., then <pad> and <eos>."""
    words = {word: number for number, word in enumerate([*(f"w{n}" for n in range(vocabulary - 2)), "<pad>", "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@dataclass(frozen=True)
class Transcript:
    """A completion that every side is given."""

    ids: list[int]
    """Token ids: what the model sampled, with what tools answered between its turns."""
    is_sampled: list[bool]
    """Which of them the model sampled, and is trained on."""


@dataclass
class Data:
    """The prompts and completions of a case; every rollout has the same."""

    prompts: list[list[int]]
    """Token ids."""
    completions: list[list[Transcript]]
    """By prompt and number."""
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
    """Recorded or random tokens, the same in every process."""
    prompts, completions = _recorded(case.recorded) if case.recorded else _random(case)
    flat = {text_of(prompt) for number, prompt in enumerate(prompts) if number % case.groups < case.flat}
    return Data(prompts, completions, flat)


def _recorded(name: str) -> tuple[list[list[int]], list[list[Transcript]]]:
    found = json.loads((RECORDED / name).read_text())
    return found["prompts"], [[Transcript(ids, [True] * len(ids)) for ids in group] for group in found["completions"]]


def _random(case: Case) -> tuple[list[list[int]], list[list[Transcript]]]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(case.vocabulary - 2, (length,), generator=generator).tolist()

    def length() -> int:
        low = case.completion if case.equal else case.completion // 4
        return int(torch.randint(low, case.completion + 1, (), generator=generator))

    def transcript() -> Transcript:
        turns = [ids(length())]
        for _ in range(case.turns - 1):
            turns += [ids(case.tool), ids(length())]
        sampled = [number % 2 == 0 for number, turn in enumerate(turns) for _ in turn]
        return Transcript([token for turn in turns for token in turn], sampled)

    system = ids(case.system)
    prompts = [system + ids(case.prompt) for _ in range(case.groups * case.updates)]
    return prompts, [[transcript() for _ in range(case.group_size)] for _ in prompts]
