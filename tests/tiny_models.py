"""Tiny random models and tokenizers, made in a moment without a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.samples import VOCAB

torch.set_num_threads(1)  # at these sizes threads wait for each other more than they work, on a busy machine above all

WORDS = [f"w{number}" for number in range(VOCAB - 2)]

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

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES | {"tie_word_embeddings": True},
    "qwen3": SIZES,
    "mistral": SIZES | {"sliding_window": 4},
    "gemma": SIZES,
    "gemma2": SIZES | {"sliding_window": 4, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0},
    "gpt2": GPT2_SIZES | NO_DROPOUT,
}
"""One config of each; Mistral's and Gemma 2's windows are shorter than the sequences, and Gemma 2 caps its scores."""

MIXTURES = {
    "qwen3_moe": SIZES | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Mixtures of experts, whose gradients are compared like those of the families."""


def tiny_model(family: str = "qwen2", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of the family, of SIZES where none is above, with random weights and biases; ``changes`` to its config."""
    torch.manual_seed(seed)
    config = (FAMILIES | MIXTURES).get(family, SIZES) | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=STD)
    return model.eval()


def tiny_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token a word, then <pad> and <eos>."""
    vocabulary = {word: number for number, word in enumerate([*words, "<pad>", "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def gradient_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole gradient, by parameter."""
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    return {name: getattr(g, "full_tensor", lambda g=g: g)().clone() for name, g in trained}


def relative_error(gradient: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|g - expected| / |expected|, over all parameters."""
    assert gradient.keys() == expected.keys()
    difference = torch.cat([(gradient[name] - expected[name]).flatten() for name in expected])
    return (difference.norm() / torch.cat([part.flatten() for part in expected.values()]).norm()).item()
