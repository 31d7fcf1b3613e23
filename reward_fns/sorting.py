"""Sorting a list of integers: the rewards of CS336 lecture 17, and a graded one for language models.

`inclusion_ordering` and `distance` score lists; the verifiers read the integers of a completion and the dataset's
column `numbers`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from itertools import pairwise

from grpo_hf.reward_fns.marks import scoped
from grpo_hf.rewards.registry import register_reward

_INTEGER = re.compile(r"(?<![0-9])-?[0-9]+")
_MAX_CHARACTERS = 100  # a longer integer is cut, so that no completion can make int() slow or fail


def inclusion_ordering(prompt: Sequence[int], response: Sequence[int]) -> float:
    """Σ_{x in prompt} [x in response] + Σ_i [response_i <= response_{i+1}]; 2n - 1 for n numbers sorted exactly.

    >>> inclusion_ordering([3, 1, 0, 2], [0, 1, 2, 3]), inclusion_ordering([3, 1, 0, 2], [7, 2, 2, 5])
    (7.0, 3.0)
    """
    included = sum(number in response for number in prompt)
    ordered = sum(left <= right for left, right in pairwise(response))
    return float(included + ordered)


def distance(prompt: Sequence[int], response: Sequence[int]) -> float:
    """Σ_i [response_i = sorted(prompt)_i]; n for n numbers sorted exactly.

    >>> distance([3, 1, 0, 2], [0, 1, 2, 3]), distance([3, 1, 0, 2], [0, 2, 2, 5])
    (4.0, 2.0)
    """
    return float(sum(number == right for number, right in zip(response, sorted(prompt), strict=False)))


def parse_integers(text: str) -> list[int]:
    """All integers of a text, in order.

    >>> parse_integers("0, -1 and 2-3.")
    [0, -1, 2, 3]
    """
    return [int(digits[:_MAX_CHARACTERS]) for digits in _INTEGER.findall(text)]


@register_reward
@scoped
def sort_inclusion_ordering(completion: str, numbers: Sequence[int]) -> float:
    """`inclusion_ordering` of a text; integers past the length of `numbers` are not read, so length earns nothing.

    >>> sort_inclusion_ordering("0 1 2 3", [3, 1, 0, 2]), sort_inclusion_ordering("0 1 2 3 4 5", [3, 1, 0, 2])
    (7.0, 7.0)

    Raises:
        TypeError: `numbers` is not a list of integers.
    """
    prompt = [operator.index(number) for number in numbers]
    return inclusion_ordering(prompt, parse_integers(completion)[: len(prompt)])


@register_reward
@scoped
def sort_distance(completion: str, numbers: Sequence[int]) -> float:
    """`distance` of a text; integers past the length of `numbers` are not read.

    >>> sort_distance("0 1 2 3", [3, 1, 0, 2]), sort_distance("0 1 3", [3, 1, 0, 2])
    (4.0, 2.0)

    Raises:
        TypeError: `numbers` is not a list of integers.
    """
    return distance([operator.index(number) for number in numbers], parse_integers(completion))


@register_reward
@scoped
def sorting(completion: str, numbers: Sequence[int], *, partial_credit: bool = True) -> float:
    """The share of places that are right: distance / max(number of integers read, len(numbers)), in 0..1.

    It is 1.0 only for exactly the sorted list; missing and extra integers lower it. Without `partial_credit` it is
    1.0 for the sorted list and 0.0 for everything else.

    >>> sorting("0 1 2 3", [3, 1, 0, 2]), sorting("0 1 2", [3, 1, 0, 2]), sorting("0 1 2 3 4", [3, 1, 0, 2])
    (1.0, 0.75, 0.8)
    >>> sorting("0 1 2", [3, 1, 0, 2], partial_credit=False)
    0.0

    Raises:
        TypeError: `numbers` is not a list of integers.
    """
    expected = sorted(operator.index(number) for number in numbers)
    response = parse_integers(completion)
    if response == expected:
        return 1.0
    return distance(expected, response) / max(len(response), len(expected)) if partial_credit else 0.0
