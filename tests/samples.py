"""Groups of random tokens and training samples, for the tests of modules that see no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from grpo_hf.rollout.planning import numbered_samples
from grpo_hf.types import Completion, Group, Prompt, TrainingSample

VOCAB = 97

UNEVEN = [(7, [5, 1, 3]), (1, [4]), (12, [1, 9, 2, 6]), (7, [2, 8])]
"""Groups as (prompt length, completion lengths): of one and of several completions, some of one token."""


def random_groups(shapes: Sequence[tuple[int, list[int]]] = UNEVEN, *, seed: int = 0, vocab: int = VOCAB) -> list[Group]:
    """A group for each (prompt length, completion lengths), with random ids and advantages."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(vocab, (length,), generator=generator).tolist()

    def completion(length: int) -> Completion:
        return Completion(ids(length), truncated=False, advantage=torch.randn((), generator=generator).item())

    return [group(ids(prompt), map(completion, completions), number) for number, (prompt, completions) in enumerate(shapes)]


def group(prompt: list[int], completions: Iterable[Completion | list[int]], index: int = 0) -> Group:
    """A group from token ids."""
    made = [item if isinstance(item, Completion) else Completion(item, truncated=False) for item in completions]
    return Group(Prompt(ids=prompt, raw="", row={}, index=index), made)


def samples_of(groups: Sequence[Group]) -> list[TrainingSample]:
    """What is trained on of groups whose completions have advantages."""
    return [sample for own in numbered_samples(groups, version=0) for sample in own]


def random_samples(shapes: Sequence[tuple[int, list[int]]] = UNEVEN, **options: Any) -> list[TrainingSample]:
    """The samples of random groups."""
    return samples_of(random_groups(shapes, **options))


def sample(ids: Sequence[int], targets: Iterable[int], *, completion: int = 0, **fields: Any) -> TrainingSample:
    """Ids of which those at ``targets`` are trained on, with advantage 1 where ``fields`` do not say otherwise."""
    is_target = torch.zeros(len(ids), dtype=torch.bool)
    is_target[list(targets)] = True
    length = int(is_target.sum())
    defaults = {"advantages": is_target.float(), "group": 0, "completion_length": length, "versions": torch.zeros(length)}
    return TrainingSample(tuple(ids), is_target, completion=completion, **(defaults | fields))


def samples_that_share(seed: int, *, count: int = 12, longest: int = 14, vocab: int = 3) -> list[TrainingSample]:
    """So few words that beginnings are shared at every length, targets anywhere, several samples to some completions."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    made: list[TrainingSample] = []
    for _ in range(number(1, count + 1)):
        ids = torch.randint(vocab, (number(2, longest + 1),), generator=generator).tolist()
        targets = {number(1, len(ids)) for _ in range(number(1, 5))}
        completion = made[-1].completion + number(0, 2) if made else 0
        made.append(sample(ids, targets, completion=completion))
    advantages = [torch.where(item.is_target, torch.randn(len(item.ids), generator=generator), 0.0) for item in made]
    return [replace(item, advantages=values) for item, values in zip(made, advantages, strict=True)]


def even_words(completion: str) -> float:
    """A reward that tells random completions apart."""
    return float(sum(int(word.removeprefix("w")) % 2 == 0 for word in completion.split()))
