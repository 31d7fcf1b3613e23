"""For benchmarks.trl_suite: a pytest plugin that swaps the trainer, and makes what TRL's tests load from the hub."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import grpo_hf

with contextlib.redirect_stdout(io.StringIO()):
    import this  # the lines of its text are the prompts; it prints them

HUB = Path(os.environ["HUB"])
if os.environ["GRPO_SIDE"] == "grpo_hf":
    trl.GRPOTrainer, trl.GRPOConfig = grpo_hf.GRPOTrainer, grpo_hf.GRPOConfig

SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen2ForCausalLM-2.5": ("qwen2", "qwen2_5", {}),
    "Qwen3ForCausalLM": ("qwen3", "qwen3", {"head_dim": 4}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "qwen3", {"head_dim": 4} | EXPERTS),
    "LlamaForCausalLM-3.2": ("llama", "llama3", {}),
    "MistralForCausalLM-0.2": ("mistral", "qwen2_5", {}),
    "Gemma2ForCausalLM": ("gemma2", "qwen2_5", {"head_dim": 4}),
    "GptOssForCausalLM": ("gpt_oss", "qwen2_5", {"num_local_experts": 4, "head_dim": 4}),
    "Cohere2ForCausalLM": ("cohere2", "qwen2_5", {}),
    "Glm4MoeForCausalLM": (
        "glm4_moe",
        "qwen2_5",
        {"head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    ),
    "Qwen2ForSequenceClassification-2.5": ("qwen2", "qwen2_5", {"num_labels": 1}),
    "Qwen3ForSequenceClassification": ("qwen3", "qwen3", {"num_labels": 1, "head_dim": 4}),
    "LlamaForSequenceClassification-3.2": ("llama", "llama3", {"num_labels": 1}),
}
"""By the end of its name on the hub: the architecture, TRL's chat template, what its config has besides."""

WORDS: dict[int, str] = {
    293: " b", 314: " {", 330: ' "', 397: ">\n", 411: "out", 450: "de", 497: '",', 522: "</", 606: "name", 788: '":',
    894: " any", 927: "sh", 944: "'t", 1318: "text", 1414: " know", 1513: " don", 2765: " won", 4913: '{"',
    5212: ' {"', 5392: " tool", 6023: "hi", 6659: "call", 7692: "async", 9520: "step", 11248: "}}\n",
    13477: "crement", 14172: "tool", 16252: " increment", 16370: "arguments", 17453: "Done", 22785: "_tool",
    35744: "increment", 64648: "multiply", 93054: "_multiply", 95642: '"}}\n',
}  # fmt: skip
"""Of Qwen's vocabulary, what the tests have as ids."""
SPECIAL = {151_643: "<|endoftext|>", 151_644: "<|im_start|>", 151_645: "<|im_end|>"}
MARKS = {151_657: "<tool_call>", 151_658: "</tool_call>", 151_665: "<tool_response>", 151_666: "</tool_response>"}
MARKS |= {151_667: "<think>", 151_668: "</think>"}


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Bytes, so that texts become bytes, and for the template of Qwen3 the words and marks that tests know by Qwen's ids."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()
    vocabulary = {letter: number for number, letter in enumerate(alphabet.values())}
    special, marks = ({256 + k: v for k, v in enumerate(SPECIAL.values())}, {})
    if template == "qwen3":
        vocabulary |= {"".join(alphabet[byte] for byte in word.encode()): number for number, word in WORDS.items()}
        special, marks = SPECIAL, MARKS
    vocabulary |= {token: number for number, token in (special | marks).items()}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in marks.values()])
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    found.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return found


def make_model(name: str) -> Path:
    """A folder with a model of that name, made when it is first asked for."""
    folder = HUB / name
    if not folder.is_dir():
        kind, template, more = KINDS[name.partition("tiny-")[2]]
        torch.manual_seed(0)
        made = tokenizer(template)
        ids = {"pad_token_id": made.pad_token_id, "eos_token_id": made.eos_token_id, "bos_token_id": None}
        ids["vocab_size"] = 151_936 if template == "qwen3" else 512
        config = AutoConfig.for_model(kind, **SIZES | ids | more)
        auto = AutoModelForSequenceClassification if "num_labels" in more else AutoModelForCausalLM
        model = auto.from_config(config)
        model.save_pretrained(folder)
        made.save_pretrained(folder)
    return folder


def rows(config: str) -> datasets.Dataset:
    """Data with the columns of one of TRL's configurations."""
    text = "".join(this.d.get(letter, letter) for letter in this.s)
    lines = [line for line in text.splitlines() if len(line.split()) > 3][:4]
    halves = [(" ".join(line.split()[:3]), " " + " ".join(line.split()[3:])) for line in lines]
    chat = config.startswith("conversational")
    user, assistant = (
        (lambda text: [{"role": "user", "content": text}]),
        (lambda text: [{"role": "assistant", "content": text}]),
    )
    columns: dict[str, list[Any]] = {"prompt": [user(first) if chat else first for first, _ in halves]}
    if not config.endswith("prompt_only"):
        columns["completion"] = [assistant(second) if chat else second for _, second in halves]
    return datasets.Dataset.from_dict(columns)


def load_dataset(name: str, config: str = "", *, split: str | None = None, streaming: bool = False, **options: Any) -> Any:
    """Both splits have the same rows."""
    table: Any = rows(config)
    table = table.to_iterable_dataset() if streaming else table
    kind = datasets.IterableDatasetDict if streaming else datasets.DatasetDict
    return table if split else kind(train=table, test=table)


def local(load: Any) -> Any:
    """`from_pretrained` that finds the names of the tests in the folder."""

    def from_pretrained(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
        known = isinstance(name, str) and name.startswith("trl-internal-testing/")
        made = load.__func__(cls, str(make_model(name)) if known else name, *args, **options)
        return made

    return classmethod(from_pretrained)


# Tests of another release than the installed one may ask whether something is installed that this one does not know of.
importlib.import_module("trl.import_utils").__getattr__ = lambda name: lambda *args, **options: False
datasets.load_dataset = load_dataset
LOADERS = ("AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
for cls in (getattr(transformers, name) for name in (*LOADERS, "PreTrainedModel", "PreTrainedConfig")):
    cls.from_pretrained = local(cls.from_pretrained)
