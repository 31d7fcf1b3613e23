"""Conversations as token ids, with the chat templates of model families."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from grpo_hf.episodes.chat import Chat
from grpo_hf.types import Branch, Message, ToolCall
from tests.chat_families import FAMILIES, family_tokenizer


def schema(name: str, **types: str) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": f"The {key}."} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": f"Gives the {name}.", "parameters": parameters}}


SCHEMAS = [schema("weather", city="string", days="integer"), schema("add", a="number", b="number")]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How is the weather?"}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def result(name: str, content: str) -> Message:
    return {"role": "tool", "name": name, "content": content}


def make_chat(name: str, template: str | None = None, **kwargs: Any) -> Chat:
    return Chat(family_tokenizer(name, template), chat_template_kwargs=FAMILIES[name].kwargs | kwargs)


def rendered(chat: Chat, name: str, messages: list[Message], **options: Any) -> str:
    """What transformers makes of a conversation, given ids of calls, and arguments as DeepSeek V3 takes them."""
    messages, waiting, number = copy.deepcopy(messages), [], 0
    for message in messages:
        for item in message.get("tool_calls", []):
            item.setdefault("id", f"call{number:05d}")
            waiting.append(item["id"])
            number += 1
            if name == "deepseek_v3":
                item["function"]["arguments"] = json.dumps(item["function"]["arguments"])
        if message["role"] == "tool":
            message["tool_call_id"] = waiting.pop(0)
    options = FAMILIES[name].kwargs | options
    return chat.tokenizer.apply_chat_template(messages, tools=SCHEMAS, tokenize=False, **options)


def encoded(chat: Chat, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def writes(chat: Chat, name: str, message: Message, context: list[int]) -> list[int]:
    """The ids of a model that writes this message as its template does, after its context."""
    whole = rendered(chat, name, [USER, message])
    seen = rendered(chat, name, [USER], add_generation_prompt=True)
    if name in ("qwq", "deepseek_v3"):  # thinking is not in the history that these show: it is written, and then the rest
        seen = seen.removesuffix("<think>\n")
        whole = whole.replace(seen, seen + f"{message['content']}\n</think>\n\n".removeprefix("\n"), 1)
    assert whole.startswith(seen)
    text = whole.removeprefix(seen).removesuffix("\n")
    if name == "glm4.5":
        text += "<|observation|>" if "tool_calls" in message else "<|user|>"
    for start in ("<think>\n", "<|channel>thought\n"):  # which the context may have at its end
        if chat.tokenizer.decode(context).endswith(start):
            text = text.removeprefix(start)
    return encoded(chat, text)


# For each family: where the history is shown otherwise after a turn (r), or is appended to (.). Nemo shows its system
# message and the tools with the last user message only; those whose thinking is dropped at the next question are the others.
REWRITES = {
    "qwen2.5": ".....",
    "qwen3": "..r.r",
    "qwen3_coder": ".....",
    "qwen3.5": "..r.r",
    "hermes": ".....",
    "llama3.1": ".....",
    "llama3.2": ".....",
    "mistral_nemo": "r.rrr",
    "mistral_small3.2": "..r.r",
    "gpt_oss": "..r.r",
    "deepseek_v3.1": ".....",
    "glm4.5": "..r.r",
    "gemma4": "..r.r",
    "lfm2.5": "..r.r",
}


@pytest.mark.parametrize("name", REWRITES)
def test_every_sampled_id_stands_once_where_it_was_sampled_and_the_rest_is_the_templates(name):
    family, chat = FAMILIES[name], make_chat(name)
    thought = {chat.template.thinking_key: "Let me see."} if family.thinks else {}
    assert bool(chat.template.thinking_key) == family.thinks
    first = [call("weather", city="Paris", days=3), call("add", a=1, b=2.5)][: 2 if family.several else 1]
    turns = [
        ([*first], thought, "", [result("weather", "sunny, 20°"), result("add", "3.5")][: len(first)]),
        ([call("add", a=1, b='x"y')], thought, "", [result("add", "error: b must be a number")]),
        ([], {}, '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>', [{"role": "user", "content": "No call."}]),
        ([call("weather", city="Rome", days=1)], thought, "", [result("weather", "")]),
        ([], thought, "It is sunny.", [{"role": "user", "content": "And tomorrow?"}]),
        ([], thought, "Rain.", []),
    ]
    messages = [SYSTEM, USER]
    context = chat.opening(messages, SCHEMAS)
    assert context == encoded(chat, rendered(chat, name, messages, add_generation_prompt=True))
    branches, is_sampled, sampled, rewrites = [], [False] * len(context), [], ""
    for calls, thinking, content, new in turns:
        said = {"role": "assistant", "content": content, **thinking} | ({"tool_calls": calls} if calls else {})
        ids = writes(chat, name, said, context)
        message, read = chat.read(ids, SCHEMAS, context)
        assert read == [ToolCall(item["function"]["name"], item["function"]["arguments"]) for item in calls]
        assert message["content"].strip() == content and thinking.items() <= message.items()
        context, is_sampled, sampled = context + ids, is_sampled + [True] * len(ids), sampled + ids
        messages = [*messages, message]
        if not new:
            break
        following, rewritten = chat.follow(context, messages, new, SCHEMAS)
        rewrites += "r" if rewritten else "."
        if rewritten:
            branches.append(Branch(context, is_sampled, None))
            is_sampled = []
        else:
            assert following[: len(context)] == context
        is_sampled = is_sampled + [False] * (len(following) - len(is_sampled))
        context, messages = following, messages + new
        whole = encoded(chat, rendered(chat, name, messages, add_generation_prompt=True))
        if name == "hermes":  # its results are followed by a line's end only once something comes after them
            assert "".join(chat.tokenizer.decode(context).split()) == "".join(chat.tokenizer.decode(whole).split())
        else:
            assert context == whole
    assert rewrites == REWRITES[name]
    branches.append(Branch(context, is_sampled, None))
    kept = [[i for i, mine in zip(b.ids, b.is_sampled, strict=True) if mine] for b in branches]
    assert [i for part in kept for i in part] == sampled and len(kept) == rewrites.count("r") + 1
    if name in ("qwen2.5", "llama3.2", "deepseek_v3.1"):
        assert context == encoded(chat, rendered(chat, name, messages).removesuffix("\n"))
