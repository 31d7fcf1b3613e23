"""What k samples of a prompt are worth, estimated without bias from n >= k of them: mean@k, pass@k and maj@k."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import comb
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def mean_at_k(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, " prompts"]:
    """Expected reward of one sample of each prompt: the mean over its samples; avg@k, where k are sampled.

        mean@k_p = mean_i rewards[p, i]

    NaN rewards (the reward does not apply) are left out; NaN where none is left.
    """
    return rewards.nanmean(dim=1)


def pass_at_k(correct: Bool[Tensor, "prompts group"], k: int) -> Float[Tensor, " prompts"]:
    """Chance that at least one of k samples is correct, for each prompt.

        pass@k_p = 1 - C(n - c_p, k) / C(n, k)
        C(n - c, k) / C(n, k) = prod_{j=0}^{k-1} (n - c - j) / (n - j)

    with n samples a prompt, c_p of them correct. The product forms no large binomial, and holds a factor 0 when
    fewer than k samples are wrong. Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1.
    """
    _check(correct, k, "pass")
    n = correct.shape[1]
    drawn = torch.arange(k, device=correct.device, dtype=torch.float64)
    wrong = (~correct).sum(dim=1, keepdim=True)
    return 1 - ((wrong - drawn) / (n - drawn)).prod(dim=1)


def maj_at_k(answers: list[list[str]], correct: Bool[Tensor, "prompts group"], k: int) -> Float[Tensor, " prompts"]:
    """Chance that the most frequent answer of k samples is correct, for each prompt; a tie is broken by lot.

        maj@k_p = E_S [share of correct ones among the answers with the most votes in S]

    over all C(n, k) sets S of k of the n samples, which makes it the U-statistic of what k samples would say;
    ``answers[p][i]`` is the answer that sample i of prompt p gave. Every string votes, the empty one too. Wang et al. 2022
    (self-consistency), https://arxiv.org/abs/2203.11171.
    """
    _check(correct, k, "maj")
    prompts, n = correct.shape
    if [len(group) for group in answers] != [n] * prompts:
        raise ValueError(
            f"maj@k needs one answer a sample: correct is {prompts} prompts x {n} samples, "
            f"answers hold {[len(group) for group in answers]}"
        )
    chances = [_majority(group, row, k) for group, row in zip(answers, correct.tolist(), strict=True)]
    return torch.tensor(chances, dtype=torch.float64)


def _check(correct: Tensor, k: int, name: str) -> None:
    prompts, n = correct.shape
    if not 1 <= k <= n:
        raise ValueError(f"{name}@{k} needs 1 <= k <= samples a prompt, and there are {n}; sample at least {k}")
    if prompts == 0:
        raise ValueError(f"{name}@k needs at least one prompt, got 0")


def _majority(answers: list[str], correct: list[bool], k: int) -> float:
    votes = Counter(answers)
    right = Counter(answer for answer, is_right in zip(answers, correct, strict=True) if is_right)
    ways = Fraction(0)
    for answer in right:
        others = [count for other, count in votes.items() if other != answer]
        for most in range(1, min(votes[answer], k) + 1):
            wins = sum(Fraction(sets, ties + 1) for ties, sets in enumerate(_ways(others, k - most, most)))
            ways += Fraction(right[answer], votes[answer]) * comb(votes[answer], most) * wins
    return float(ways / comb(len(answers), k))


def _ways(counts: list[int], size: int, most: int) -> list[int]:
    """Sets of ``size`` of the votes of these answers where none has more than ``most``, by how many have just as many."""
    sets = [[0] * (size // most + 1) for _ in range(size + 1)]  # by votes taken so far, and answers that have the most
    sets[0][0] = 1
    for count in counts:
        longer = [[0] * len(row) for row in sets]
        for taken, row in enumerate(sets):
            for ties, found in enumerate(row):
                for votes in range(min(count, most, size - taken) + 1 if found else 0):
                    longer[taken + votes][ties + (votes == most)] += found * comb(count, votes)
        sets = longer
    return sets[size]
