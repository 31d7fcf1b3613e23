"""What recipes/sorting_lm.yaml trains: a small decoder, made on the spot, that sorts lists of one-digit numbers badly.

Prompt "6 3 9 0 1=", right completion "0 1 3 6 9". A short supervised warm-up teaches it the form, and to be right on
fewer than half of the lists; GRPO does the rest.
"""

from __future__ import annotations

import random
import zlib

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = "0123456789 ="


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and pad and end tokens."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def is_held_out(numbers: list[int]) -> bool:
    """One list in ten is never trained on, neither in the warm-up nor by GRPO."""
    return zlib.crc32(bytes(numbers)) % 10 == 0


def make_dataset(size: int, *, length: int = 5, seed: int = 0, held_out: bool = False) -> Dataset:
    """Random lists; `numbers` is the column that the sorting verifier reads."""
    generator = random.Random(seed)
    rows: list[dict] = []
    while len(rows) < size:
        numbers = [generator.randrange(10) for _ in range(length)]
        if is_held_out(numbers) == held_out:
            rows.append({"prompt": " ".join(map(str, numbers)) + "=", "numbers": numbers})
    return Dataset.from_list(rows)


def make_data(*, train: int = 16_384, held_out: int = 500, length: int = 5) -> tuple[Dataset, Dataset]:
    """Lists to train on, and others to evaluate on."""
    return make_dataset(train, length=length, seed=1), make_dataset(held_out, length=length, seed=2, held_out=True)


def exact_sort(completion: str, numbers: list[int]) -> float:
    """1 when the completion is the sorted list and nothing else."""
    return float(completion == " ".join(map(str, sorted(numbers))))


def make_model(
    *, seed: int = 0, warm_up_until: float = 0.15, length: int = 5
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A decoder of 1.8 million weights after a warm-up that stops at this share of exactly predicted lists."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    warm_up(model, tokenizer, until=warm_up_until, length=length, seed=seed)
    return model, tokenizer


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    until: float,
    length: int,
    seed: int,
    max_steps: int = 2000,
) -> float:
    """Supervised steps on random lists until the arg max of this share of them is right; returns the share."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    exact = 0.0
    for step in range(max_steps):
        rows = make_dataset(128, length=length, seed=1_000_000 * (seed + 1) + step)
        ids = torch.tensor(
            [
                tokenizer(row["prompt"] + " ".join(map(str, sorted(row["numbers"]))))["input_ids"] + [tokenizer.eos_token_id]
                for row in rows
            ]
        )
        start = 2 * length  # the prompt's tokens
        logits = model(input_ids=ids).logits[:, start - 1 : -1]
        targets = ids[:, start:]
        # With the right prefix given, a list is exact when every next token is the most likely one.
        exact = 0.9 * exact + 0.1 * (logits.argmax(-1) == targets).all(-1).float().mean().item()
        if exact >= until:
            break
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    return exact
