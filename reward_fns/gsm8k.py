"""GSM8K: compare the number that a completion ends on with the reference solution's, exactly."""

from __future__ import annotations

import re
from fractions import Fraction

from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, parses_gold
from grpo_hf.rewards.registry import register_reward
from reward_fns.marks import MARKER, last_boxed, last_tagged, scoped, without_emphasis

_MAX_DIGITS = 100  # a longer number is no answer; parsing it would only cost time

_PLAIN = [
    (re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}"), r"\1/\2"),
    (re.compile(r"\{,\}|,?\\[,!](?=[0-9])"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed|left|right)\b|\\[,!;: ()\[\]]"), " "),
    (re.compile(r"\^\{?\\circ\}?|[{}~]"), " "),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"^[\s$]*[A-Za-z][A-Za-z0-9_ ]*="), ""),
]
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)[\s$€£¥]{0,4}"
    r"(?P<value>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/(?P<divisor>[0-9]+))?"
)
# What makes a number the start of something else: a sum, a range, a time, a power, a list, a mixed number, 1e5.
_GOES_ON = re.compile(r"\s*(?:[-+*/^×·÷:.,]\s*)*[0-9]|[eE][-+]?[0-9]")


def gold_number(answer: str | int | float) -> Fraction:
    """The number after the last `####` of a reference solution, or the bare number.

    >>> gold_number("2 + 2 = 4\\n#### 1,450,000"), gold_number(0.5)
    (Fraction(1450000, 1), Fraction(1, 2))

    Raises:
        BadGoldError: there is none, with the text.
    """
    text = str(answer)
    marked = MARKER in text
    number = _number_after_marker(text) if marked else parse_number(text)
    if number is None or (not marked and any(character.isalpha() for character in text)):
        raise BadGoldError(f"gsm8k finds no number in the answer {_shortened(text)!r}; it needs '#### 18' or '18'")
    return number


@register_reward
@parses_gold(gold_number)
def gsm8k(completion: str, answer: Fraction) -> float:
    """1.0 if the number that the completion gives equals that of the reference solution, else 0.0.

    The completion's number is the one after its last `####`, or else the content of its last `\\boxed{}`; without
    either there is no answer. `answer` is a reference solution with `####`, or the bare number. Thousands separators,
    currency, `%`, units and a final period do not matter, and 18 = 18.0 = 18.00.

    >>> gsm8k("9 * 2 = 18, so\\n#### $18.00", "She makes 9 * 2 = 18.\\n#### 18")
    1.0
    >>> gsm8k("So it is \\\\boxed{70{,}000}.", "70000"), gsm8k("It is 18.", "18"), gsm8k("#### 18/5", 18)
    (1.0, 0.0, 0.0)

    Raises:
        BadGoldError: the reference has no number, with its text.
    """
    number = completion_number(completion)
    return NO_ANSWER if number is None else float(number == answer)


def completion_number(completion: str) -> Fraction | None:
    """The number that a completion gives as its answer, or None.

    >>> completion_number("\\\\boxed{3} or rather \\\\boxed{\\\\frac{7}{2} \\\\text{ miles}}")
    Fraction(7, 2)
    """
    number = _number_after_marker(completion)
    if number is None and (box := last_boxed(completion)) is not None:
        number = parse_number(box)
    return number


def parse_number(text: str) -> Fraction | None:
    """The first number of a text (past a leading `x =`), exactly; None if there is none or it is a part of more.

    >>> [str(parse_number(text)) for text in ("-$1,450.50 in all.", "50%", "5/10 kg", "x_1 = 3")]
    ['-2901/2', '50', '1/2', '3']
    >>> [parse_number(text) for text in ("2 + 3", "10-12", "3:30", "2^10", "1e5", "18, 19", "\\\\sqrt{18}", "none")]
    [None, None, None, None, None, None, None, None]
    """
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    match = _NUMBER.search(text)
    if match is None or "\\" in text or _GOES_ON.match(text, match.end()):
        return None
    digits, divisor = match["value"].replace(",", ""), match["divisor"] or "1"
    if len(digits) + len(divisor) > _MAX_DIGITS or int(divisor) == 0:
        return None
    size = Fraction(digits) / int(divisor)
    return -size if match["sign"] == "-" else size


def _number_after_marker(text: str) -> Fraction | None:
    """The number on the line after the last `####`."""
    _, marker, tail = text.rpartition(MARKER)
    lines = tail.strip().splitlines()
    return parse_number(lines[0]) if marker and lines else None


def _shortened(text: str) -> str:
    """The end of a long text, where its answer would be."""
    return text if len(text) <= 200 else "..." + text[-200:]
