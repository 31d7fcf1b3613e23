"""Multiple choice: the letter that a completion settles on."""

from __future__ import annotations

import re
from typing import Any

from grpo_hf.reward_fns.marks import LogExtra, last_boxed, last_tagged, not_logged, scoped, without_markup
from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, parses_gold
from grpo_hf.rewards.registry import register_reward

_MAX_COMPLETION = 20_000
_MAX_SENTENCE = 300
_MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed)\b|[*_`$\\{}\[\]\"“”]")
_ALONE = re.compile(r"\s*\(?([A-Za-z])\)?[.:)]?\s*")
_LETTER = re.compile(r"\(\s?(?P<held>[A-Za-z])\s?\)|(?<![A-Za-z0-9_.'’-])(?P<bare>[A-Za-z])(?![A-Za-z0-9_'’-]|\.[A-Za-z])")
_MARKER = re.compile(
    r"\b(?:answer|(?:correct|right|best) (?:option|choice))(?:(?: (?:is|would be|must be))? ?[:=]| (?:is|would be|must be))"
    r"[ \n]?(?:(?:option|choice|letter) )?",
    re.IGNORECASE,
)
_ANOTHER = re.compile(
    r"[.:)?]? ?(?:(?:[,/&;|+]|\(?\b(?:and/or|[Oo]r|and)\b) ?(?:option )?(?![AI] [a-z])(?:\([A-Za-z]\)|[A-Z](?![\w'’]))"
    r"|\([A-Za-z]\))"
)
_FIRST = re.compile(r"(?:^|\n|[.;!?] )\(?(?P<letter>[A-Z]|[a-z](?=[.)] ))(?:\)|[.:,。]|(?=\n|$))")
_CLAUSE = re.compile(r"[.,;!?。，；]|(?<!thing )\bbut\b")
_REASON = re.compile(r"\b(?:since|because|as|given|due to|while|whereas)\b[^.!?;]*", re.IGNORECASE)
_NOT = re.compile(
    r"\b(?:not|cannot|never|neither|wrong|incorrect|false|except|(?:any|every)thing but|rather than|instead of|unlike)\b"
    r"|n['’]t\b|不",
    re.IGNORECASE,
)
_AFTER_LETTER = {"because", "since", "as", "and", "or", "which", "given", "due", "by", "for", "based", "is", "not", "but"}
_AFTER_A = {"seems", "looks", "fits", "works", "must", "would", "cannot", "can"}


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
@scoped
def multiple_choice(
    completion: str, answer: str | int, *, choices: str = "ABCDEFGHIJ", log_extra: LogExtra = not_logged
) -> float:
    """1.0 if the completion settles on the right choice, else 0.0. `answer` is its letter, or its index in `choices` from 0.

    What counts is, in this order: the last `\\boxed{C}`; the last "answer is (C)" or "Answer: C"; a first line that begins
    with a choice; the last line that names one. Where there are `<answer>` tags it is looked for in the last of them only.
    Choices that a sentence denies do not count: "C, not B" is C. "B or C", "B; D" and "not B" are no choice, and neither is
    the article in "A dog".

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
    log_extra("answer", found)
    return NO_ANSWER if found is None else float(found == right)


def chosen(completion: str, choices: str) -> str | None:
    """The letter that a completion settles on, a capital; None if there is none, or more than one.

    >>> [chosen(text, "ABCD") for text in ("Answer: b.", "So I take C", "It is B, not C", "B or C", "A dog")]
    ['B', 'C', 'B', None, None]
    """
    completion = without_markup(completion[-_MAX_COMPLETION:])
    tagged = last_tagged(completion)
    text = completion if tagged is None else tagged
    box = last_boxed(text)
    text = _plain(text if box is None else box)
    if alone := _ALONE.fullmatch(text):
        return alone[1].upper()
    if box is not None:
        return _settled(_LETTER.match(text))
    for marker in reversed(list(_MARKER.finditer(text))):
        letter = _LETTER.match(text, marker.end())
        if letter and _is_choice(letter):
            return _settled(letter)
        if any(said := _said(text[marker.end() :][:_MAX_SENTENCE].partition("\n")[0], choices)):
            return _only(said[0])
    firsts = list(_FIRST.finditer(text))
    if firsts and firsts[0].start() == 0 and len({first["letter"] for first in firsts}) == 1:
        return _settled(_LETTER.search(text))
    lines = [_said(line, choices) for line in text.split("\n")]
    return next((_only(said[0]) for said in reversed(lines) if any(said)), None)


def _said(text: str, choices: str) -> tuple[set[str], set[str]]:
    """The choices that a line names, reasons left out, and those that it denies."""
    named, denied = set(), set()
    for clause in _CLAUSE.split(_REASON.sub("", text)):
        letters = [
            letter for letter in _LETTER.finditer(clause) if _is_choice(letter) and not (letter["bare"] or "").islower()
        ]
        letters = [letter for letter in letters if _capital(letter) in choices]
        no = _NOT.search(clause)
        after = [letter for letter in letters if no and letter.start() > no.start()]
        against = after or (letters if no else [])
        denied |= set(map(_capital, against))
        named |= {_capital(letter) for letter in letters if letter not in against}
    return named, denied


def _only(letters: set[str]) -> str | None:
    """The only one of some letters; None if there are none or several."""
    return next(iter(letters)) if len(letters) == 1 else None


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
    word = tail.split()[0].lower()
    if letter["bare"] == "A" and word in _AFTER_A:
        return True
    return (letter["bare"] not in "AI" and letter["bare"].isupper()) or word in _AFTER_LETTER
