"""Completions whose answer is known because it was put there: right ones in many forms, near misses and hedges.

Each is made from a worked solution of GSM8K: its text, then a sentence that states a number. The same sentences state the
right number in a right completion, and a number that nearly is it in a wrong one; `other` is the number that does not count.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

STATED = (
    "**Answer: {n}**",
    "The answer is **{n}**.",
    "**The final answer is {n}.**",
    "### Final Answer: **{n}**",
    "### Final Answer\n{n}",
    "So the answer is:\n\n- {n}",
    "`Answer: {n}`",
    "Final answer: {n}\n\nCheck: 4 * 5 = 20, and 20 - 3 = {other}",
    "Answer: {n} pens\nConfidence: {other}%",
    "The answer is {n}\n\nExplanation: there are {other} boxes of pens.",
    "The answer is {n} when x = {other}.",
    "The answer is {n}, not {other}.",
    "Answer: {n} apples are left in the basket for the other children to eat.",
    "So she pays ${n} a year.",
    "There are {n} of them.",
    "That makes {n} in total.",
    "She spends 1 * {n} = ${n} on ice cream.",
    "He needs {n} bolts of blue and white fiber.",
    "They have {n} cats and dogs.",
    "It takes {n} minutes to read {other} pages.",
    "So 1 * {n} = **{n}**",
    "So there are {n} different ways in which the farmer could arrange all of the cows.",
    "$\\boxed{{{n}}}$",
    "\\boxed {n}.",
    "$\\boxed{{\\${n}}}$",
    "\\boxed{{$\\${n}$}}",
    "\\boxed{{\\text{{{n} apples}}}}",
    "\\boxed{{\\approx {n}}}",
    "\\boxed{{\\text{{(C) }}{n}}}",
    "\\boxed{{{n}\\%}}",
    "$\\boxed{{{n}}}$, so the result is $\\boxed{{{n}}}$.",
    "\\boxed{{{other}}}? No, \\boxed{{{n}}}.",
    "<answer>The total is {n}.</answer>",
    "<answer>**{n}**</answer>",
    "<think>Perhaps \\boxed{{{other}}}?</think>\nThe answer is {n}.",
    "<think>The answer is {other}.</think>\n\\boxed{{{n}}}",
    "#### {n}",
    "#### {n}\n\n#### Explanation\nThere are {other} boxes.",
)
HEDGED = (
    "The answer is {n} or {other}.",
    "\\boxed{{{other} or {n}}}",
    "\\boxed{{{n}}} or \\boxed{{{other}}}",
    "\\boxed{{{other}, {n}}}",
    "\\boxed{{{other} = {n}}}",
    "\\boxed{{\\text{{not }}{n}}}",
    "\\boxed{{\\pm {n}}}",
    "The answer is not {n}.",
    "The answer is at least {n}.",
    "The answer is neither {n} nor {other}.",
    "Answer: between {other} and {n}",
    "**Answer: {n} or maybe {other}**",
    "<answer>{other} | {n}</answer>",
    "#### {n} or {other}",
    "#### {n}!",
    "#### {n} million",
    "#### {n} | {other}",
    "<think>\\boxed{{{n}}}</think>\nI cannot tell.",
)


class Made(NamedTuple):
    """A completion with what a reader would say."""

    completion: str
    gold: str
    right: bool
    form: str
    """The sentence that it was made with."""


def solutions(files: list[Path]) -> Iterator[tuple[str, str]]:
    """The text and the answer of GSM8K's worked solutions, without calculator notes, where it is clear what answers them."""
    for file in files:
        for line in file.open(encoding="utf-8"):
            text, _, answer = re.sub(r"<<[^>]*>>", "", json.loads(line)["answer"]).rpartition("\n#### ")
            if "answer" not in text.casefold() and int(answer.replace(",", "")) > 2:  # 2! is 2
                yield text, answer.replace(",", "")


def made(solved: list[tuple[str, str]], count: int, seed: int) -> Iterator[Made]:
    """`count` completions: a third right, a third near misses or another solution's answer, a third hedges."""
    rng = random.Random(seed)
    for place in range(count):
        text, gold = rng.choice(solved)
        wrong = rng.choice([*near(gold), rng.choice(solved)[1]])
        if float(wrong) == float(gold):
            wrong = f"{int(gold) + 1}"
        kind = place % 3
        form = rng.choice(HEDGED if kind == 2 else STATED)
        n, other = (wrong, gold) if kind == 1 else (gold, wrong)
        yield Made(f"{text}\n{form.format(n=n, other=other)}", gold, kind == 0, form)


def near(gold: str) -> list[str]:
    """Numbers that are easily taken for a whole number."""
    value = int(gold)
    turned = gold[::-1].strip("-")
    return [str(value + 1), str(value - 1), f"{gold}0", f"{gold}.5", f"-{gold}".replace("--", ""), turned]
