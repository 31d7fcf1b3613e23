"""Where the answer of a completion stands: after its thinking, in a box, in tags; for every verifier that reads one."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from grpo_hf.rewards.outcomes import NO_ANSWER

SCOPES = ("auto", "after_think", "whole")
MARKER = "####"
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|(?P<bare>[-+]?[\d.,]*\d|[A-Za-z](?![A-Za-z])))")
_EMPHASIS = re.compile(
    r"(?<![A-Za-z0-9)\]}*_`\\])(?P<mark>\*{1,3}|__|`{1,3})(?=[^\s*])(?P<text>.{1,300}?)(?<=[^\s*\\])(?P=mark)(?![A-Za-z0-9*])"
)
_NOISE = re.compile(
    r"</?(?:b|i|u|em|strong|s)>|<\|[^|<>\n]{1,30}\|>|^[ \t]*```\w*[ \t]*$|[\u2600-\u27bf\ufe0f\U0001f300-\U0001faff]",
    re.MULTILINE,
)
_JOINER = re.compile(r"[\s$}]*(?:[,/]|\\text\s*\{\s*(?:or|and)\s*\}|or|and)[\s$]*")


LogExtra = Callable[[str, Any], None]
"""What a verifier is given to say something beside its score: a column's name, and its value for this completion."""


def not_logged(column: str, value: Any) -> None:
    """For calls outside of training and evaluation."""


def scoped(judge: Callable[..., Any]) -> Callable[..., Any]:
    """Make a verifier judge only what follows a completion's thinking, as its new option `scope` says.

    `auto`: what follows the last `</think>`, or all of a completion without one. `after_think`: without one there is no
    answer. `whole`: the thinking counts too.

    >>> @scoped
    ... def says_5(completion): return float("5" in completion)
    >>> thought = "<think>5, I guess.</think> It is 4."
    >>> says_5(thought), says_5("It is 5."), says_5("It is 5.", scope="after_think"), says_5(thought, scope="whole")
    (0.0, 1.0, 0.0, 1.0)

    Raises:
        ValueError: an unknown scope.
    """

    @functools.wraps(judge)
    def verifier(completion: str, *args: Any, scope: str = "auto", **options: Any) -> Any:
        text = answer_part(completion, scope)
        return NO_ANSWER if text is None else judge(text, *args, **options)

    signature = inspect.signature(judge)
    option = inspect.Parameter("scope", inspect.Parameter.KEYWORD_ONLY, default="auto", annotation="str")
    verifier.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return verifier


def answer_part(completion: str, scope: str) -> str | None:
    """The part of a completion that a scope admits; None if there is none.

    Raises:
        ValueError: an unknown scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"there is no scope {scope!r}; the scopes are: {', '.join(SCOPES)}")
    _, thought, rest = completion.rpartition("</think>")
    if scope == "whole" or (scope == "auto" and not thought):
        return completion
    return rest.partition("<think>")[0] if thought else None


def last_tagged(text: str, tag: str = "answer") -> str | None:
    """The content of the last `<tag>...</tag>`, stripped; None if there is none.

    >>> last_tagged("<answer>3</answer>, no: <answer> 4 </answer>"), last_tagged("<answer>4")
    ('4', None)
    """
    before, end, _ = text.rpartition(f"</{tag}>")
    _, start, content = before.rpartition(f"<{tag}>")
    return content.strip() if start and end else None


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{}`, braces balanced; None if there is none, it does not end, or it is one of several.

    Several are joined by a comma, `or` or `and`.

    >>> last_boxed("\\\\boxed{1}, then \\\\boxed{\\\\text{about }{2}}!"), last_boxed("\\\\boxed 7.")
    ('\\\\text{about }{2}', '7')
    """
    boxes = list(BOX.finditer(text)) if "box" in text else []
    if not boxes:
        return None
    if len(boxes) > 1 and (before := _content(text[: boxes[-1].start()], boxes[-2])) is not None:
        start = boxes[-2].start("bare") if boxes[-2]["bare"] else boxes[-2].end()
        if _JOINER.fullmatch(text, start + len(before), boxes[-1].start()):
            return None
    return _content(text, boxes[-1])


def _content(text: str, box: re.Match[str]) -> str | None:
    """What a box holds, braces balanced; None if it does not end."""
    if box["bare"]:
        return box["bare"]
    start, depth = box.end(), 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def without_markup(text: str) -> str:
    """The text without the signs of bold, italic and code, emoji and special tokens; stars that multiply stay.

    >>> without_markup("**Answer: 20**, *not* `2 * 3 * 4`, 2**3 or **x**2 + 1**.")
    'Answer: 20, not 2 * 3 * 4, 2**3 or x**2 + 1.'
    """
    return _EMPHASIS.sub(r"\g<text>", _NOISE.sub("", text))
