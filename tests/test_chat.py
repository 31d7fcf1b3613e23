"""Conversations as token ids, with the chat templates of model families."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from grpo_hf.episodes.calls import FORMS
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


PARIS = call("weather", city="Paris", days=3)


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
    first = [PARIS, call("add", a=1, b=2.5)][: 2 if family.several else 1]
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


# Shows what there are for tools and what they have answered, but calls only where they stand in the content, as SmolLM3's.
IN_CONTENT = """{% if tools %}<|im_start|>system
Tools: {{ tools | tojson }}
Write <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
HEAD = "<|im_start|>assistant\n"
NEXT = "\n<|im_start|>user\nAnd?<|im_end|>\n" + HEAD


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen2.5", '<tool_call>{"arguments":{"days":3,"city":"Paris"},"name":"weather"}</tool_call><|im_end|>'),
        ("qwen3", '<tool_call>\n{"name":"weather", "arguments":{"city":"Paris","days":3}}\n</tool_call>\n<|im_end|>'),
        ("qwen3", '<think>Hm.</think> <tool_call>{"name":"weather","arguments":{"city":"Paris", "days":3}}</tool_call>'
         "<|im_end|>"),
        ("glm4.5", "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value>\n\n"
         "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call><|observation|>"),
        ("llama3.1", '{"name":"weather","parameters":{"city":"Paris","days":3}}<|eot_id|>'),
        ("llama3.1", '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris", "days": 3}}<|eot_id|>'),
    ],
)  # fmt: skip
def test_what_a_model_spells_otherwise_stays_as_it_was_sampled(name, text):
    chat = make_chat(name)
    opening = chat.opening([USER], SCHEMAS)
    message, calls = chat.read(encoded(chat, text), SCHEMAS)
    assert [(c.name, c.arguments) for c in calls] == [("weather", {"city": "Paris", "days": 3})]
    new = [result("weather", "sunny")]
    context = opening + encoded(chat, text)
    following, rewritten = chat.follow(context, [USER, message], new, SCHEMAS)
    assert not rewritten and following[: len(context)] == context
    whole = rendered(chat, name, [USER, message, *new], add_generation_prompt=True)
    added = chat.tokenizer.decode(following[len(context) :])
    assert "sunny" in added and whole.endswith(added)
    ends = text[text.rindex("<|") :]
    assert whole.removesuffix(added).endswith(ends) and following == context + encoded(chat, ends + added)[1:]


@pytest.mark.parametrize(
    ("name", "sampled", "tail", "rewritten"),
    [
        ("qwen2.5", "Yes.<|im_end|>", "Yes.<|im_end|>" + NEXT, False),
        ("qwen2.5", "Yes.<|endoftext|>", "Yes.<|endoftext|>" + NEXT, False),
        ("qwen2.5", "Yes\n", "Yes\n<|im_end|>" + NEXT, False),
        ("qwen2.5", "<|im_end|>", "assistant\n<|im_end|>" + NEXT, False),
        ("llama3.1", "Yes.<|eom_id|>", "Yes.<|eom_id|><|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("gpt_oss", "<|channel|>final<|message|>Yes.<|return|>", "<|channel|>final<|message|>Yes.<|end|>"
         "<|start|>user<|message|>And?<|end|><|start|>assistant", True),
        ("glm4.5", "\n<think></think>\nYes.<|user|>", "\nYes.<|user|>\nAnd?<|assistant|>", False),
        ("glm4.5", "\n<think></think>\nYes.", "\nYes.<|user|>\nAnd?<|assistant|>", False),
        ("glm4.5", "\n<think></think>\nYes.<|observation|>", "\nYes.<|user|>\nAnd?<|assistant|>", True),
    ],
)  # fmt: skip
def test_how_a_turn_ended(name, sampled, tail, rewritten):
    chat = make_chat(name)
    ids = encoded(chat, sampled)
    context = chat.opening([USER], SCHEMAS) + ids
    following, otherwise = chat.follow(context, [USER, chat.read(ids)[0]], [{"role": "user", "content": "And?"}], SCHEMAS)
    assert chat.tokenizer.decode(following).endswith(tail) and otherwise == rewritten
    assert (following[: len(context)] == context) == (not rewritten)


def test_ids_of_calls_are_the_models_where_the_template_can_show_them():
    chat = make_chat("mistral_nemo")
    opening = chat.opening([USER], SCHEMAS)
    for written, shown in (("abcdefghi", "abcdefghi"), ("1", "call00000")):
        ids = encoded(chat, f'[TOOL_CALLS][{{"name": "add", "arguments": {{"a": 1, "b": 2}}, "id": "{written}"}}]</s>')
        following, rewritten = chat.follow(opening + ids, [USER, chat.read(ids)[0]], [result("add", "3")], SCHEMAS)
        assert not rewritten
        told = chat.tokenizer.decode(following[len(opening + ids) :])
        assert told == f'[TOOL_RESULTS]{{"content": 3, "call_id": "{shown}"}}[/TOOL_RESULTS]'


@pytest.mark.parametrize(
    ("name", "special", "stop", "head"),
    [
        ("qwen2.5", "<|im_end|>", "<|im_end|>", "\n<|im_start|>user\n<tool_response>\n"),
        ("qwen3", "<|im_end|>", "<|im_end|>", "\n<|im_start|>user\n<tool_response>\n"),
        ("glm4.5", "<|user|>", "<|observation|>", "\n<tool_response>\n"),
    ],
)
def test_text_of_special_tokens_moves_no_end(name, special, stop, head):
    chat = make_chat(name)
    said = {"role": "assistant", "content": "", "tool_calls": [call("weather", city=special, days=3)]}
    text = rendered(chat, name, [USER, said])
    text = text[text.rindex("<tool_call>") :].removesuffix("<|im_end|>\n")
    ids = chat.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] + encoded(chat, stop)
    context = chat.opening([USER], SCHEMAS) + ids
    message, calls = chat.read(ids, SCHEMAS)
    assert calls[0].arguments["city"] == special and encoded(chat, special)[0] not in ids[:-1]
    following, rewritten = chat.follow(context, [USER, message], [result("weather", f"a{special}b")], SCHEMAS)
    assert not rewritten
    assert chat.tokenizer.decode(following[len(context) :]).startswith(f"{head}a{special}b\n</tool_response>")


def test_special_tokens_within_an_answer_are_not_in_its_content():
    chat = make_chat("llama3.1")
    message, _ = chat.read(encoded(chat, "Yes<|eom_id|> no<|python_tag|><|eot_id|>"))
    assert message == {"role": "assistant", "content": "Yes no"}


def test_a_preamble_beside_thinking_that_the_template_cannot_show_with_it_stays_in_the_ids():
    chat = make_chat("gpt_oss")
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.weather<|message|>{"city": "Paris", "days": 3}<|call|>'
    )
    context = chat.opening([USER], SCHEMAS) + encoded(chat, text)
    message, _ = chat.read(encoded(chat, text))
    assert message == {"role": "assistant", "content": "I look.", "thinking": "Hm.", "tool_calls": [PARIS]}
    following, rewritten = chat.follow(context, [USER, message], [result("weather", "sunny")], SCHEMAS)
    assert not rewritten and following[: len(context)] == context


def test_what_is_added_is_tokenized_as_what_follows_on_a_special_token():
    chat = make_chat("qwen2.5")
    first_word_is_marked = pre_tokenizers.Metaspace(prepend_scheme="first")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    chat.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first_word_is_marked, byte_level])
    messages, new = [USER, {"role": "assistant", "content": "", "tool_calls": [PARIS]}], [result("weather", "sunny")]
    said = rendered(chat, "qwen2.5", messages)
    ids = encoded(chat, said[said.rindex("<tool_call>") :].removesuffix("\n"))
    following, _ = chat.follow(chat.opening([USER], SCHEMAS) + ids, messages, new, SCHEMAS)
    assert following == encoded(chat, rendered(chat, "qwen2.5", messages + new, add_generation_prompt=True))


@pytest.mark.parametrize(
    ("shown", "sampled", "rewritten"),
    [
        ("m.content", "<think>Hm.</think>Yes.", False),
        ("m.content.split('</think>')[-1]", "Yes.", False),
        ("m.content.split('</think>')[-1]", "<think>Hm.</think>Yes.", True),
        ("m.content if loop.last or m.role != 'assistant' else '...'", "Yes.", True),
        ("m.content if loop.last else m.content | trim", " Yes. ", False),
    ],
)
def test_what_is_a_rewrite(shown, sampled, rewritten):
    chat = make_chat("qwen2.5", IN_CONTENT.replace("m.content", shown))
    ids = encoded(chat, sampled + "<|im_end|>")
    context, messages = chat.opening([USER], SCHEMAS) + ids, [USER, chat.read(ids)[0]]
    following, otherwise = chat.follow(context, messages, [{"role": "user", "content": "And?"}], SCHEMAS)
    assert otherwise == rewritten and (following[: len(context)] == context) == (not rewritten)
    assert chat.tokenizer.decode(following).endswith(NEXT)


def hermes(text: str) -> str:
    return f"<tool_call>{text}</tool_call>"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen2.5", hermes('{"name": "add", "arguments": [1]}')),
        ("qwen2.5", hermes('{"name": "add", "arguments": "{}"}')),
        ("qwen2.5", hermes('{"name": "add"}')),
        ("qwen2.5", hermes('{"name": ["add"], "arguments": {}}')),
        ("qwen2.5", hermes('{"name": "add", "arguments": {"a": "\\ud800"}}')),
        ("qwen2.5", hermes('{"name": "add", "arguments": {}} {"name": "add", "arguments": {}}')),
        ("qwen2.5", hermes('{"name": "add", "arguments": {}}') + "<tool_call>{"),
        ("qwen2.5", hermes("")),
        ("qwen2.5", hermes("[" * 50_000)),
        ("qwen2.5", hermes('{"name": "add", "arguments": {"a": ' + "[" * 300 + "]" * 300 + "}}")),
        ("qwen2.5", '<tool_call>{"name": "add", "arguments": {}}'),
        ("qwen2.5", '{"name": "add", "arguments": {}}'),
        ("qwen3", "<think>" + hermes('{"name": "add", "arguments": {"a": 1}}') + "</think>"),
        ("qwen3_coder", "<tool_call><function=add><parameter=a>1</parameter><parameter=b>2</function></tool_call>"),
        ("qwen3_coder", hermes("<function=add><parameter=a>" + "[" * 300 + "]" * 300 + "</parameter></function>")),
        ("qwen3_coder", hermes('<function=add><parameter=a>"\\ud800"</parameter></function>')),
        ("qwen3_coder", "<tool_call><parameter=a>1</parameter></tool_call>"),
        ("llama3.1", 'Sure: {"name": "add", "parameters": {}}'),
        ("llama3.1", '{"name": "add", "parameters": {}}; {"name": "add", "parameters": {}}'),
        ("llama3.1", '{"name": "add", "parameters": {}} I hope.'),
        ("mistral_nemo", '[TOOL_CALLS][{"name": "add", "arguments": 1}]'),
        ("mistral_small3.2", "[TOOL_CALLS]add[ARGS]"),
        ("mistral_small3.2", "[TOOL_CALLS]add"),
        ("gpt_oss", "<|channel|>commentary to=functions.add<|message|>{"),
        ("glm4.5", "<tool_call>add\n<arg_key>a</arg_key></tool_call>"),
        ("glm4.5", hermes('{"name": "add", "arguments": {}}')),
        ("deepseek_v3.1", "<｜tool▁call▁begin｜>add{}<｜tool▁call▁end｜>"),
        ("gemma4", "<|tool_call>call:add{a:}<tool_call|>"),
        ("gemma4", "<|tool_call>add<tool_call|>"),
        ("lfm2.5", "<|tool_call_start|>[add(1, 2)]<|tool_call_end|>"),
        ("lfm2.5", "<|tool_call_start|>[add(a=open)]<|tool_call_end|>"),
        ("lfm2.5", "<|tool_call_start|>" + "(" * 50_000 + "<|tool_call_end|>"),
    ],
)  # fmt: skip
def test_what_is_no_call_is_content(name, text):
    chat = make_chat(name)
    message, calls = chat.read(encoded(chat, text), SCHEMAS)
    assert not calls and "tool_calls" not in message
    if name in ("qwen2.5", "qwen3_coder", "llama3.1"):
        assert message == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("form", "text", "said", "functions"),
    [
        ("hermes", '[{"name": "f", "arguments": {"a": "</tool_call>"}}, {"name": "g", "arguments": {}}]',
         "Now  then", [("f", {"a": "</tool_call>"}), ("g", {})]),
        ("qwen_coder", "<function=f>\n<parameter=a>\n 1\n</tool_call>\n</parameter></function>",
         "Now  then", [("f", {"a": " 1\n</tool_call>"})]),
        ("glm", "f\n<arg_key>a</arg_key>\n<arg_value>x\ny</arg_value>\n", "Now  then", [("f", {"a": "x\ny"})]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1} [TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}', "", [("f", {"a": 1}), ("g", {})]),
        ("harmony", '<|channel|>commentary<|message|>Now.<|end|><|start|>assistant<|channel|>commentary to=functions.f '
         '<|constrain|>json<|message|>{"a": 1}<|call|>', "Now.", [("f", {"a": 1})]),
        ("deepseek", '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>',
         "", [("f", {"a": 1})]),
        ("function_gemma", "<start_function_call>call:f{a:<escape>x{y:1}<escape>,b:{c:[1,true]}}<end_function_call>",
         "", [("f", {"a": "x{y:1}", "b": {"c": [1, True]}})]),
        ("phi", '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|>', "", [("f", {"a": 1})]),
        ("python", "<|tool_call_start|>[f(a='x', b={\"c\": true}, d=None), g.h()]<|tool_call_end|>",
         "", [("f", {"a": "x", "b": {"c": True}, "d": None}), ("g.h", {})]),
        ("llama", '{"name": "f", "parameters": {"a": 1}};\n{"name": "g", "parameters": {}}',
         "", [("f", {"a": 1}), ("g", {})]),
    ],
)  # fmt: skip
def test_forms_of_calls(form, text, said, functions):
    read = FORMS[form].read
    found = read(f"Now {hermes(text)} then" if said == "Now  then" else text)
    assert found[0].strip() == said
    assert [(item["function"]["name"], item["function"]["arguments"]) for item in found[1]] == functions


def test_values_without_a_type_of_their_own_have_the_schemas():
    chat = make_chat("qwen3_coder")
    values = {"s": "7", "i": "7", "f": "2.5", "b": "True", "l": '["x"]', "n": "x"}
    kinds = {"s": "string", "i": "integer", "f": "number", "b": "boolean", "l": "array", "n": "integer"}
    text = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    _, calls = chat.read(encoded(chat, hermes(f"<function=f>\n{text}</function>")), [schema("f", **kinds)])
    assert calls == [ToolCall("f", {"s": "7", "i": 7, "f": 2.5, "b": True, "l": ["x"], "n": "x"})]


def test_calls_that_a_template_shows_in_the_content_only():
    chat = make_chat("qwen2.5", IN_CONTENT)
    chat.check(SCHEMAS)
    ids = encoded(chat, "I look. " + hermes('{"name": "weather", "arguments": {"city": "Köln", "days": 1}}') + "<|im_end|>")
    message, calls = chat.read(ids)
    assert message["content"] == "I look." and calls == [ToolCall("weather", {"city": "Köln", "days": 1})]
    context = chat.opening([USER], SCHEMAS) + ids
    following, rewritten = chat.follow(context, [USER, message], [result("weather", "sunny")], SCHEMAS)
    assert chat.tokenizer.decode(following[len(context) :]) == "\n<|im_start|>user\nsunny<|im_end|>\n" + HEAD
    assert not rewritten


@pytest.mark.parametrize(
    ("name", "template", "missing"),
    [
        ("smollm2", None, r"does not show the tools that it is given \(weather, add\)"),
        ("smollm2", IN_CONTENT.replace("<tool_call>", ""), "does not show a call of a tool"),
        (
            "smollm2",
            IN_CONTENT.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"),
            "does not show what a tool",
        ),
        ("deepseek_v3.1", None, "does not show the tools"),
    ],
)
def test_templates_that_cannot_show_tools_are_refused(name, template, missing):
    with pytest.raises(ValueError, match=missing + r".*set tokenizer.chat_template"):
        make_chat(name, template).check(SCHEMAS)


def test_templates_that_can_are_not():
    for name in set(REWRITES) - {"deepseek_v3.1"}:
        make_chat(name).check(SCHEMAS)


def test_a_tokenizer_reads_with_its_own_response_template_where_it_has_one():
    tokenizer = family_tokenizer("qwen3")
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": HEAD,
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
            "tool_calls": {
                "open": "[[",
                "close": "]]",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "<|im_end|>", "content": "text"},
        },
    }
    chat = Chat(tokenizer)
    text = '<think>Hm.</think>So:[[{"name": "f", "arguments": {"a": 1}}]]<|im_end|>'
    message, calls = chat.read(encoded(chat, text), SCHEMAS, chat.opening([USER], SCHEMAS))
    assert calls == [ToolCall("f", {"a": 1})] and message["reasoning_content"] == "Hm." and message["content"] == "So:"
    for broken in ('[[{"name": "f", "arguments": 1}]]', '[[{"name": "f"', "[[1]]"):
        message, calls = chat.read(encoded(chat, broken), SCHEMAS)
        assert not calls and message["content"] == broken


@pytest.mark.parametrize(("name", "kwargs"), [("qwq", {}), ("deepseek_v3", {}), ("qwen3", {"enable_thinking": False})])
def test_thinking_that_a_template_never_shows_again_makes_a_branch_each_turn(name, kwargs):
    chat = make_chat(name, **kwargs)
    text = "" if kwargs else "Hm.\n</think>\n\n"
    said = rendered(chat, name, [USER, {"role": "assistant", "content": "", "tool_calls": [PARIS]}], **kwargs)
    ids = encoded(chat, text + said[said.rindex("<｜tool▁calls▁begin｜>" if name == "deepseek_v3" else "<tool_call>") :])
    message, calls = chat.read(ids)
    assert calls == [ToolCall("weather", {"city": "Paris", "days": 3})] and ("Hm." in message["content"]) == (not kwargs)
    context, new = chat.opening([USER], SCHEMAS) + ids, [result("weather", "sunny")]
    following, rewritten = chat.follow(context, [USER, message], new, SCHEMAS)
    assert rewritten
    assert following == encoded(chat, rendered(chat, name, [USER, message, *new], add_generation_prompt=True, **kwargs))
