"""Countdown: an arithmetic expression that uses the given numbers and reaches the target; parsed, never run as code."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from grpo_hf.reward_fns.marks import MARKER, last_boxed, last_tagged, scoped
from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, parses_gold
from grpo_hf.rewards.registry import register_reward

_MAX_CHARACTERS = 300  # six numbers take fifty; a longer text would only cost time
_FRACTION = re.compile(r"\\[dt]?frac ?\{([^{}]*)\}\{([^{}]*)\}")
_PLAIN = [
    (re.compile(r"\\times|\\cdot|[×·⋅]"), "*"),
    (re.compile(r"\\div|÷"), "/"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\left|\\right|\\[,;! ()\[\]]|[$`]|\*\*(?=\s*$)|^\s*\*\*"), ""),
]
_ARITHMETIC = re.compile(r"[0-9+\-*/() ]+")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_ALLOWED = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.USub, *_OPERATORS)


def checked_numbers(numbers: Any) -> list[int]:
    """The given numbers.

    Raises:
        BadGoldError: they are not a list of whole numbers from 0.
    """
    listed = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers) > 0
    if not listed or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise BadGoldError(f"countdown needs a list of whole numbers, none below 0; got numbers={numbers!r}")
    return list(numbers)


@register_reward
@parses_gold(checked_numbers)
@scoped
def countdown(completion: str, numbers: list[int], target: int, *, use_all: bool = True) -> float:
    """1.0 if the completion's expression uses each of `numbers` exactly once and equals `target` exactly, else 0.0.

    The expression is in the last `<answer>` tags, the last `\\boxed{}`, after the last `####`, or else it is the last line,
    past a colon; it may end in `= target`. It has + - * / and parentheses, in plain or LaTeX form. With `use_all=False` each
    number may also be left out.

    >>> countdown("<answer>(6 - 2) * 5 + 1</answer>", [1, 2, 5, 6], 21), countdown("#### 6 * 5 - 2 = 28", [1, 2, 5, 6], 28)
    (1.0, 0.0)
    >>> countdown("#### 6 * 5 - 2 = 28", [1, 2, 5, 6], 28, use_all=False), countdown("I give up.", [1, 2], 3)
    (1.0, 0.0)

    Raises:
        BadGoldError: `numbers` is not a list of whole numbers, or `target` is no whole number.
    """
    if not isinstance(target, int):
        raise BadGoldError(f"countdown needs a whole number as its target; got {target!r}")
    text, equals, stated = plain_expression(completion).partition("=")
    expression = parsed(text)
    if expression is None or (equals and not re.fullmatch(r" *-? *[0-9]+ *", stated)):
        return NO_ANSWER
    if equals and int(stated.replace(" ", "")) != target:
        return 0.0
    used = Counter(node.value for node in ast.walk(expression) if isinstance(node, ast.Constant))
    given = Counter(numbers)
    if not (used == given if use_all else used <= given):
        return 0.0
    return float(value_of(expression) == target)


def plain_expression(completion: str) -> str:
    """The text of the completion's expression, with LaTeX and typographic signs in plain form; "" if it is far too long.

    >>> plain_expression("So:\\n\\\\boxed{\\\\frac{6}{2} \\\\times 5}")
    '((6)/(2)) * 5'
    """
    text = last_tagged(completion)
    text = completion if text is None else text
    box = last_boxed(text)
    if box is not None:
        text = box
    else:
        lines = text.rpartition(MARKER)[2].strip().splitlines() if MARKER in text else text.strip().splitlines()[-1:]
        text = lines[0].rpartition(":")[2] if lines else ""
    text = text.strip().removesuffix(".")
    if len(text) > _MAX_CHARACTERS:
        return ""
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    while len(text) <= _MAX_CHARACTERS and _FRACTION.search(text):
        text = _FRACTION.sub(r"((\1)/(\2))", text)
    return text.strip()


def parsed(text: str) -> ast.expr | None:
    """The syntax tree of an expression of whole numbers, + - * / and parentheses; None if it is not one.

    >>> [parsed(text) is not None for text in ("-(1 + 2) / 3", "2 ** 9", "7 // 2", "1.5", "(1", "+1", "2(3)", "")]
    [True, False, False, False, False, False, False, False]
    """
    if len(text) > _MAX_CHARACTERS or not _ARITHMETIC.fullmatch(text):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):  # the last two are how Python's parser refuses deep nesting
        return None
    return tree if all(isinstance(node, _ALLOWED) for node in ast.walk(tree)) else None


def value_of(node: ast.expr) -> Fraction | None:
    """The exact value of a syntax tree that `parsed` returned; None where it divides by zero."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp):
        value = value_of(node.operand)
        return None if value is None else -value
    assert isinstance(node, ast.BinOp)
    left, right = value_of(node.left), value_of(node.right)
    if left is None or right is None or (isinstance(node.op, ast.Div) and right == 0):
        return None
    return _OPERATORS[type(node.op)](left, right)
