"""mean@k, pass@k and maj@k against numbers worked out by hand."""

import itertools

import pytest
import torch

from grpo_hf.algorithm.pass_at_k import maj_at_k, mean_at_k, pass_at_k


def test_mean_at_k_leaves_nan_out():
    nan = float("nan")
    rewards = torch.tensor([[1.0, 0.0, nan, nan], [1.0, 1.0, 1.0, 0.0], [nan, nan, nan, nan]])
    # prompt means 1/2 and 3/4; the third prompt has no reward at all
    assert mean_at_k(rewards).item() == pytest.approx(0.625)


def test_pass_at_k_by_hand():
    correct = torch.tensor([[True, False, False, False], [True, True, False, False]])
    # k=1: 1/4 and 2/4.  k=2: 1 - C(3,2)/C(4,2) = 1/2 and 1 - C(2,2)/C(4,2) = 5/6.  k=3: 1 - 1/4 and 1.
    assert pass_at_k(correct, 1).item() == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert pass_at_k(correct, 2).item() == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert pass_at_k(correct, 3).item() == pytest.approx((3 / 4 + 1) / 2)
    assert pass_at_k(correct, 4).item() == 1.0
    assert pass_at_k(torch.zeros(3, 4, dtype=torch.bool), 4).item() == 0.0


def test_pass_at_k_is_the_average_over_all_subsets():
    torch.manual_seed(0)
    correct = torch.rand(5, 6) < 0.3
    for k in range(1, 7):
        subsets = list(itertools.combinations(range(6), k))
        expected = sum(correct[:, list(subset)].any(dim=1).double().mean() for subset in subsets) / len(subsets)
        assert pass_at_k(correct, k).item() == pytest.approx(float(expected))


def test_pass_at_k_stays_exact_where_binomials_overflow():
    correct = torch.zeros(1, 10_000, dtype=torch.bool)
    correct[0, 0] = True  # one correct of n: pass@k = k / n, while C(10000, 5000) has 3,009 digits
    assert pass_at_k(correct, 5_000).item() == pytest.approx(0.5, rel=1e-9)


def test_pass_at_k_refuses_more_than_was_sampled():
    with pytest.raises(ValueError, match=r"pass@9 .* there are 8"):
        pass_at_k(torch.ones(2, 8, dtype=torch.bool), 9)
    with pytest.raises(ValueError, match=r"pass@0"):
        pass_at_k(torch.ones(2, 8, dtype=torch.bool), 0)


def test_maj_at_k_ties_go_to_the_first_sampled():
    answers = [["7", "5", "5"], ["3", "8", "4"], ["2", "9", "9"]]
    correct = torch.tensor([[True, False, False], [True, False, False], [False, True, True]])
    # majority 5 is wrong; three-way tie goes to 3, right; majority 9 is right
    assert maj_at_k(answers, correct) == pytest.approx(2 / 3)


def test_maj_at_k_breaks_a_two_way_tie_by_order():
    correct = torch.tensor([[False, True, True, False]])
    assert maj_at_k([["2", "9", "9", "2"]], correct) == 0.0
    assert maj_at_k([["9", "2", "2", "9"]], ~correct) == 1.0


def test_maj_at_k_names_ragged_answers():
    with pytest.raises(ValueError, match=r"2 prompts x 2 samples, answers hold \[2, 1\]"):
        maj_at_k([["1", "2"], ["3"]], torch.ones(2, 2, dtype=torch.bool))
