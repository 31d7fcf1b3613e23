"""What k samples of a prompt are worth: mean@k, pass@k and maj@k."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def mean_at_k(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, ""]:
    """Expected reward of one sample: the mean over each prompt's samples, then over prompts.

        mean@k = mean_p mean_i rewards[p, i]

    NaN rewards (the reward does not apply) are left out, and so is a prompt that has no other; NaN when none is left.
    """
    return rewards.nanmean(dim=1).nanmean()


def pass_at_k(correct: Bool[Tensor, "prompts group"], k: int) -> Float[Tensor, ""]:
    """Chance that at least one of k samples is correct, estimated without bias from n >= k samples and averaged.

        pass@k = mean_p [1 - C(n - c_p, k) / C(n, k)]
        C(n - c, k) / C(n, k) = prod_{j=0}^{k-1} (n - c - j) / (n - j)

    with n samples a prompt, c_p of them correct. The product forms no large binomial, and holds a factor 0 when
    fewer than k samples are wrong. Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1.
    """
    prompts, n = correct.shape
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples a prompt, and there are {n}; sample at least {k}")
    if prompts == 0:
        raise ValueError("pass@k needs at least one prompt, got 0")
    drawn = torch.arange(k, device=correct.device, dtype=torch.float64)
    wrong = (~correct).sum(dim=1, keepdim=True)
    all_wrong = ((wrong - drawn) / (n - drawn)).prod(dim=1)
    return (1 - all_wrong).mean()


def maj_at_k(answers: list[list[str]], correct: Bool[Tensor, "prompts group"]) -> float:
    """Share of prompts whose most frequent answer is correct; a tie goes to the answer that was sampled first.

        maj@k = mean_p correct[p, i_p],   i_p = first sample of the answer with the most votes

    ``answers[p][i]`` is the final answer that sample i of prompt p gave. Every string votes, the empty one too.
    Wang et al. 2022 (self-consistency), https://arxiv.org/abs/2203.11171.
    """
    prompts, n = correct.shape
    if prompts == 0 or n == 0:
        raise ValueError(f"maj@k needs at least one prompt and one sample, got {prompts} and {n}")
    if [len(group) for group in answers] != [n] * prompts:
        raise ValueError(
            f"maj@k needs one answer a sample: correct is {prompts} prompts x {n} samples, "
            f"answers hold {[len(group) for group in answers]}"
        )
    return sum(bool(row[_winner(group)]) for group, row in zip(answers, correct, strict=True)) / prompts


def _winner(group: list[str]) -> int:
    """Index of the first sample that gave the winning answer; max keeps the first of equals."""
    votes = Counter(group)
    return max(range(len(group)), key=lambda i: votes[group[i]])
