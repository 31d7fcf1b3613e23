"""The border to latex2sympy and math-verify: parsing and comparing single expressions, nothing too big evaluated."""

from __future__ import annotations

import functools
import logging
import math
import re

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify

from grpo_hf.reward_fns.math.text import UnreadableError

MAX_SIZE = 5000
MAX_TERMS = 500
_FLOAT_DIGITS = 100

# Calls without its time limits are meant: those need the signals of a main thread.
logging.getLogger("math_verify.grader").addFilter(lambda record: "Timeout is disabled" not in record.getMessage())

_CONFIG = ConversionConfig(lowercase_symbols=False)  # R - r is not 0
_UNDONE = re.compile(r"\\(?:sum|prod|i*int|oint|lim|gcd|lcm|det|max|min|partial)(?![A-Za-z])")
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)")
_SLOW = re.compile(
    r"\\binom.*(?:\d{5}|[\^!])|(?:[\^_]\s*(?:\\?[A-Za-z0-9]+|\{[^{}]*\})\s*){4}|(?:\|[^|]*){17}|\dE[-+]?\d{4}", re.DOTALL
)

_RELATIONS = (sympy.core.relational.Relational, sympy.And)


def equal(gold: str, answer: str, *, relations: bool) -> bool:
    """Whether two expressions are equal as math-verify judges it, decimals taken exactly.

    With ``relations`` an inequality equals the interval that it describes.

    >>> equal("\\\\sqrt{8}", "2\\\\sqrt{2}", relations=False), equal("\\\\frac{\\\\pi}{3}", "1.047197551", relations=False)
    (True, False)

    Raises:
        UnreadableError: the answer is no expression, leaves an operation undone, or is too big to evaluate.
    """
    if undone := set(_UNDONE.findall(answer)) - set(_UNDONE.findall(gold)):
        raise UnreadableError(f"{min(undone)} is still to be done")
    real = _is_real(gold)
    first, second = parse(gold, real), parse(answer, real)
    if isinstance(first, _RELATIONS) and isinstance(second, _RELATIONS):
        if isinstance(first, sympy.Ne) and isinstance(second, sympy.Ne):
            first, second = sympy.Eq(*first.args, evaluate=False), sympy.Eq(*second.args, evaluate=False)
        elif len(first.args) != len(second.args) or first.has(sympy.Ne) or second.has(sympy.Ne):
            return False  # on chains of different length and on other unequals math-verify raises
    return verify(
        first,
        second,
        numeric_precision=60,  # differences below 10 ** -60 count as 0
        allow_set_relation_comp=relations,
        timeout_seconds=None,
        raise_on_error=True,
    )


def check(gold: str) -> None:
    """Parse a gold answer for its errors.

    Raises:
        UnreadableError: it is no expression, an undefined one, or too big.
    """
    parse(gold, _is_real(gold))


@functools.lru_cache(maxsize=1024)
def parse(latex: str, real: bool) -> sympy.Basic:
    """The unevaluated expression that a text says, its symbols real or complex.

    Raises:
        UnreadableError: it says none, an undefined one, or one of more than about MAX_SIZE digits.
    """
    latex = _IMAGINARY.sub("(I)", _DECIMAL.sub(_as_fraction, latex))
    if _SLOW.search(latex):
        raise UnreadableError("a big binomial coefficient or exponent, or a long chain of powers, indices or bars")
    try:
        expression = _convert(latex, real)
    except Exception as error:
        _convert("x + 1", real)  # a library that is broken cannot do this either, and its own error goes on
        raise UnreadableError(f"no expression: {latex}") from error
    if isinstance(expression, sympy.MatrixBase):
        expression = expression.as_immutable()
    if size(expression) > MAX_SIZE:
        raise UnreadableError("too big to evaluate")
    if expression.has(sympy.nan, sympy.zoo):
        raise UnreadableError("undefined")
    return expression


def _convert(latex: str, real: bool) -> sympy.Basic:
    """Call latex2sympy, all rewriting of the text left out."""
    return latex2sympy(latex, is_real=real, normalization_config=None, conversion_config=_CONFIG)


def size(expression: sympy.Basic) -> float:
    """About how many digits or symbols it would have, evaluated; an upper bound for which nothing big is evaluated.

    >>> [size(sympy.Pow(9, power, evaluate=False)) for power in (2, sympy.Pow(8, 9, evaluate=False))]
    [2.0, 134217728.0]
    """
    if isinstance(expression, sympy.Rational):
        return math.log10(max(abs(expression.p), expression.q))
    sizes = [size(part) for part in expression.args]
    if not sizes:
        return 1.0
    if not isinstance(expression, sympy.Pow | sympy.exp | sympy.factorial) or expression.args[-1].free_symbols:
        return sum(sizes)
    base, value = expression.args[0], _value(expression.args[-1], sizes[-1])
    if isinstance(base, sympy.Add) and base.free_symbols and value ** len(base.free_symbols) > MAX_TERMS:
        return math.inf
    return max(1.0, sizes[0]) * value


def _value(number: sympy.Basic, digits: float) -> float:
    """The absolute value of a number without symbols, roughly; infinite where that would take long to tell."""
    rough = number.evalf(5) if digits < _FLOAT_DIGITS else sympy.oo
    return abs(complex(rough)) if rough.is_number and rough.is_finite else math.inf


def _is_real(latex: str) -> bool:
    """Whether no imaginary unit stands in it."""
    return _IMAGINARY.search(latex) is None


def _as_fraction(decimal: re.Match[str]) -> str:
    """A decimal in LaTeX that does not round."""
    return rf"\frac{{{int(decimal[1] + decimal[2])}}}{{{10 ** len(decimal[2])}}}"
