"""Whether a regular expression is found in the completion, or captures the right answer from it."""

from __future__ import annotations

import re
from collections import deque
from typing import Any

from grpo_hf.reward_fns.marks import answer_part
from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, parses_gold
from grpo_hf.rewards.registry import register_reward


def compiled(pattern: Any) -> re.Pattern[str]:
    """The regular expression of an option or column.

    Raises:
        BadGoldError: it is not one, with what is wrong and where.
    """
    if not isinstance(pattern, str):
        raise BadGoldError(f"regex needs a pattern as text; got {pattern!r}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BadGoldError(f"{pattern!r} is not a regular expression: {error}") from error


@register_reward
@parses_gold(compiled)
def regex(
    completion: str,
    pattern: re.Pattern[str],
    *,
    group: int | str | None = None,
    answer: str | int | None = None,
    scope: str | None = None,
) -> float:
    """1.0 if the pattern is found anywhere in the completion, else 0.0.

    With `group`, a group's number or name, 1.0 if what it captures in the last match is the column `answer`, both stripped
    of white space; a completion without a match, or without that group in it, holds no answer. Flags are written in the
    pattern: `(?i)` ignores case, `(?s)` lets `.` take newlines. `scope` is `auto` with a group (what follows `</think>`, or
    all where there is none) and `whole` without; `after_think` finds nothing where there is no `</think>`.

    >>> regex("It is 42.", r"\\b42\\b"), regex("It is 421.", r"\\b42\\b")
    (1.0, 0.0)
    >>> regex("x = 3, so x = 4", r"x = (\\d+)", group=1, answer=4), regex("none", r"x = (\\d+)", group=1, answer=4)
    (1.0, 0.0)

    Raises:
        BadGoldError: the pattern is not a regular expression.
        ValueError: the pattern has no such group, or there is no column `answer` to compare it with.
    """
    text = answer_part(completion, scope or ("whole" if group is None else "auto"))
    if group is None:
        return NO_ANSWER if text is None else float(pattern.search(text) is not None)
    if group not in (*range(pattern.groups + 1), *pattern.groupindex):
        raise ValueError(f"the pattern {pattern.pattern!r} has no group {group!r}; it has {_groups(pattern)}")
    if answer is None:
        raise ValueError(f"regex compares the group {group!r} with the column 'answer', which is missing or empty")
    last = deque(pattern.finditer(text or ""), maxlen=1)
    found = last[0][group] if last else None
    return NO_ANSWER if found is None else float(found.strip() == str(answer).strip())


def _groups(pattern: re.Pattern[str]) -> str:
    """The groups of a pattern, for an error."""
    names = "".join(f", {name}" for name in pattern.groupindex)
    return f"0 to {pattern.groups}{names}"
