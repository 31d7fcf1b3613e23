"""Math: whether the answer that a completion gives equals the dataset's, on top of math-verify."""

from __future__ import annotations

import re
from cmath import isfinite
from dataclasses import replace
from fractions import Fraction
from numbers import Real

from grpo_hf.reward_fns.marks import LogExtra, not_logged, scoped
from grpo_hf.reward_fns.math.find import find_answer, value_in
from grpo_hf.reward_fns.math.forms import Form, has_words, is_choice, read, right_side, with_unit
from grpo_hf.reward_fns.math.sympy import check, equal
from grpo_hf.reward_fns.math.text import ProseError, UnreadableError
from grpo_hf.reward_fns.math.units import NONE, PERCENT, Unit
from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, parses_gold
from grpo_hf.rewards.registry import register_reward

_MODES = ("lenient", "strict")
_PERCENTS = ("loose", "exact")
_RELATION = re.compile(r"[<>]|\\(?:leq|geq|neq)")
_TIME = re.compile(r"\d{1,2}:\d\d")
_INTERVALS = {"()", "(]", "[)", "[]"}
_UNORDERED = {",", "{}"}
_VECTORS = {"m", "()", "<>"}
_LISTS = {*_VECTORS, "[]", ","}


def parse_gold(answer: str | int | float) -> Form:
    """Read a dataset's answer: what a worked solution marks as its answer, or all of the text.

    >>> parse_gold("9 * 2 = 18\\n#### 18") == parse_gold(18) == parse_gold("So $\\\\boxed{18}$.")
    True

    Raises:
        BadGoldError: it cannot be read, with its end and the reason.
    """
    text = str(answer)
    try:
        if not isinstance(answer, str) and not (isinstance(answer, Real) and isfinite(answer)):
            raise UnreadableError(f"neither text nor a finite number but {type(answer).__name__}")
        form = read(find_answer(text, strict=True) or text)
        _check(form)
    except UnreadableError as error:
        raise BadGoldError(f"math cannot read the answer {text[-200:]!r}: {error}") from error
    return form


@register_reward
@parses_gold(parse_gold)
@scoped
def math(
    completion: str, answer: Form, *, mode: str = "lenient", percent: str = "loose", log_extra: LogExtra = not_logged
) -> float:
    """1.0 if the answer that a completion gives equals the dataset's, else 0.0; no answer if it gives none to read.

    `answer` is a bare answer (LaTeX, plain text, a number) or a worked solution that marks it. Marked is what the last of
    these holds: `\\boxed{}` (several joined by a comma, `and` or `or` are one answer), `<answer>`, a line with `####`,
    "final answer is". In `lenient` mode an unmarked answer counts too: what follows the last "answer is" or "answer:" up to
    the end of its line, or else the value that the last sentence comes to; and of a marked sentence its value, but none that
    it denies ("not 5") or only bounds ("at least 5"). Only the last 20,000 characters are searched (2,000 for an unmarked
    value), bold and other markup does not matter, and what stands before `</think>` does not count (the option `scope`:
    auto, after_think, whole).

    Equal in both modes: numbers of one exact value, however written (1/2, 0.5, \\frac12; 1,234; 2 1/2; 3e2), never rounded;
    expressions that math-verify finds equal; sets and bare lists in any order; tuples, intervals and matrices in theirs,
    each bracket the same; `x = 3` where 3 is asked, but not y = 3 for x = 3; equations with the same solutions; a list that
    says the one answer several times (3/4 or 0.75); (C) 12 for C and for 12.

                  lenient                                 strict
        units     a missing one is ignored, 1 m = 100 cm  the gold answer's, unconverted
        percent   50% = 50 = 0.5 = 1/2                    on both or on neither
        names     3 for x = 3                             x = 3 for x = 3
        brackets  1, 2 or <1, 2> for (1, 2); 5 for {5}    as in the gold answer; 1, 2 for {1, 2}
        ranges    x > 3 for (3, \\infty) and back           as in the gold answer

    With `percent="exact"` 50% is 0.5 and not 50 in lenient mode.

    Not read, so no answer (and bad gold): more than 1,000 characters or digits, 64 elements or 12 nested brackets; powers
    and factorials of more than about 5,000 digits (9^{9^{9}}); dots; sums, integrals and limits that the gold answer does
    not have. Decimal commas and angles in radians for degrees are not understood. Deadlines are the caller's: math-verify's
    own need the main thread's signals and are off.

    >>> math("So it is $\\\\boxed{\\\\frac{6}{4}}$.", "1.5"), math("It costs **$18** a day.", "9 * 2 = 18\\n#### 18")
    (1.0, 1.0)
    >>> math("\\\\boxed{[1, 2)}", "(1, 2)"), math("\\\\boxed{3.33}", "10/3"), math("The answer is 4 or 5.", "5")
    (0.0, 0.0, 0.0)
    >>> [math("The answer is 5 cm.", "5 cm", mode=mode) for mode in ("lenient", "strict")]
    [1.0, 0.0]
    >>> [math("\\\\boxed{50\\\\%}", "50", percent=percent) for percent in ("loose", "exact")]
    [1.0, 0.0]

    Raises:
        BadGoldError: the answer cannot be read.
        ValueError: an unknown mode, percent or scope.
    """
    if mode not in _MODES:
        raise ValueError(f"math has no mode {mode!r}; its modes are: {', '.join(_MODES)}")
    if percent not in _PERCENTS:
        raise ValueError(f"math cannot take percent={percent!r}; it is one of: {', '.join(_PERCENTS)}")
    strict = mode == "strict"
    text = find_answer(completion, strict=strict, words=has_words(answer))
    log_extra("answer", text)
    if text is None:
        return NO_ANSWER
    try:
        form = _read(text, answer, strict=strict)
        pairs = [(answer, form)]
        if percent == "loose" and not strict:
            pairs.append((_without_percent(answer), _without_percent(form)))
        return float(any(same(gold, given, strict=strict) for gold, given in dict.fromkeys(pairs)))
    except UnreadableError:
        return NO_ANSWER


def _read(text: str, gold: Form, *, strict: bool) -> Form:
    """A completion's answer, as its kind of gold answer asks for: 1,200 as two elements, of a sentence its value.

    Raises:
        UnreadableError: it cannot be read, or is a sentence without a value.
    """
    try:
        form = read(text)
    except ProseError:
        form = None
    if not strict and not gold.words and (form is None or re.search("[0-9]", form.words)):
        form = read(value_in(text) or "")
    if form is None or (gold.parts and not form.parts):
        form = read(text, thousands=False)
    return form


def _without_percent(form: Form) -> Form:
    """The same without percent signs."""
    parts = tuple(map(_without_percent, form.parts))
    return replace(form, unit=NONE if form.unit == PERCENT else form.unit, parts=parts)


def same(gold: Form, form: Form, *, strict: bool) -> bool:
    """Whether two answers are equal.

    Raises:
        UnreadableError: an expression in the second cannot be parsed, or is too big.
    """
    if gold.label or form.label:
        letters = [one.label or (one.latex if is_choice(one) else "") for one in (gold, form)]
        if all(letters):
            return letters[0] == letters[1]
    if _is_equation(form) and not _is_equation(gold) and not gold.name:
        form = right_side(form)
    if (gold.name != form.name and gold.name and form.name) or _is_equation(gold) or _is_equation(form):
        return not (gold.parts or form.parts) and gold.value is None and equal(_whole(gold), _whole(form), relations=False)
    if strict and gold.name != form.name and gold.name:
        return False
    if gold.words or form.words:
        return (gold.words or gold.latex.casefold()) == (form.words or form.latex.casefold())
    if gold.parts and form.parts:
        return _same_parts(gold, form, strict=strict)
    if gold.parts or form.parts:
        return _same_as_parts(gold, form, strict=strict)
    return _same_single(gold, form, strict=strict)


def _same_parts(gold: Form, form: Form, *, strict: bool) -> bool:
    """Elements one by one, in any order where neither the brackets nor the names of one side give one."""
    pair = {gold.brackets, form.brackets}
    names = [{part.name for part in one.parts if part.name} for one in (gold, form)]
    ordered = not pair <= _UNORDERED or (max(map(len, names)) > 1 and not all(names))
    if not ordered:
        equals = [[same(part, other, strict=strict) for other in form.parts] for part in gold.parts]
        return all(map(any, equals)) and all(map(any, zip(*equals, strict=True)))
    count = len(gold.parts)
    loose = pair <= _VECTORS or pair in ({"m", "[]"}, {",", "()"}) or (count > 2 and pair <= _LISTS)
    if count != len(form.parts) or (len(pair) > 1 and (strict or not loose)):
        return False
    couples = list(zip(gold.parts, form.parts, strict=True))
    if pair == {":"} and not strict and not _TIME.fullmatch(gold.latex):
        quotients = {one.value / other.value if one.value and other.value else None for one, other in couples}
        if None not in quotients:
            return len(quotients) == 1
    return all(same(part, other, strict=strict) for part, other in couples)


def _same_as_parts(gold: Form, form: Form, *, strict: bool) -> bool:
    """Several elements and one expression: one value said twice, a set's only element, an interval's inequality, a union."""
    whole, single = (gold, form) if gold.parts else (form, gold)
    if whole is form and whole.brackets == ",":
        return all(same(gold, part, strict=strict) for part in form.parts)
    if whole.brackets == "{}" and len(whole.parts) == 1 and not strict:
        only = whole.parts[0]
        return same(only, form, strict=False) if whole is gold else same(gold, only, strict=False)
    if whole.brackets in (",", ":") or single.value is not None:
        return False
    relation = _RELATION.search(single.latex) is not None
    if relation and (strict or len(whole.parts) != 2 or whole.brackets not in _INTERVALS or "," in whole.name):
        return False
    return equal(gold.latex, form.latex, relations=relation)


def _same_single(gold: Form, form: Form, *, strict: bool) -> bool:
    """Two numbers or expressions, with their units."""
    if gold.value is not None and form.value is None and not strict:
        form = with_unit(form)
    scales = _scales(gold.unit, form.unit, strict=strict)
    if scales is None:
        return False
    if gold.value is not None and form.value is not None:
        return gold.value * scales[0] == form.value * scales[1]
    if gold.latex == form.latex and scales[0] == scales[1]:
        return True
    return equal(_scaled(gold, scales[0]), _scaled(form, scales[1]), relations=False)


def _scales(gold: Unit, form: Unit, *, strict: bool) -> tuple[Fraction, Fraction] | None:
    """What to multiply the two answers by before they are compared; None if their units cannot agree."""
    one = Fraction(1)
    if strict:
        return (one, one) if gold == form or (gold == NONE and form != PERCENT) else None
    (first, size), (second, other_size) = (unit if unit[0][:1] != "?" else NONE for unit in (gold, form))
    if first == second or {first, second} == {NONE[0], PERCENT[0]}:
        return size, other_size
    return (one, one) if NONE[0] in (first, second) else None


def _is_equation(form: Form) -> bool:
    """Whether it is an equation that gives no name a value."""
    return not form.parts and not form.words and "=" in form.latex


def _whole(form: Form) -> str:
    """The LaTeX with its name."""
    return f"{form.name} = {form.latex}" if form.name else form.latex


def _scaled(form: Form, scale: Fraction) -> str:
    """The LaTeX of a multiple; of a number exactly."""
    if form.value is not None:
        return _fraction(form.value * scale)
    return form.latex if scale == 1 else f"{_fraction(scale)} \\cdot ({form.latex})"


def _fraction(value: Fraction) -> str:
    """A number in LaTeX."""
    return rf"{'-' if value < 0 else ''}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _check(gold: Form) -> None:
    """Parse every expression of a gold answer, for the errors."""
    for part in gold.parts:
        _check(part)
    if not gold.parts and not gold.words and gold.value is None:
        check(gold.latex)
