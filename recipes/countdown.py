"""What recipes/countdown.yaml trains on: three or four numbers and a target that they reach, drawn at random."""

from __future__ import annotations

import random
from fractions import Fraction

from datasets import Dataset

QUESTION = (
    "Use the numbers {numbers}, each exactly once, with + - * / and parentheses, to make an expression that equals {target}."
)


def make_puzzle(generator: random.Random) -> tuple[list[int], int]:
    """Numbers and a target from 10 to 100, which combining the numbers in a random order has reached."""
    while True:
        numbers = [generator.randint(1, 25) for _ in range(generator.choice((3, 4)))]
        parts = [Fraction(number) for number in numbers]
        while len(parts) > 1:
            left, right = (parts.pop(generator.randrange(len(parts))) for _ in range(2))
            ways = [left + right, left - right, left * right, *([left / right] if right else [])]
            parts.append(generator.choice(ways))
        if parts[0].denominator == 1 and 10 <= parts[0] <= 100:
            return numbers, int(parts[0])


def make_data(*, train: int = 8192, held_out: int = 500, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Puzzles to train on, and others to evaluate on: no set of numbers with its target comes twice."""
    generator = random.Random(seed)
    puzzles: dict[tuple[int, ...], tuple[list[int], int]] = {}
    while len(puzzles) < train + held_out:
        numbers, target = make_puzzle(generator)
        puzzles.setdefault((*sorted(numbers), target), (numbers, target))
    rows = [
        {
            "prompt": QUESTION.format(numbers=", ".join(map(str, numbers)), target=target),
            "numbers": numbers,
            "target": target,
        }
        for numbers, target in puzzles.values()
    ]
    return Dataset.from_list(rows[:train]), Dataset.from_list(rows[train:])
