"""GSM8K: compare the number that a completion ends on with the reference solution's, exactly."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from fractions import Fraction

from grpo_hf.reward_fns.marks import MARKER, LogExtra, last_boxed, last_tagged, not_logged, scoped
from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, parses_gold
from grpo_hf.rewards.registry import register_reward

_MAX_DIGITS = 100  # a longer number is no answer; parsing it would only cost time

_PLAIN = [
    (re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}"), r"\1/\2"),
    (re.compile(r"\{,\}|,?\\[,!](?=[0-9])"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed|left|right)\b|\\[,!;: ()\[\]]"), " "),
    (re.compile(r"\^\{?\\circ\}?|[{}~]"), " "),
    (re.compile(r"[−–]|\b(?:negative|minus)\s+(?=[\s$€£¥]*[0-9.])", re.IGNORECASE), "-"),
    (re.compile(r"^[\s$]*[A-Za-z][A-Za-z0-9_ ]*="), ""),
]
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)[\s$€£¥]{0,4}"
    r"(?P<value>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/(?P<divisor>[0-9]+))?"
)
# What makes a number the start of something else: a sum, a range, a time, a power, a list, a choice, 1e5, 4!.
_GOES_ON = re.compile(
    r"\s*(?:[-+*/^×·÷:.,;|&~]\s*|(?:or|and|to)\s+)*[0-9]|[eE][-+]?[0-9]|!|[kK]\b|[^.\n]{0,60}\b(?:or|and)\s+[^\w\s]?[0-9]"
)
_NOT_THIS = re.compile(r"\b(?:not|neither|nor|least|most|than|between)\s*$", re.IGNORECASE)
_HEADING = re.compile(r"(?!(?:negative|minus)\b)(?:[A-Za-z]{2,}\b(?!\s*=)|[0-9]+\. +[A-Za-z])", re.IGNORECASE)
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_POWER = re.compile(rf"\s*({'|'.join(_POWERS)})\b", re.IGNORECASE)
_ANY_NUMBER = re.compile(r"(?:(?<![\w).])-)?[$€£¥]?([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def gold_number(answer: str | int | float) -> Fraction:
    """The number after the last `####` of a reference solution, or the bare number.

    >>> gold_number("2 + 2 = 4\\n#### 1,450,000"), gold_number(0.5)
    (Fraction(1450000, 1), Fraction(1, 2))

    Raises:
        BadGoldError: there is none, with the text.
    """
    text = str(answer)
    marked = MARKER in text
    number = completion_number(text) if marked else parse_number(text)
    if number is None or (not marked and any(character.isalpha() for character in text)):
        raise BadGoldError(f"gsm8k finds no number in the answer {_shortened(text)!r}; it needs '#### 18' or '18'")
    return number


@register_reward
@parses_gold(gold_number)
@scoped
def gsm8k(completion: str, answer: Fraction, *, reading: str = "marked", log_extra: LogExtra = not_logged) -> float:
    """1.0 if the number that the completion gives equals that of the reference solution, else 0.0.

    By the reading `marked` the completion's number is what the last of these holds: a line with `####`, `\\boxed{}`,
    `<answer>`; without any there is no answer, and a line with `####` that is a heading is none of them. By `last_number` it
    is the last number of the text, whatever it says. `answer` is a reference solution with `####`, or the bare number.
    Thousands separators, currency, `%`, units and a final period do not matter, and 18 = 18.0 = 18.00.

    >>> gsm8k("9 * 2 = 18, so\\n#### $18.00", "She makes 9 * 2 = 18.\\n#### 18")
    1.0
    >>> gsm8k("So it is \\\\boxed{70{,}000}.", "70000"), gsm8k("It is 18.", "18"), gsm8k("#### 17 or 18", 18)
    (1.0, 0.0, 0.0)
    >>> gsm8k("It is 18.", "18", reading="last_number")
    1.0

    Raises:
        BadGoldError: the reference has no number, with its text.
        ValueError: an unknown reading.
    """
    if reading not in READINGS:
        raise ValueError(f"gsm8k has no reading {reading!r}; its readings are: {', '.join(READINGS)}")
    number = READINGS[reading](completion)
    log_extra("answer", None if number is None else str(number))
    return NO_ANSWER if number is None else float(number == answer)


def completion_number(completion: str) -> Fraction | None:
    """The number that a completion marks as its answer, or None.

    >>> completion_number("\\\\boxed{3} or rather \\\\boxed{\\\\frac{7}{2} \\\\text{ miles}}")
    Fraction(7, 2)
    """
    marks = [
        _hash_line(completion),
        (completion.rfind("\\boxed"), last_boxed(completion)),
        (completion.rfind("<answer>"), last_tagged(completion)),
    ]
    _, last = max((start, text or "") for start, text in marks)
    return parse_number(last)


def last_number(text: str) -> Fraction | None:
    """The last number of a text, or None; the reading of Stanford's CS336, assignment 5.

    >>> last_number("She has 12 - 5 = 7 of 1,000.")
    Fraction(1000, 1)
    """
    found = deque(_ANY_NUMBER.finditer(text), maxlen=1)
    digits = found[0][1].replace(",", "") if found else ""
    if not found or len(digits) > _MAX_DIGITS:
        return None
    return -Fraction(digits) if found[0].group().startswith("-") else Fraction(digits)


READINGS: dict[str, Callable[[str], Fraction | None]] = {"marked": completion_number, "last_number": last_number}


def parse_number(text: str) -> Fraction | None:
    """The first number of a text (past a leading `x =`), exactly; None if there is none or it is a part of more.

    >>> [str(parse_number(text)) for text in ("-$1,450.50 in all.", "50%", "5/10 kg", "x_1 = 3")]
    ['-2901/2', '50', '1/2', '3']
    >>> [parse_number(text) for text in ("2 + 3", "10-12", "3:30", "2^10", "1e5", "18, 19", "\\\\sqrt{18}", "none")]
    [None, None, None, None, None, None, None, None]
    """
    if (digits := text.strip()).isdecimal() and len(digits) <= _MAX_DIGITS:
        return Fraction(int(digits))  # most are nothing else
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    match = _NUMBER.search(text)
    if match is None or "\\" in text or _NOT_THIS.search(text, 0, match.start()) or _GOES_ON.match(text, match.end()):
        return None
    digits, divisor = match["value"].replace(",", ""), match["divisor"] or "1"
    if len(digits) + len(divisor) > _MAX_DIGITS or int(divisor) == 0:
        return None
    size = Fraction(digits) / int(divisor)
    if power := _POWER.match(text, match.end()):
        size *= 10 ** _POWERS[power[1].lower()]
    return -size if match["sign"] == "-" else size


def _hash_line(text: str) -> tuple[int, str | None]:
    """Where the last line with `####` stands that is no heading, and what it says."""
    end = len(text)
    while (start := text.rfind(MARKER, 0, end)) >= 0:
        line, _, rest = text[start + len(MARKER) : end].lstrip(" :\t\n").partition("\n")
        if re.search("[0-9]", line) and not (_HEADING.match(line) and (rest + text[end:]).strip()):
            return start, line
        end = start
    return -1, None


def _shortened(text: str) -> str:
    """The end of a long text, where its answer would be."""
    return text if len(text) <= 200 else "..." + text[-200:]
