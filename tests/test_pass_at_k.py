"""mean@k, pass@k and maj@k against numbers worked out by hand."""

import itertools
from collections import Counter

import pytest
import torch

from grpo_hf.algorithm.pass_at_k import maj_at_k, mean_at_k, pass_at_k


def test_mean_at_k_leaves_nan_out():
    nan = float("nan")
    rewards = torch.tensor([[1.0, 0.0, nan, nan], [1.0, 1.0, 1.0, 0.0], [nan, nan, nan, nan]])
    assert mean_at_k(rewards).tolist() == pytest.approx([0.5, 0.75, nan], nan_ok=True)


def test_pass_at_k_by_hand():
    correct = torch.tensor([[True, False, False, False], [True, True, False, False]])
    # k=1: 1/4 and 2/4.  k=2: 1 - C(3,2)/C(4,2) = 1/2 and 1 - C(2,2)/C(4,2) = 5/6.  k=3: 1 - 1/4 and 1.
    assert pass_at_k(correct, 1).mean().item() == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert pass_at_k(correct, 2).mean().item() == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert pass_at_k(correct, 3).mean().item() == pytest.approx((3 / 4 + 1) / 2)
    assert pass_at_k(correct, 4).mean().item() == 1.0
    assert pass_at_k(torch.zeros(3, 4, dtype=torch.bool), 4).mean().item() == 0.0


def test_pass_at_k_is_the_average_over_all_subsets():
    torch.manual_seed(0)
    correct = torch.rand(5, 6) < 0.3
    for k in range(1, 7):
        subsets = list(itertools.combinations(range(6), k))
        expected = sum(correct[:, list(subset)].any(dim=1).double().mean() for subset in subsets) / len(subsets)
        assert pass_at_k(correct, k).mean().item() == pytest.approx(float(expected))


def test_pass_at_k_stays_exact_where_binomials_overflow():
    correct = torch.zeros(1, 10_000, dtype=torch.bool)
    correct[0, 0] = True  # one correct of n: pass@k = k / n, while C(10000, 5000) has 3,009 digits
    assert pass_at_k(correct, 5_000).mean().item() == pytest.approx(0.5, rel=1e-9)


def test_pass_at_k_refuses_more_than_was_sampled():
    with pytest.raises(ValueError, match=r"pass@9 .* there are 8"):
        pass_at_k(torch.ones(2, 8, dtype=torch.bool), 9)
    with pytest.raises(ValueError, match=r"pass@0"):
        pass_at_k(torch.ones(2, 8, dtype=torch.bool), 0)


def test_maj_at_k_by_hand():
    answers = [["7", "5", "5"], ["3", "8", "4"], ["2", "9", "9"]]
    correct = torch.tensor([[True, False, False], [True, False, False], [False, True, True]])
    # of all three the majority is 5, wrong; a tie of three, of which one is right; 9, right
    assert maj_at_k(answers, correct, 3).tolist() == pytest.approx([0, 1 / 3, 1])
    # of two: {7, 5} twice and {5, 5}; one of two in two of three pairs; {2, 9} twice and {9, 9}
    assert maj_at_k(answers, correct, 2).tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert maj_at_k(answers, correct, 1).tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3]), "one vote is the mean"


def test_maj_at_k_is_the_average_over_all_subsets():
    torch.manual_seed(0)
    answers = [[str(int(number)) for number in torch.randint(0, 4, (7,))] for _ in range(20)]
    correct = torch.tensor([[answer in ("1", "3") for answer in group] for group in answers])
    for k in range(1, 8):
        expected = [_by_enumeration(group, row, k) for group, row in zip(answers, correct.tolist(), strict=True)]
        assert maj_at_k(answers, correct, k).tolist() == pytest.approx(expected)


def _by_enumeration(answers: list[str], correct: list[bool], k: int) -> float:
    right = dict(zip(answers, correct, strict=True))
    subsets = list(itertools.combinations(answers, k))
    total = 0.0
    for subset in subsets:
        votes = Counter(subset)
        winners = [answer for answer in votes if votes[answer] == max(votes.values())]
        total += sum(right[answer] for answer in winners) / len(winners)
    return total / len(subsets)


def test_maj_at_k_names_ragged_answers():
    with pytest.raises(ValueError, match=r"2 prompts x 2 samples, answers hold \[2, 1\]"):
        maj_at_k([["1", "2"], ["3"]], torch.ones(2, 2, dtype=torch.bool), 2)
    with pytest.raises(ValueError, match=r"maj@3 .* there are 2"):
        maj_at_k([["1", "2"]], torch.ones(1, 2, dtype=torch.bool), 3)
