"""What becomes of a call: its outcome, and what the model is told. Light to import, as workers do it too."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grpo_hf.isolation.inside import described
from grpo_hf.types import ToolCall

OUTCOMES = ("ok", "error", "timeout", "crash")
"""error: it raised, or could not be called so. timeout: it ran past its deadline. crash: its process died or took too much
memory."""

Answer = tuple[str, str, str, float]
"""A ToolCall's outcome, content, message and seconds."""

_ERROR_CHARACTERS = 500
_NOT_TEXT = {"image", "image_url", "audio", "input_audio", "video"}


def answered(call: Callable[[], Any], tell: Callable[[Any], str]) -> Answer:
    """Do a call and say how it ended; ``tell`` makes text of its result."""
    start = time.perf_counter()
    try:
        content = tell(call())
    except BaseException as error:
        return raised(error, time.perf_counter() - start)
    return "ok", content, "", time.perf_counter() - start


def raised(error: BaseException, seconds: float) -> Answer:
    """The answer where an error ended the call: the model is told its kind and text on one line."""
    line = " ".join("".join(traceback.format_exception_only(error)).split())
    return refused("crash" if isinstance(error, MemoryError) else "error", line, _sendable(described(error)), seconds)


def refused(outcome: str, why: str, message: str = "", seconds: float = 0.0) -> Answer:
    """The answer where there is no result."""
    why = why if len(why) <= _ERROR_CHARACTERS else f"{why[:_ERROR_CHARACTERS]}..."
    return outcome, _sendable(json.dumps({"error": why}, ensure_ascii=False)), message or why, seconds


def ended(call: ToolCall, answer: Answer) -> ToolCall:
    """The call with what became of it."""
    outcome, content, message, seconds = answer
    return replace(call, outcome=outcome, content=content, message=message, seconds=seconds)


def text_of(result: Any, limit: int) -> str:
    """A tool's result as text: blocks of text are joined, anything else is ``str(result)``; cut to so many characters."""
    text = _joined(result)
    text = str.__str__(str(result) if text is None else text)  # and no subclass, which could not be sent
    if len(text) > limit:
        text = f"{text[:limit]}\n[cut: these are the first {limit:,} of {len(text):,} characters]"
    return _sendable(text)


def observation_of(result: Any, limit: int) -> str:
    """What ``reset`` returned as text.

    Raises:
        TypeError: it is neither text, nor blocks of text, nor None.
    """
    if not (result is None or isinstance(result, str) or _joined(result) is not None):
        raise TypeError(f"reset returned a {type(result).__name__}; expected text, a list of text blocks, or None")
    return "" if result is None else text_of(result, limit)


def _joined(result: Any) -> str | None:
    """The text of content blocks; None where it is something else.

    Raises:
        ValueError: one of the blocks is no text.
    """
    kinds = [block.get("type") for block in result if isinstance(block, dict)] if isinstance(result, list) else []
    if not kinds or len(kinds) < len(result) or not {"text", *_NOT_TEXT}.issuperset(map(str, kinds)):
        return None
    for kind in kinds:
        if kind != "text":
            raise ValueError(f"it returned a content block of the type {kind!r}; the model reads text only")
    return "".join(str(block.get("text", "")) for block in result)


def _sendable(text: str) -> str:
    """Text that can be encoded: halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace").decode()
