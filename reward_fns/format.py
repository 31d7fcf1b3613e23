"""Whether the completion has the asked-for form, whatever it says."""

from __future__ import annotations

import re

from grpo_hf.rewards.registry import register_reward

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
_TAG = re.compile("(" + "|".join(TAGS) + ")")


@register_reward
def format(completion: str, *, pattern: str | None = None) -> float:
    """1.0 if the completion is `<think>...</think> <answer>...</answer>`, else 0.0; the form of DeepSeek-R1 (2501.12948).

    Each tag comes exactly once, in this order, and there is only white space before, between and after the two blocks.
    With a `pattern` it is 1.0 if that regular expression matches the whole completion (`.` takes newlines too).

    >>> format("<think>2 + 2</think> <answer>4</answer>"), format("The answer is 4")
    (1.0, 0.0)
    >>> format("<think>2 + 2</think> <answer>4</answer> <answer>5</answer>")
    0.0
    >>> format("4", pattern="[0-9]+"), format("4 apples", pattern="[0-9]+")
    (1.0, 0.0)

    Raises:
        ValueError: the pattern is not a regular expression.
    """
    if pattern is not None:
        try:
            return float(re.fullmatch(pattern, completion, re.DOTALL) is not None)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    parts = _TAG.split(completion)
    return float(parts[1::2] == TAGS and not "".join(parts[::4]).strip())
