"""What recipes/toy_sorting.yaml trains: the CS336 lecture's sorting model, by the trainer of language models.

It has no attention and no end token: every prompt has three tokens, every response three.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_hf.toy.hf_model import SortingConfig, SortingForCausalLM
from grpo_hf.toy.train import LECTURE_PROMPTS


def make_model(*, seed: int = 0) -> tuple[SortingForCausalLM, PreTrainedTokenizerFast]:
    """The lecture's sizes and initial weights. The end token lies outside the model's vocabulary: it is never sampled."""
    torch.manual_seed(seed)
    config = SortingConfig()
    vocabulary = {str(number): number for number in range(config.vocab_size)} | {"<end>": config.vocab_size}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    return SortingForCausalLM(config), fast


def make_data() -> tuple[Dataset, Dataset]:
    """The lecture's three prompts, to train on and to look at: the toy asks whether it learns them, no more."""
    rows = [{"prompt": " ".join(map(str, prompt)), "numbers": list(prompt)} for prompt in LECTURE_PROMPTS]
    return Dataset.from_list(rows), Dataset.from_list(rows)
