"""What a chat template shows, and how: found out by rendering small conversations, never by a model's name."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo_hf.episodes.calls import FORMS, HERMES, MALFORMED, THOUGHTS, Call, Form, Schemas, call
from grpo_hf.types import Message

CALLS = [
    call("probe_one", {"city": "a probe of words", "days": 3}),
    call("probe_two", {"city": "another probe of words", "days": 4}),
]
THOUGHT, ANSWER, RESULT = "a probe of thoughts", "a probe of answers", "a probe of results"
USER: Message = {"role": "user", "content": "a probe of questions"}
ANSWERED: Message = {"role": "tool", "name": "probe_one", "content": RESULT}
THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")


def probe_schema(name: str) -> dict[str, Any]:
    """The schema of a function that the probes call."""
    properties = {
        "city": {"type": "string", "description": "A word."},
        "days": {"type": "integer", "description": "A number."},
    }
    parameters = {"type": "object", "properties": properties, "required": ["city", "days"]}
    return {"type": "function", "function": {"name": name, "description": "A probe.", "parameters": parameters}}


SCHEMAS = [probe_schema("probe_one"), probe_schema("probe_two")]


class Template:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]):
        self.tokenizer, self.kwargs = tokenizer, kwargs
        self.arguments_as_text = False
        """Whether it takes a call's arguments as JSON text, not as an object."""
        self.calls_in_content = False
        """Whether it shows calls only where they stand in the content."""
        self.shows_preambles = True
        """Whether a call may have both content and thinking before it."""
        self.thinking_key = ""
        """Under which key of a message it looks for thinking; "" where it does under none."""
        self.marks = THOUGHTS["think"]
        """What it puts before and after the model's thinking."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        """Any special token, as text."""
        self.prompt = self._attempt([USER], prompt=True).removeprefix(self._attempt([USER]))
        """What opens the model's turn after a user's."""
        self.form = self._find_form()
        """In which form it shows calls; None where it shows none that is known."""
        self.shows_calls, self.several_calls = self._shows(CALLS[:1]), self._shows(CALLS)
        """Whether what a turn calls is in the history, and whether it may be more than one."""
        self._find_thinking()
        answered = self._attempt([USER, _says(calls=CALLS[:1]), ANSWERED], prompt=True)
        self.shows_results = RESULT in answered
        """Whether the next turn sees what a tool has answered."""
        self.opens_thinking = any(text.rstrip().endswith(self.marks[0].strip()) for text in (self.prompt, answered))
        """Whether a turn can begin within the thinking."""

    def render(self, messages: list[Message], schemas: Schemas, **options: Any) -> str:
        """The conversation as text."""
        settings: dict[str, Any] = {"tools": schemas or None, "tokenize": False} | self.kwargs | options
        return str(self.tokenizer.apply_chat_template(self._as_shown(messages), **settings))

    def beyond(self, whole: str, seen: str) -> str | None:
        """What comes after the text that a turn was sampled from; None where ``whole`` begins with another.

        White space does not make it another: some templates end a result's line only once something follows.
        """
        if whole.startswith(seen):
            return whole.removeprefix(seen)
        letters = "".join(seen.split())
        ends = [match.end() for match in islice(re.finditer(r"\S", whole), len(letters))]
        begins = whole[: ends[-1]] if ends else ""
        return whole.removeprefix(begins) if "".join(begins.split()) == letters else None

    def split(self, turn: str) -> tuple[str, str]:
        """A turn at the end of a rendering -> the turn, its end-of-turn token; "" where it has none."""
        ends = list(self.special.finditer(turn))
        if ends and not turn[ends[-1].end() :].strip():
            return turn[: ends[-1].start()], ends[-1][0]
        return turn, ""

    def think(self, text: str) -> tuple[str, str, str]:
        """A turn -> its beginning with the thinking in it and its marks, the thinking alone, what comes after both."""
        start, end = (mark.strip() for mark in self.marks)
        before, found, after = text.partition(end)
        opened = before.lstrip().startswith(start)
        if not found or not (opened or self.opens_thinking):
            return "", "", text
        return before + end, before.lstrip().removeprefix(start).strip(), after

    def hidden(self, schemas: list[dict[str, Any]]) -> list[str]:
        """The names of functions that the template does not show."""
        text = self._attempt([USER], schemas=schemas, prompt=True)
        names = [schema["function"]["name"] for schema in schemas]
        return [name for name in names if name not in text]

    def _as_shown(self, messages: list[Message]) -> list[Message]:
        """Messages as the template takes them; calls and results that have no ids are given the same ones each time."""
        shown, waiting, number = [], [], 0
        for message in messages:
            made = dict(message)
            if calls := message.get("tool_calls"):
                made["tool_calls"] = calls = [{"id": f"call{number + i:05d}"} | c for i, c in enumerate(calls)]
                number, waiting = number + len(calls), [c["id"] for c in calls]
                if self.calls_in_content:
                    made["content"] = "\n".join(filter(None, [made.get("content"), *map(_written, made.pop("tool_calls"))]))
                elif self.arguments_as_text:
                    made["tool_calls"] = [_with_text(c) for c in calls]
                if not self.shows_preambles and message.get(self.thinking_key):
                    made["content"] = ""
            elif message["role"] == "tool" and waiting:
                made.setdefault("tool_call_id", waiting.pop(0))
            shown.append(made)
        return shown

    def _attempt(self, messages: list[Message], *, schemas: Schemas = SCHEMAS, prompt: bool = False) -> str:
        try:
            return self.render(messages, schemas, add_generation_prompt=prompt)
        except (TemplateError, TypeError, ValueError, KeyError):  # how templates refuse what they were not made for
            return ""

    def _find_form(self) -> Form | None:
        for self.arguments_as_text in (False, True):
            for form in FORMS.values():
                if self._reads(form):
                    return form
        self.arguments_as_text = False
        self.calls_in_content = HERMES[0] in self._attempt([USER])
        return FORMS["hermes"] if self.calls_in_content and self._reads(FORMS["hermes"]) else None

    def _shows(self, calls: list[Call]) -> bool:
        text = self._attempt([USER, _says(calls=calls)])
        return all(item["function"]["arguments"]["city"] in text for item in calls)

    def _reads(self, form: Form) -> bool:
        text = self._attempt([USER, _says(calls=CALLS[:1])])
        try:
            turn = self.beyond(text, self._attempt([USER], prompt=True)) or text.removeprefix(self._attempt([USER]))
            found = form.parse(self.split(turn)[0], SCHEMAS)[1]
        except MALFORMED:
            return False
        return [item["function"] for item in found] == [CALLS[0]["function"]]

    def _find_thinking(self) -> None:
        for key in THINKING_KEYS:
            for calls in (CALLS[:1], []):
                text = self._attempt([USER, _says(calls=calls, **{key: THOUGHT})])
                for start, end in THOUGHTS.values():
                    if re.search(rf"{re.escape(start.strip())}\s*{THOUGHT}\s*{re.escape(end)}", text):
                        self.thinking_key, self.marks = key, (start, end)
                        self.shows_preambles = bool(self._attempt([USER, _says(ANSWER, calls=CALLS[:1], **{key: THOUGHT})]))
                        return


def _says(content: str = "", *, calls: list[Call], **thinking: str) -> Message:
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {}), **thinking}


def _written(item: Call) -> str:
    return f"{HERMES[0]}\n{json.dumps(item['function'], ensure_ascii=False)}\n{HERMES[1]}"


def _with_text(item: Call) -> Call:
    return item | {"function": item["function"] | {"arguments": json.dumps(item["function"]["arguments"])}}
