"""Whether the completion has the asked-for form, whatever it says."""

from __future__ import annotations

import re

from grpo_hf.rewards.registry import register_reward


@register_reward
def format(completion: str, *, pattern: str = r"<think>.*?</think>\s*<answer>.*?</answer>") -> float:
    """1.0 if the regular expression matches the whole completion (`.` takes newlines too), else 0.0.

    >>> format("<think>2 + 2</think> <answer>4</answer>"), format("The answer is 4")
    (1.0, 0.0)
    >>> format("4", pattern="[0-9]+"), format("4 apples", pattern="[0-9]+")
    (1.0, 0.0)

    Raises:
        re.error: the pattern is not a regular expression.
    """
    return float(re.fullmatch(pattern, completion, re.DOTALL) is not None)
