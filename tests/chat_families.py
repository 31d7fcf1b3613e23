"""Tokenizers with the chat templates of model families, made on the spot: byte-level BPE and the family's special tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "data" / "chat_templates"


@dataclass(frozen=True)
class Family:
    """A chat template and what its tokenizer has to know."""

    special: str
    """Its special tokens, apart by spaces; the first is the one that ends a sequence."""
    plain: str = ""
    """Tokens of its own that are not special."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """For the template."""
    thinks: bool = False
    """Whether it shows thinking."""
    several: bool = True
    """Whether it shows two calls in a turn."""


CHATML = "<|im_end|> <|im_start|> <|endoftext|>"
THINK = "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>"
LLAMA = "<|eot_id|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|python_tag|>"
DEEPSEEK = "<｜end▁of▁sentence｜> <｜begin▁of▁sentence｜>"
DEEPSEEK_PLAIN = "<｜User｜> <｜Assistant｜> <think> </think> <｜tool▁sep｜> " + " ".join(
    f"<｜tool▁{what}▁{side}｜>" for what in ("calls", "call", "outputs", "output") for side in ("begin", "end")
)
BEGINS = {"<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>"}

FAMILIES = {
    "qwen2.5": Family(CHATML, "<tool_call> </tool_call>"),
    "qwen3": Family(CHATML, THINK, thinks=True),
    "qwen3_coder": Family(CHATML, "<tool_call> </tool_call>"),
    "qwen3.5": Family(CHATML, THINK, thinks=True),
    "qwq": Family(CHATML, "<tool_call> </tool_call>", kwargs={"enable_thinking": True}),
    "hermes": Family(CHATML + " <|begin_of_text|>"),
    "llama3.1": Family(LLAMA, several=False),
    "llama3.2": Family(LLAMA, several=False, kwargs={"date_string": "26 Jul 2024"}),
    "mistral_nemo": Family(
        "</s> <s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS]"
    ),
    "mistral_small3.2": Family(
        "</s> <s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
        "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT] [ARGS] [CALL_ID]"
    ),
    "gpt_oss": Family(
        "<|return|> <|startoftext|> <|start|> <|end|> <|message|> <|channel|> <|constrain|> <|call|>",
        thinks=True,
        several=False,
        kwargs={"strftime_now": lambda form: "2026-01-02"},
    ),
    "deepseek_v3": Family(DEEPSEEK, DEEPSEEK_PLAIN),
    "deepseek_v3.1": Family(DEEPSEEK, DEEPSEEK_PLAIN),
    "glm4.5": Family(
        "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
        THINK + " <arg_key> </arg_key> <arg_value> </arg_value>",
        thinks=True,
    ),
    "gemma4": Family(
        "<turn|> <bos> <eos> <|turn> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|channel> "
        '<channel|> <|think|> <|"|>',
        thinks=True,
        kwargs={"enable_thinking": True},
    ),
    "lfm2.5": Family(CHATML + " <|startoftext|>", "<|tool_call_start|> <|tool_call_end|> <think> </think>", thinks=True),
    "smollm2": Family(CHATML),
}


@cache
def _words() -> str:
    """A vocabulary with merges, so that where a text is cut can be told from its ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=["<pad>"]
    )
    tokenizer.train_from_iterator([path.read_text() for path in sorted(TEMPLATES.glob("*.jinja"))], trainer)
    return tokenizer.to_str()


def family_tokenizer(name: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's tokens and its template, or another."""
    family, words = FAMILIES[name], Tokenizer.from_str(_words())
    special = family.special.split()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token=special[0])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain.split()])
    tokenizer.bos_token = next(iter(BEGINS & set(special)), None)
    tokenizer.chat_template = template or (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer
