"""Reading a mathematical answer: from what somebody wrote to its form, nothing evaluated but plain numbers.

The brackets, the order, the units and the names of an answer are read here, since a parsed expression no longer has them:
to latex2sympy `(1,2)` is an interval, `1,2` a set, `5 cm` is 5 and `1011_2` is 1011.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from grpo_hf.reward_fns.math.text import MAX_DIGITS, ProseError, UnreadableError, parse_number, plain, split, strip, unwrap
from grpo_hf.reward_fns.math.units import NONE, Unit, is_known, parse_unit

MAX_CHARACTERS = 1000
MAX_PARTS = 64
MAX_WORDS = 8


@dataclass(frozen=True)
class Form:
    """An answer, taken apart; plain values, because pickling a sympy tree evaluates it."""

    latex: str
    """The answer without its name and unit, in the LaTeX that latex2sympy takes."""
    name: str = ""
    """What stands before `=` or `\\in`: the x of x = 3."""
    brackets: str = ""
    """`()`, `[)`, `{}` and so on around the parts, `,` a bare list, `:` a ratio, `m` a matrix; empty for a single value."""
    parts: tuple[Form, ...] = ()
    """The elements, or the rows of a matrix."""
    value: Fraction | None = None
    """The number, where it is written as one."""
    words: str = ""
    """The answer in words, without case."""
    unit: Unit = NONE
    """The unit, the currency, the percent sign or the number's base."""
    label: str = ""
    """The letter of the choice that it is: the C of (C) 12."""


_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+))(?!,?[\d/]| \d)")
_MATRIX = re.compile(r"\\begin\{([bpB]?matrix|array)\}(?:\{[lcr|]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL)
_SYMBOL = r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{\w+\}))?'*"
_NAME = (
    rf"{_SYMBOL}(?:\(\s*{_SYMBOL}(?:,\s*{_SYMBOL})*\s*\))?|\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})+\s*\)"
    rf"|{_SYMBOL}\s*:\s*{_SYMBOL}|[A-Za-z ]{{2,30}}|\\text\{{[^{{}}]*\}}"
)
_ASSIGNMENT = re.compile(rf"(?P<name>{_NAME})\s*(?:=|\\in(?![A-Za-z])|\\approx)\s*(?P<body>[^<>]+)", re.DOTALL)
_FLIPPED = re.compile(rf"(?P<body>[^A-Za-z=<>]+)=\s*(?P<name>{_SYMBOL})")
_CURRENCY = re.compile(r"(?P<sign>[-+]?)\s*(?:US)?\\?(?P<unit>[$€£¥₹])\s*(?P<value>.+)", re.DOTALL)
_TEXT_UNIT = re.compile(
    r"(?P<value>.*?[^\s\\{(])\s*(?P<unit>\\text\s*\{[^{}]*\}(?:[\sA-Za-z_/%{}]|\^\s*\{?\d\}?|\\text\s*\{[^{}]*\})*|\\?[%$])",
    re.DOTALL,
)
_WORD_UNIT = re.compile(
    r"(?P<value>.*?(?:[\d})\]!]|\\[A-Za-z]+))(?P<unit>\s*(?<![\\A-Za-z])(?:[^\W\d_]|[¢€£¥₹])(?:[^\d^\\=<>$]|\^\s*\{?\d\}?)*)",
    re.DOTALL,
)
_LABEL = re.compile(
    r"(?:\\text\s*\{\s*)?(?:\((?P<held>[A-J])\)|(?P<bare>[A-J])[.)])\s*(?:\}\s*|(?<=\s))(?P<rest>.+)", re.DOTALL
)
_HEDGE = re.compile(r"\s*(?:or|not|but)(?![A-Za-z])")
_GLUED = re.compile(r"(?P<value>-?[\d.]+)(?P<unit>[A-Za-z]+(?:\^\{?\d\}?)?)")
_SHORT_WORDS = {"a", "an", "as", "at", "by", "if", "in", "is", "of", "on", "so", "to"}
_BASED = re.compile(r"(?P<value>[0-9A-F]+)_(?:\{(?P<base>\d+)\}|(?P<base_>\d))")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]+\}|\\(?!text)[A-Za-z]+")
_WORDS = re.compile(r"[A-Za-z0-9][A-Za-z0-9' .:\-]*")
_PROSE = re.compile(
    r"[A-Za-z]{4}|(?<![A-Za-z])[A-Za-z]{2,}\s+(?:[A-Za-z]{2,}|[-$]?\d)|[a-z]['’][a-z]+\s|\([a-z]{3,}\)|[\u0400-\u1fff\u3040-\ud7ff]|\\text"
)


def read(text: str, *, thousands: bool = True) -> Form:
    """Take an answer apart.

    With ``thousands`` the commas of a bare 1,234,567 separate thousands, else elements.

    >>> form = read("x = 2\\\\frac12 \\\\text{ kg}")
    >>> form.name, form.value, form.unit
    ('x', Fraction(5, 2), ('mass', Fraction(1000, 1)))
    >>> [str(part.value) for part in read("1,200, 0.5 and 3e2").parts], read("(1, 2]").brackets
    (['1200', '1/2', '300'], '(]')

    Raises:
        UnreadableError: nothing, prose, or more than the limits of this module and of math_text.
    """
    if len(text) > MAX_CHARACTERS:
        raise UnreadableError(f"longer than {MAX_CHARACTERS} characters")
    if (number := text.strip()).isdecimal() and len(number) < MAX_DIGITS:
        return Form(number, value=Fraction(int(number)))  # most answers, and none of the rest is for them
    text = plain(text)
    if thousands and not re.search(r"[(\[]|\\\{", text):
        text = _THOUSANDS.sub(lambda match: match[1].replace(",", "").replace(" ", ""), text)
    return _read(text)


def right_side(form: Form) -> Form:
    """What stands after the last `=` of an equation that is no assignment.

    Raises:
        UnreadableError: it cannot be read, or numbers on two sides differ.
    """
    return _read(_last_side(form.latex))


def with_unit(form: Form) -> Form:
    """A number with a letter right after it, such as 18m, as a number with its unit if the letter is one; else as it is."""
    match = _GLUED.fullmatch(form.latex)
    value = parse_number(match["value"]) if match and form.unit == NONE and is_known(match["unit"]) else None
    return form if value is None or match is None else replace(form, value=value, unit=parse_unit(match["unit"]))


def has_words(form: Form) -> bool:
    """Whether words stand in it."""
    return bool(form.words) or any(map(has_words, form.parts))


def is_choice(form: Form) -> bool:
    """Whether it is one capital letter, as the choices of a question have."""
    return re.fullmatch("[A-J]", form.latex) is not None


def _read(text: str, name: str = "") -> Form:
    """Take apart a plain text, which may have been given a name before."""
    text = strip(text)
    if not text:
        raise UnreadableError("nothing")
    if match := _MATRIX.fullmatch(text):
        return Form(text, name, "m", tuple(_row(row) for row in match[2].split(r"\\") if row.strip()))
    if match := _LABEL.fullmatch(text):
        return replace(_read(match["rest"], name), label=match["held"] or match["bare"])
    if len(parts := _elements(text)) > 1:
        return _sequence(text, name, ",", parts)
    if not name and (match := _ASSIGNMENT.fullmatch(text) or _FLIPPED.fullmatch(text)):
        return _read(_last_side(match["body"]), _name(match["name"]))
    brackets, inside = unwrap(text)
    parts = _elements(inside) if brackets else []
    if len(parts) > 1 or brackets == "{}":
        return _sequence(text, name, brackets, parts)
    if brackets:
        return _read(inside, name)
    if text.count(r"\pm") == 1:
        return _sequence(text, name, ",", [text.replace(r"\pm", sign) for sign in "+-"])
    if len(parts := split(text, ":")) > 1:
        return _sequence(text, name, ":", parts)
    return _single(text, name)


def _elements(text: str) -> list[str]:
    """What semicolons separate, or else commas."""
    parts = split(text, ";")
    return parts if len(parts) > 1 else split(text, ",")


def _last_side(text: str) -> str:
    """What stands after the last `=`; a number at the beginning may differ from it by rounding only, or two are offered."""
    sides = [strip(side) for side in split(text, "=")]
    first, last = parse_number(sides[0]), parse_number(sides[-1])
    if first is None or last is None or first == last:
        return sides[-1]
    if 1 in (first.denominator, last.denominator) or abs(first - last) > abs(last) / 100:
        raise UnreadableError("an equation whose sides differ")
    return sides[-1]


def _name(text: str) -> str:
    """What is given a value, without white space and braces: of `So x` the x."""
    words = text.split()
    return re.sub(r"\\text|[{}\s]", "", words[-1] if len(words[-1]) == 1 else text)


def _row(text: str) -> Form:
    """A matrix's row, or its only cell."""
    cells = split(text, "&")
    return _read(text) if len(cells) == 1 else _sequence(text, "", "m", cells)


def _sequence(text: str, name: str, brackets: str, parts: list[str]) -> Form:
    """Several answers in one."""
    if len(parts) > MAX_PARTS:
        raise UnreadableError(f"more than {MAX_PARTS} parts")
    forms = [_read(part) for part in parts]
    names = [form.name for form in forms]
    size = names.index(names[0], 1) if names[0] in names[1:] else 1
    if size > 1 and names == names[:size] * (len(names) // size):  # p = 5, q = 2, p = 7, q = 2 are two pairs
        forms = [Form(text, "", ",", tuple(forms[start : start + size])) for start in range(0, len(forms), size)]
    return Form(text, name, brackets, tuple(forms))


def _single(text: str, name: str) -> Form:
    """A number, a word or an expression, with its unit."""
    whole = text
    text, unit = _take_unit(text)
    value = parse_number(text)
    if value is not None:
        return Form(text, name, value=value, unit=unit)
    bare = strip(_TEXT.sub(r" \1 ", text))
    if match := re.fullmatch(r"\(?([A-Za-z])\)?", bare):
        return Form(match[1], name, unit=unit)
    prose = _PROSE.search(_COMMAND.sub(" ", text)) or bare.casefold() in ("yes", "no")
    if not prose:
        return Form(text, name, unit=unit) if "=" not in text else Form(whole, name)  # whose last side keeps its unit
    if not _WORDS.fullmatch(bare) or len(bare.split()) > MAX_WORDS:
        raise ProseError("prose")
    return Form(bare, name, words=" ".join(bare.casefold().split()), unit=unit)


def _take_unit(text: str) -> tuple[str, Unit]:
    """Cut off a currency sign, a percent sign, a unit in words or a number's base."""
    if match := _BASED.fullmatch(_TEXT.sub(r"\1", text)):
        return match["value"], ("base " + (match["base"] or match["base_"]), Fraction(1))
    if match := _CURRENCY.fullmatch(text):
        value, unit = _take_unit(match["value"])
        return match["sign"] + value, parse_unit(match["unit"]) if unit == NONE else unit
    if match := _TEXT_UNIT.fullmatch(text):
        phrase = _TEXT.sub(r" \1 ", match["unit"]).replace("\\", "")
        if _HEDGE.match(phrase):
            return text, NONE
        if not match["value"][-1].isalpha() or is_known(phrase.strip()):
            return strip(match["value"]), parse_unit(phrase)
    if (match := _WORD_UNIT.fullmatch(text)) and _is_unit(match["unit"]):
        return strip(match["value"]), parse_unit(match["unit"])
    return text, NONE


def _is_unit(phrase: str) -> bool:
    """Whether plain words after a number are its unit or go on about it, and are not symbols that it is multiplied by."""
    spaced, words = phrase[0].isspace(), re.findall(r"[^\W\d_]+|[¢€£¥₹]", phrase)
    if _HEDGE.match(phrase):
        return False
    if parse_unit(phrase)[0][0] != "?":
        return spaced or len(words[0]) > 1 or not words[0].isascii()
    if not words[0].isascii():
        return True
    prose = words[0] in _SHORT_WORDS if len(words[0]) < 3 else True
    return spaced and prose and (len(words[0]) > 2 or len(words) > 1)
