"""Multiple choice: the letter that a completion settles on."""

from __future__ import annotations

import re
from typing import Any

from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, parses_gold
from grpo_hf.rewards.registry import register_reward
from reward_fns.marks import last_boxed, last_tagged, scoped

_MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed)\b|[*_`$\\{}\[\]\"]")
_ALONE = re.compile(r"\s*\(?([A-Za-z])\)?[.:)]?\s*")
_LETTER = re.compile(r"\(\s?(?P<held>[A-Za-z])\s?\)|(?<![\w.'’-])(?P<bare>[A-Za-z])(?![\w'’-]|\.\w)")
_MARKER = re.compile(
    r"\b(?:answer|(?:correct|right|best) (?:option|choice))(?:(?: (?:is|would be|must be))? ?[:=]| (?:is|would be|must be))"
    r"[ \n]?(?:(?:option|choice|letter) )?",
    re.IGNORECASE,
)
_ANOTHER = re.compile(r"[.:)]? ?(?:,|/|&|\bor\b|\band\b) ?(?:\([A-Za-z]\)|[A-Z](?![\w'’]))")
_AFTER_LETTER = {"because", "since", "as", "and", "which", "given", "due", "by", "for", "based"}


def gold_choice(answer: Any) -> str | int:
    """The right choice as a capital letter, or as its index from 0.

    >>> gold_choice("(c)"), gold_choice(2)
    ('C', 2)

    Raises:
        BadGoldError: it is neither.
    """
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < 26:
        return answer
    if isinstance(answer, str) and (match := _ALONE.fullmatch(answer)):
        return match[1].upper()
    raise BadGoldError(f"multiple_choice needs the right choice as a letter or as an index from 0; the answer is {answer!r}")


@register_reward
@parses_gold(gold_choice)
def multiple_choice(completion: str, answer: str | int, *, choices: str = "ABCDEFGHIJ") -> float:
    """1.0 if the completion settles on the right choice, else 0.0. `answer` is its letter, or its index in `choices` from 0.

    What counts is, in this order: the last `\\boxed{C}`; the last "answer is (C)" or "Answer: C"; the one letter that stands
    alone in the last line. Where there are `<answer>` tags it is looked for in the last of them only. "B or C" is no choice,
    and neither is the article in "A dog".

    >>> multiple_choice("Not B. The answer is (C).", "C"), multiple_choice("\\\\boxed{C}", 2), multiple_choice("B or C", "C")
    (1.0, 1.0, 0.0)

    Raises:
        BadGoldError: `answer` is no letter and no index, or none of the choices.
        ValueError: `choices` are not letters.
    """
    choices = choices.upper()
    if not choices.isascii() or not choices.isalpha():
        raise ValueError(f"choices={choices!r} are not letters; write them together, for example 'ABCD'")
    if answer not in (range(len(choices)) if isinstance(answer, int) else list(choices)):
        raise BadGoldError(f"the answer {answer!r} is none of the choices {choices}, whose indices start at 0")
    right = choices[answer] if isinstance(answer, int) else answer
    found = chosen(completion, choices)
    return NO_ANSWER if found is None else float(found == right)


def chosen(completion: str, choices: str) -> str | None:
    """The letter that a completion settles on, a capital; None if there is none, or more than one.

    >>> [chosen(text, "ABCD") for text in ("Answer: b.", "So I take C", "It is B, not C", "A dog")]
    ['B', 'C', None, None]
    """
    tagged = last_tagged(completion)
    text = completion if tagged is None else tagged
    box = last_boxed(text)
    text = _plain(text if box is None else box)
    if alone := _ALONE.fullmatch(text):
        return alone[1].upper()
    if box is not None:
        return _settled(_LETTER.match(text))
    announced = (_LETTER.match(text, marker.end()) for marker in _MARKER.finditer(text))
    if letters := [letter for letter in announced if letter and _is_choice(letter)]:
        return _settled(letters[-1])
    last_line = _LETTER.finditer(text.rpartition("\n")[2])
    found = {_capital(letter) for letter in last_line if _is_choice(letter) and not (letter["bare"] or "").islower()}
    found &= set(choices)
    return found.pop() if len(found) == 1 else None


def _plain(text: str) -> str:
    """The text without markup and with single spaces and newlines, which keeps every pattern linear."""
    return re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", _MARKUP.sub("", text))).strip()


def _settled(letter: re.Match[str] | None) -> str | None:
    """The choice that a letter is, unless it is the first of several."""
    if letter is None or not _is_choice(letter) or _ANOTHER.match(letter.string, letter.end()):
        return None
    return _capital(letter)


def _capital(letter: re.Match[str]) -> str:
    return (letter["held"] or letter["bare"]).upper()


def _is_choice(letter: re.Match[str]) -> bool:
    """Say whether the letter is a choice: neither a word like "A" and "I", nor a small letter in the middle of a text."""
    tail = letter.string[letter.end() : letter.end() + 20]
    if letter["held"] or tail[:1] != " " or not tail[1:2].isalnum():
        return True
    return (letter["bare"] not in "AI" and letter["bare"].isupper()) or tail.split()[0].lower() in _AFTER_LETTER
