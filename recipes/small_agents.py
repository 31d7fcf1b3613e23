"""A chat model for recipes with tools: a tokenizer and a decoder of 1.1 million weights, made on the spot.

A short supervised warm-up on a recipe's demonstrations teaches it the form of turns, calls and answers; GRPO does the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_linear_schedule_with_warmup,
)

from grpo_hf.rewards.loading import choose

CHAT_TEMPLATE = """\
{%- if tools -%}
<|im_start|>system
Call tools as <tool_call>
{"name": ..., "arguments": {...}}
</tool_call>.
{% for tool in tools -%}
{{ tool | tojson }}
{% endfor -%}
<|im_end|>
{% endif -%}
{% for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == "assistant" -%}
{% generation -%}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{%- endgeneration %}

{% else -%}
{{ message.content }}<|im_end|>
{% endif -%}
{% endfor -%}
{% if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
"""Turns between <|im_start|> and <|im_end|>, calls in the form of Hermes and Qwen, tools' answers in turns of their own."""

Demonstrations = Callable[[int, random.Random], tuple[list[list[dict[str, Any]]], list[Any]]]
"""(how many, random numbers) -> conversations as messages, and the tools that they have."""


def make_model(
    *, demonstrations: str, seed: int = 0, conversations: int = 4096, steps: int = 150, digits: int = 1
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model after a warm-up of so many steps on what `path/file.py:function` demonstrates.

    ``digits``: of a token, at most. A number that is one token is easier to reckon with, and one of many harder to copy.
    """
    torch.manual_seed(seed)
    generator = random.Random(seed)
    shown, tools = choose("demonstrations", demonstrations, {})(conversations, generator)
    tokenizer = make_tokenizer(shown, tools, digits)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=5,  # 32 wide, which vLLM's attention on the CPU needs
        num_key_value_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    encoded: Any = tokenizer.apply_chat_template(
        shown, tools=tools, return_dict=True, return_assistant_tokens_mask=True, padding=True, return_tensors="pt"
    )
    warm_up(model, encoded["input_ids"], encoded["assistant_masks"].bool(), steps=steps, generator=generator)
    return model, tokenizer


def make_tokenizer(conversations: list[list[dict[str, Any]]], tools: list[Any], digits: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of what stands between numbers, marks and roles: a call's JSON is one token up to its numbers."""
    empty = Tokenizer(models.BPE())
    parts = pre_tokenizers.Split(Regex(rf"\d{{1,{digits}}}|<[^<>\s]+>|(system|user|assistant|tool)\n"), behavior="isolated")
    empty.pre_tokenizer = pre_tokenizers.Sequence([parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    empty.decoder = decoders.ByteLevel()
    base = PreTrainedTokenizerFast(
        tokenizer_object=empty,
        chat_template=CHAT_TEMPLATE,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
    )
    texts = base.apply_chat_template(conversations, tools=tools, tokenize=False)
    return base.train_new_from_iterator(texts, vocab_size=2000, show_progress=False)


def warm_up(
    model: PreTrainedModel, ids: torch.Tensor, spoken: torch.Tensor, *, steps: int, generator: random.Random, batch: int = 32
) -> None:
    """Supervised steps on what the assistant says in random conversations [conversations time]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    for _ in range(steps):
        rows = generator.sample(range(len(ids)), batch)
        longest = int(spoken[rows].nonzero()[:, 1].max()) + 1  # after which there is padding alone
        tokens, trained = ids[rows, :longest], spoken[rows, 1:longest]
        hidden = model.base_model(input_ids=tokens).last_hidden_state[:, :-1][trained]
        optimizer.zero_grad()
        cross_entropy(model.get_output_embeddings()(hidden), tokens[:, 1:][trained]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
