"""avg@k, pass@k and maj@k of a model, by verifier, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_hf.algorithm.pass_at_k import maj_at_k, mean_at_k, pass_at_k
from grpo_hf.evaluation.intervals import Estimate, mean_of_numbers, mean_of_shares
from grpo_hf.types import Group

ANSWER = "answer"
"""What a verifier logs with log_extra for votes to be counted by; without it, completions vote with their whole text."""


@dataclass
class Question:
    """A held-out prompt, and what its samples came to."""

    row: int
    """Its number in the data set."""
    seed: int
    """Of its samples."""
    prompt: str
    """As the data set has it."""
    scores: dict[str, list[float]]
    """By verifier, one a sample; NaN where it does not apply."""
    rewards: list[float]
    """The weighted sum of them, one a sample."""
    answers: list[str] = field(default_factory=list)
    """What each sample answered."""


def question_of(group: Group, seed: int) -> Question:
    """A scored group's numbers."""
    items, raw = group.completions, group.prompt.raw
    return Question(
        row=group.prompt.index,
        seed=seed,
        prompt=raw if isinstance(raw, str) else repr(raw),
        scores={name: [item.rewards[name] for item in items] for name in items[0].rewards},
        rewards=[item.reward for item in items],
        answers=[answer_of(item.extra.get(ANSWER), item.text) for item in items],
    )


def answer_of(logged: object, text: str) -> str:
    """What a sample votes for: the answer that a verifier has logged, or where it has logged none the whole text."""
    return text.strip() if logged is None else str(logged)


def values_of(questions: Sequence[Question]) -> dict[str, dict[int, float]]:
    """Each measure's value of each prompt, by its row: the mean of every verifier's scores and of the reward, and pass@k and
    maj@k of those that say right (1) or wrong (0), for k = 2, 4, 8, ... and all samples."""
    measures: dict[str, dict[int, float]] = {}
    scored = {name: [(item, item.scores[name]) for item in questions] for name in questions[0].scores}
    for name, found in ({"reward": [(item, item.rewards) for item in questions]} | scored).items():
        rows = [item.row for item, _ in found]
        scores = torch.tensor([values for _, values in found], dtype=torch.float64)
        prefix = name if name == "reward" else f"rewards/{name}/mean"
        measures[prefix] = _by_row(rows, mean_at_k(scores))
        whole = ~scores.isnan().any(dim=1)  # prompts that every sample has a score of
        if name == "reward" or not _says_right_or_wrong(scores[whole]):
            continue
        correct, kept = scores[whole].bool(), [item for (item, _), keep in zip(found, whole.tolist(), strict=True) if keep]
        for k in sizes(scores.shape[1]):
            measures[f"rewards/{name}/pass@{k}"] = _by_row([item.row for item in kept], pass_at_k(correct, k))
            votes = maj_at_k([item.answers for item in kept], correct, k)
            measures[f"rewards/{name}/maj@{k}"] = _by_row([item.row for item in kept], votes)
    return {name: values for name, values in measures.items() if values}


def estimates_of(questions: Sequence[Question]) -> dict[str, Estimate]:
    """Each measure's mean over prompts with its interval."""
    samples = len(questions[0].rewards)
    found = {}
    for name, values in values_of(questions).items():
        numbers = list(values.values())
        shares = name != "reward" and all(0 <= value <= 1 for value in numbers)
        found[name] = mean_of_shares(numbers, samples) if shares else mean_of_numbers(numbers)
    return found


def sizes(samples: int) -> list[int]:
    """The k of pass@k and maj@k: 2, 4, 8, ... and all."""
    return sorted({2**power for power in range(1, samples.bit_length())} | {samples}) if samples > 1 else []


def _says_right_or_wrong(scores: Tensor) -> bool:
    return len(scores) > 0 and bool(((scores == 0) | (scores == 1)).all())


def _by_row(rows: list[int], values: Tensor) -> dict[int, float]:
    return {row: value for row, value in zip(rows, values.tolist(), strict=True) if not math.isnan(value)}
