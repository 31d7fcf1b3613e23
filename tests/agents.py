"""Agents for tests: a chat model with random weights that calls tools all the time, since each call is one of its tokens."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback

from grpo_hf import GRPOConfig, GRPOTrainer
from tests.chat_families import TEMPLATES
from tests.tiny_models import tiny_model


def call(name: str, **arguments: Any) -> str:
    """A call as Qwen2.5 writes it."""
    inside = ", ".join(f'"{key}": {value}' for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{inside}}}}}\n</tool_call>'


SPECIAL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]
WORDS = ["one", "two", "three", "four", "five", "six", "\n", "user\n", "assistant\n", "system\n"]
TOKENS = [
    "<unk>",
    *SPECIAL,
    *WORDS,
    *(call(name, place=place) for name in ("dice", "look") for place in (1, 2, 3)),
    call("nothing"),
    call("look", wrong=1),
]
STOPS = [TOKENS.index(token) for token in ("<|im_end|>", "three", "four", "five")]
"""What ends a turn: the end-of-turn token, and words, so that turns are short."""


def agent_tokenizer(template: str = "qwen2.5") -> PreTrainedTokenizerFast:
    """One token for each of TOKENS, and for all between them an unknown one."""
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(TOKENS)}, unk_token="<unk>"))
    known = "|".join(re.escape(token) for token in sorted(TOKENS, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(known), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=(TEMPLATES / f"{template}.jinja").read_text(),
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


def agent_model(*, vllm: bool = False, **changes: Any) -> PreTrainedModel:
    """Its weights are so small that it says a bit of everything; ``vllm``: with heads as large as vLLM's kernels need."""
    changes |= {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32} if vllm else {}
    ids = {"eos_token_id": 1, "pad_token_id": 3, "bos_token_id": None}
    model = tiny_model(vocab_size=len(TOKENS), initializer_range=0.05, max_position_embeddings=256, **ids, **changes)
    model.generation_config.eos_token_id = STOPS
    return model


def dice(place: int) -> str:
    """Throw a die.

    Args:
        place: Where it is thrown.
    """
    return ["one", "two", "six"][random.randrange(3)]


def look(place: int) -> str:
    """Look somewhere.

    Args:
        place: Where.
    """
    return {1: "one", 2: "two"}[place]


class Room:
    """An environment: what was looked at stays known, and the reward is how many places that is."""

    def reset(self, size: int = 1, **row: Any) -> str:
        """Begin."""
        self.size, self.seen = size, []
        return " two"

    def look(self, place: int) -> str:
        """Look somewhere.

        Args:
            place: Where.
        """
        self.seen.append(place)
        return f"{random.choice(['one', 'two'])} six"

    def get_reward(self) -> float:
        """Places that were looked at."""
        return float(len(set(self.seen)))


ROWS = [
    {"prompt": [{"role": "user", "content": text}], "size": n} for n, text in enumerate(["one", "two", "one two", "six"])
]


def calls_in_time(completions: list[list[dict[str, Any]]], **kwargs: Any) -> list[float]:
    """How many answers of tools a conversation has, and a bit for the words in it."""
    said = ["".join(str(message["content"]) for message in messages) for messages in completions]
    tools = [sum(message["role"] == "tool" for message in messages) for messages in completions]
    return [count + 0.1 * text.count("one") for count, text in zip(tools, said, strict=True)]


def agent_trainer(
    folder: Path, *, model: PreTrainedModel | None = None, rows: Any = ROWS, reward: Any = calls_in_time, **settings: Any
) -> GRPOTrainer:
    """A trainer of such an agent; ``settings`` are arguments of it or of its GRPOConfig."""
    names = ("tools", "tokenizer", "environment_factory", "rollout_func", "eval_dataset", "callbacks", "peft_config")
    own = {name: settings.pop(name) for name in names if name in settings}
    defaults: dict[str, Any] = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 60,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "save_rollouts": False,
        "write_report": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "tool_workers": 2,
    }
    args = GRPOConfig(output_dir=str(folder), **(defaults | settings))
    tokenizer = own.pop("tokenizer", None) or agent_tokenizer()
    trainer = GRPOTrainer(model or agent_model(), reward, args, rows, processing_class=tokenizer, **own)
    trainer.remove_callback(PrinterCallback)
    return trainer
