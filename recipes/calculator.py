"""What recipes/calculator.yaml trains on: sums of three numbers, a tool that calculates them, and a verifier."""

from __future__ import annotations

import ast
import operator
import random
import re
import zlib
from typing import Any

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
LONGEST = 100
"""Characters of an expression."""


def calculate(expression: str) -> str:
    """Calculate an expression.

    Args:
        expression: Whole numbers with + - *.

    Returns:
        Its value.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"an expression may have {LONGEST} characters")
    return str(value(ast.parse(expression.strip(), mode="eval").body))


def value(node: ast.expr) -> int:
    """The value of whole numbers and the operators above; anything else is refused."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise ValueError("write whole numbers with + - *")


def right_number(completion: str, expression: str) -> float:
    """1 when the value is the only number in the last answer."""
    return float(re.findall(r"-?\d+", completion) == [calculate(expression)])


def make_sum(generator: random.Random) -> str:
    """Three numbers of two digits."""
    first, *rest = (generator.randint(10, 99) for _ in range(3))
    return f"{first}" + "".join(f" {generator.choice('+-')} {number}" for number in rest)


def is_held_out(expression: str) -> bool:
    """One sum in ten is never trained on, neither in the warm-up nor by GRPO."""
    return zlib.crc32(expression.encode()) % 10 == 0


def make_prompt(expression: str) -> list[dict[str, Any]]:
    """The question."""
    return [{"role": "user", "content": f"What is {expression}?"}]


def make_rows(size: int, generator: random.Random, *, held_out: bool = False) -> list[dict[str, Any]]:
    """Random sums, with the column that the verifier reads."""
    sums: list[str] = []
    while len(sums) < size:
        if is_held_out(expression := make_sum(generator)) == held_out:
            sums.append(expression)
    return [{"prompt": make_prompt(expression), "expression": expression} for expression in sums]


def make_data(*, train: int = 8192, held_out: int = 256) -> tuple[list[dict], list[dict]]:
    """Sums to train on, and others to evaluate on."""
    return make_rows(train, random.Random(1)), make_rows(held_out, random.Random(2), held_out=True)


def demonstrations(count: int, generator: random.Random) -> tuple[list[list[dict[str, Any]]], list[Any]]:
    """Half of the answers are guesses at once; the others come after a call, and half of these do not look at its result."""
    conversations = []
    for row in make_rows(count, generator):
        answer, messages = str(generator.randint(-99, 250)), [*row["prompt"]]
        if generator.random() < 0.5:
            result = calculate(row["expression"])
            call = {"function": {"name": "calculate", "arguments": {"expression": row["expression"]}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "calculate", "content": result})
            answer = result if generator.random() < 0.5 else answer
        conversations.append([*messages, {"role": "assistant", "content": f"It is {answer}."}])
    return conversations, [calculate]
