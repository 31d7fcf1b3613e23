"""A conversation as token ids: its opening, what a turn of the model says, and what a turn adds to the ids.

What a model has sampled is never decoded and encoded again. What comes after it is the end of a rendering of the whole
conversation, from the turn's end-of-turn token on.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_hf.episodes.calls import FORMS, MALFORMED, Schemas, call
from grpo_hf.episodes.template import THINKING_KEYS, Template
from grpo_hf.types import Message, ToolCall


class Chat:
    """Messages to ids and back, through a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat_template_kwargs: dict[str, Any] | None = None):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template, so it cannot show messages; set tokenizer.chat_template")
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, chat_template_kwargs or {})
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = special | set(tokenizer.all_special_ids)
        self.has_parser = getattr(tokenizer, "response_template", None) is not None

    def check(self, schemas: list[dict[str, Any]]) -> None:
        """Raise ValueError where the chat template does not show tools, calls of them, or their results."""
        if hidden := self.template.hidden(schemas):
            missing = f"the tools that it is given ({', '.join(hidden)})"
        elif not self.template.shows_calls or (self.template.form is None and not self.has_parser):
            missing = f"a call of a tool, or in none of the forms that are known ({', '.join(FORMS)})"
        elif not self.template.shows_results:
            missing = "what a tool has answered"
        else:
            return
        raise ValueError(
            f"the tokenizer's chat template does not show {missing}, so its model could not use tools over several turns. "
            "Take a model that was tuned for tools, or set tokenizer.chat_template: that of Qwen2.5 fits every model whose "
            "turns stand between <|im_start|> and <|im_end|>"
        )

    def opening(self, messages: list[Message], schemas: Schemas) -> list[int]:
        """The ids that the model's first turn is sampled from."""
        options = {"add_generation_prompt": True} | self.template.kwargs
        return self._ids(self.template.render(messages, schemas, **options))

    def read(
        self, ids: list[int], schemas: Schemas = None, context: list[int] | None = None
    ) -> tuple[Message, list[ToolCall]]:
        """A turn's ids as an assistant message, and the calls in it in order; what is no call is content.

        ``schemas`` say what arguments stand for where the form of calls has text for all of them; ``context`` is what the
        turn was sampled from, which a tokenizer's own ``response_template`` may ask for.
        """
        text: Any = self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.special else ids)
        message = self._by_response_template(ids, context, schemas) or self._by_form(text, schemas)
        functions = [item["function"] for item in message.get("tool_calls", [])]
        return message, [ToolCall(function["name"], function["arguments"]) for function in functions]

    def follow(
        self, context: list[int], messages: list[Message], new: list[Message], schemas: Schemas
    ) -> tuple[list[int], bool]:
        """The ids that the next turn is sampled from, and whether they show the history otherwise than it was.

        ``context``: all ids so far, the last turn's included; ``messages``: what they say; ``new``: results, or a user's
        message. As a rule the ids are the context and what comes after its end-of-turn token. Where the template drops
        what the model has seen or written, its earlier thinking as a rule, they are the template's from the beginning.
        """
        seen = self.template.render(messages[:-1], schemas, add_generation_prompt=True)
        done = self.template.render(messages, schemas, add_generation_prompt=False)
        whole = self.template.render([*messages, *new], schemas, add_generation_prompt=True)
        before, after = self.template.beyond(done, seen), self.template.beyond(whole, seen)
        if before is None or after is None:
            return self._ids(whole), True
        turn, end = self.template.split(before)
        shown, rest = _cut(after, turn, end)
        if shown is None or not self._same(shown, turn, messages[-1], schemas):
            return self._ids(whole), True
        ending, last = self._ids(end), context[-1]
        added = self._ids(end + rest)[len(ending) :]
        if last not in self.special:  # a length or a string has ended the turn
            return context + ending + added, False
        if [last] == added[:1] != ending:  # the next turn's first token has
            return context + added[1:], False
        if ending:  # the template's end, or another stop token, which stays as it was sampled
            return context + added, False
        return context[:-1] + added, True  # the first token of another turn than the one that comes

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _same(self, shown: str, turn: str, message: Message, schemas: Schemas) -> bool:
        """Whether the turn is shown as it was, but for the spelling, and with its thinking."""
        thinking = message.get(self.template.thinking_key) or self.template.think(message["content"])[1]
        if thinking not in shown:
            return False
        return shown == turn or _plain(self._by_form(shown, schemas)) == _plain(message)

    def _by_form(self, text: str, schemas: Schemas) -> Message:
        template = self.template
        before, thinking, rest = template.think(text)
        try:
            said, calls = template.form.parse(rest, schemas) if template.form else (rest, [])
        except MALFORMED:
            said, calls = rest, []
        if len(calls) > 1 and not template.several_calls:
            said, calls = rest, []
        message: Message = {"role": "assistant", "content": before + said}
        if template.thinking_key:
            message["content"] = said.lstrip("\n") if before else said
            message |= {template.thinking_key: thinking} if thinking else {}
        message["content"] = template.special.sub("", message["content"])
        return message | {"content": message["content"].strip(), "tool_calls": calls} if calls else message

    def _by_response_template(self, ids: list[int], context: list[int] | None, schemas: Schemas) -> Message | None:
        """The message as the tokenizer's own parser reads it; None without one, and where it cannot."""
        if not self.has_parser:
            return None
        tools: Any = schemas
        try:
            message = self.tokenizer.parse_response(ids, prefix=context or self.template.prompt, tools=tools)
            functions = [item["function"] for item in message.get("tool_calls", [])]
            calls = [call(function["name"], function["arguments"]) for function in functions]
        except Exception:  # somebody else's parser over what a model has written
            return None
        if len(calls) > 1 and not self.template.several_calls:
            return None
        said = {key: value for key, value in message.items() if key != "tool_calls"}
        return {"role": "assistant", "content": ""} | said | ({"tool_calls": calls} if calls else {})


def _cut(text: str, turn: str, end: str) -> tuple[str | None, str]:
    """A rendering from a turn on -> the turn as it is shown there, what comes after its end; None where no end is found."""
    if text.startswith(turn + end):
        return turn, text.removeprefix(turn + end)
    if not end:
        return None, ""
    parts = text.split(end)
    count = turn.count(end) + 1
    return (end.join(parts[:count]), end.join(parts[count:])) if len(parts) > count else (None, "")


def _plain(message: Message) -> tuple[Any, ...]:
    thinking = [message.get(key, "").strip() for key in THINKING_KEYS]
    return message["content"].strip(), thinking, [item["function"] for item in message.get("tool_calls", [])]
