"""The forms in which model families write calls of functions and their thinking: text in, parts out.

A form reads one turn of the model and returns what it says beside its calls, and the calls in order as chat messages hold
them: ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``, with an "id" where the model has written one.
It raises one of ``MALFORMED`` where a call is not whole; such a turn is content. A new form is one function and one entry.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

Call = dict[str, Any]
Read = tuple[str, list[Call]]
Schemas = list[dict[str, Any]] | None

MALFORMED = (ValueError, SyntaxError, RecursionError, MemoryError)
"""What a parser of Python's raises for a text that is none, or nested too deep."""


DEEPEST = 100
"""Levels of a call's arguments; what shows and stores them calls itself once or more for each."""


def call(name: Any, arguments: Any, number: str | None = None) -> Call:
    """A call as chat messages hold it; ValueError where it is none: no name, arguments that are not an object, or half a
    character in them, which no template could show, or nested too deep. Its id is kept where it is as Mistral's templates
    want it."""
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        raise ValueError(f"not a call: {name!r}, {arguments!r}")
    json.dumps([name, arguments], ensure_ascii=False).encode()
    if depth(arguments) > DEEPEST:
        raise ValueError(f"a call of {name!r} with arguments nested deeper than {DEEPEST}")
    made: Call = {"type": "function", "function": {"name": name.strip(), "arguments": arguments}}
    return made | {"id": number} if re.fullmatch("[A-Za-z0-9]{9}", str(number)) else made


def depth(value: Any) -> int:
    """How deep objects and lists are nested in a value of JSON."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return 1 + max(map(depth, inside), default=0)


def marked(text: str, start: str, end: str, body: Callable[[str], tuple[list[Call], str]]) -> Read:
    """Calls between two marks, any number of times; ``body`` reads what stands after the first and returns what is left."""
    said, calls = "", []
    while start in text:
        before, _, text = text.partition(start)
        found, text = body(text)
        if not text.lstrip().startswith(end):
            raise ValueError(f"no {end!r} after a call")
        said, text = said + before, text.lstrip().removeprefix(end)
        calls += found
    return said + text, calls


def json_value(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, and the rest."""
    text = text.lstrip()
    value, end = json.JSONDecoder().raw_decode(text)
    return value, text[end:]


def json_calls(text: str) -> tuple[list[Call], str]:
    """One call, or a list of them: ``{"name": ..., "arguments": {...}}``; Llama says "parameters"."""
    value, rest = json_value(text)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) for item in values):
        raise ValueError(f"not a call: {value!r}")
    return [call(item.get("name"), item.get("arguments", item.get("parameters")), item.get("id")) for item in values], rest


def tagged(text: str, name: str, argument: str, end: str = "") -> tuple[list[Call], str]:
    """A call whose name and arguments stand between tags of their own, given as patterns; its values are text."""
    head = re.match(name, text)
    if head is None:
        raise ValueError("a call without a name")
    rest, arguments = text[head.end() :], {}
    while found := re.match(argument, rest, re.DOTALL):
        arguments[found[1].strip()] = found[2]
        rest = rest[found.end() :]
    if not rest.lstrip().startswith(end):
        raise ValueError(f"no {end!r} after a call's arguments")
    return [call(head[1], arguments)], rest.lstrip().removeprefix(end)


def llama(text: str) -> Read:
    """Llama 3: the turn is nothing but JSON, ``{"name": ..., "parameters": {...}}``; several are apart by a ";"."""
    rest, calls = text.strip().removeprefix("<|python_tag|>").strip(), []
    while rest.startswith("{"):
        found, rest = json_calls(rest)
        rest = rest.strip().removeprefix(";").lstrip()
        calls += found
    if calls and rest:
        raise ValueError("text after a call")
    return "" if calls else text, calls


def mistral(text: str) -> Read:
    """Mistral from the v11 tokenizer on: ``[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}``, the id being optional."""

    def body(text: str) -> tuple[list[Call], str]:
        head, mark, text = text.partition("[ARGS]")
        if not mark:
            raise ValueError("a call without arguments")
        name, _, number = head.partition("[CALL_ID]")
        arguments, rest = json_value(text)
        return [call(name, arguments, number.strip())], rest

    return marked(text, "[TOOL_CALLS]", "", body)


def harmony(text: str) -> Read:
    """GPT-OSS: messages by channel; a call has a recipient: ``to=functions.name<|channel|>commentary json<|message|>{}``."""
    said, calls = "", []
    for message in re.split(r"<\|end\|>|<\|call\|>|<\|return\|>", text):
        head, mark, body = message.partition("<|message|>")
        recipient = re.search(r"to=(?:functions\.)?([^\s<]+)", head)
        if recipient:
            arguments, rest = json_value(body)
            if rest.strip():
                raise ValueError("text after a call")
            calls.append(call(recipient[1], arguments))
        elif "<|channel|>analysis" not in head:
            said += body if mark else head
    return said, calls


def deepseek(text: str) -> Read:
    """DeepSeek V3.1 ``name<｜tool▁sep｜>{...}``, and V3 ``function<｜tool▁sep｜>name`` with the JSON in a fence."""

    def body(text: str) -> tuple[list[Call], str]:
        head, mark, text = text.partition("<｜tool▁sep｜>")
        if not mark:
            raise ValueError("a call without arguments")
        if fenced := re.match(r"(.*?)\n```json\n", text):
            arguments, rest = json_value(text[fenced.end() :])
            return [call(fenced[1], arguments)], rest.lstrip().removeprefix("```")
        arguments, rest = json_value(text)
        return [call(head, arguments)], rest

    said, calls = marked(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", body)
    return re.sub("<｜tool▁calls▁(begin|end)｜>", "", said), calls


def gemma(text: str, start: str, end: str, quote: str) -> Read:
    """FunctionGemma and Gemma 4: ``call:name{key:value}``, JSON but for bare keys and strings between other quotes."""

    def body(text: str) -> tuple[list[Call], str]:
        inside, mark, rest = text.partition(end)
        head = re.match(r"call:([^{]+)(?=\{)", inside)
        if head is None:
            raise ValueError(f"not a call: {inside!r}")
        parts = inside[head.end() :].split(quote)
        parts[::2] = [re.sub(r'([{,]\s*)([^\s"{}\[\],:]+)\s*:', r'\1"\2":', part) for part in parts[::2]]
        parts[1::2] = [json.dumps(part) for part in parts[1::2]]
        return [call(head[1], json.loads("".join(parts)))], mark + rest

    return marked(text, start, end, body)


class JSONNames(ast.NodeTransformer):
    """What JSON calls true, false and null, as Python's."""

    names: ClassVar = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """The constant of that name."""
        return ast.Constant(self.names[node.id]) if node.id in self.names else node


def python(text: str) -> Read:
    """LFM2: a list of calls as Python writes them, ``[name(key='value')]``, with JSON in lists and objects."""

    def body(text: str) -> tuple[list[Call], str]:
        inside, mark, rest = text.partition("<|tool_call_end|>")
        tree = JSONNames().visit(ast.parse(inside.strip(), mode="eval").body)
        calls = []
        for node in tree.elts if isinstance(tree, ast.List) else [tree]:
            if not isinstance(node, ast.Call) or node.args:
                raise ValueError(f"not a call with named arguments: {inside!r}")
            arguments = {str(item.arg): ast.literal_eval(item.value) for item in node.keywords}
            calls.append(call(ast.unparse(node.func), arguments))
        return calls, mark + rest

    return marked(text, "<|tool_call_start|>", "<|tool_call_end|>", body)


class Form(NamedTuple):
    """A way to write calls."""

    read: Callable[[str], Read]
    """What stands in a turn."""
    typed: bool = True
    """False where all values are text, and the function's schema says what they stand for."""

    def parse(self, text: str, schemas: Schemas) -> Read:
        """What stands in a turn, its values of their types."""
        said, calls = self.read(text)
        return said, calls if self.typed else typed(calls, schemas or [])


HERMES = ("<tool_call>", "</tool_call>")
QWEN_CODER = {
    "name": r"\s*<function=([^>\n]+)>",
    "argument": r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>",
    "end": "</function>",
}
GLM = {"name": r"\s*([\w.:-]+)", "argument": r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"}

FORMS: dict[str, Form] = {
    "hermes": Form(lambda text: marked(text, *HERMES, json_calls)),  # Hermes, Qwen2.5, Qwen3, SmolLM2, SmolLM3
    "qwen_coder": Form(lambda text: marked(text, *HERMES, partial(tagged, **QWEN_CODER)), typed=False),  # Qwen3.5 too
    "glm": Form(lambda text: marked(text, *HERMES, partial(tagged, **GLM)), typed=False),  # 4.5 to 4.7
    "mistral_list": Form(lambda text: marked(text, "[TOOL_CALLS]", "", json_calls)),  # 7B v0.3, Nemo
    "mistral": Form(mistral),
    "harmony": Form(harmony),
    "deepseek": Form(deepseek),
    "gemma": Form(partial(gemma, start="<|tool_call>", end="<tool_call|>", quote='<|"|>')),
    "function_gemma": Form(partial(gemma, start="<start_function_call>", end="<end_function_call>", quote="<escape>")),
    "phi": Form(lambda text: marked(text, "<|tool_call|>", "<|/tool_call|>", json_calls)),
    "python": Form(python),
    "llama": Form(llama),
}
"""By family; which of them a model uses is told by its chat template, which has to write a call that the form reads."""

THOUGHTS: dict[str, tuple[str, str]] = {
    "think": ("<think>", "</think>"),
    "harmony": ("<|channel|>analysis<|message|>", "<|end|>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "gemma": ("<|channel>thought\n", "<channel|>"),
}
"""What stands before and after the model's thinking."""


def typed(calls: list[Call], schemas: list[dict[str, Any]]) -> list[Call]:
    """The same calls with values that the functions' schemas do not call strings read as JSON, or as Python's literals."""
    parameters = {schema["function"]["name"]: schema["function"].get("parameters", {}) for schema in schemas}
    for function in (item["function"] for item in calls):
        properties = parameters.get(function["name"], {}).get("properties", {})
        function["arguments"] = {k: _typed(v, properties.get(k, {})) for k, v in function["arguments"].items()}
        call(function["name"], function["arguments"])  # they may only now be what no template could show
    return calls


def _typed(text: str, schema: dict[str, Any]) -> Any:
    kinds = schema.get("type")
    if kinds == "string" or (isinstance(kinds, list) and "string" in kinds):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except MALFORMED:
            continue
    return text
