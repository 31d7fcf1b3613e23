"""Advantages against numbers worked out by hand."""

import pytest
import torch
from torch import Tensor

from grpo_hf.algorithm.advantages import ADVANTAGES, NEEDS_A_GROUP, credited, opo, pass_at_k, weighted_sum

NAN = float("nan")


def of_rewards(name: str, rewards: list[list[float]] | Tensor) -> Tensor:
    """Advantages of one objective whose weight is 1."""
    scores = torch.as_tensor(rewards).unsqueeze(-1)
    return credited(ADVANTAGES[name], scores, torch.ones(1), torch.ones(scores.shape[:2]))


def check(name: str, rewards: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(of_rewards(name, rewards), torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_raw_is_the_reward() -> None:
    check("raw", [[1.0, -2.0, 3.0], [0.0, NAN, 5.0]], [[1.0, -2.0, 3.0], [0.0, 0.0, 5.0]])


def test_centered_takes_off_each_groups_mean() -> None:
    # Means 3 and -1.
    check("centered", [[1.0, 2.0, 6.0], [-3.0, 0.0, 0.0]], [[-2.0, -1.0, 3.0], [-2.0, 1.0, 1.0]])
    # NaN left out: the mean of 1 and 3 is 2.
    check("centered", [[1.0, NAN, 3.0]], [[-1.0, 0.0, 1.0]])


def test_group_divides_by_the_bessel_std() -> None:
    # Mean 1/4; squares 3 x 1/16 + 9/16 = 3/4, over 3 is 1/4: std 1/2. -0.25 / 0.5001 and 0.75 / 0.5001.
    check("group", [[0.0, 0.0, 0.0, 1.0]], [[-0.4999000, -0.4999000, -0.4999000, 1.4997001]])
    # Std of 1, 2, 3 is exactly 1 with or without the NaN beside them: 1 / 1.0001.
    check("group", [[1.0, 2.0, 3.0, NAN]], [[-0.9999000, 0.0, 0.9999000, 0.0]])


def test_batch_divides_by_the_std_of_all_rewards() -> None:
    # Group means 1 and 5. All four: mean 3, squares 9 + 1 + 1 + 9 = 20, over 3, root: 2.5819889; 1 / 2.5820889.
    x = 0.3872833
    check("batch", [[0.0, 2.0], [4.0, 6.0]], [[-x, x], [-x, x]])
    # Scored are 0, 2 and 4: std 2, 1 / 2.0001. The lone 4 is its group's mean.
    check("batch", [[0.0, 2.0], [4.0, NAN]], [[-0.4999750, 0.4999750], [0.0, 0.0]])


def test_max_only_keeps_all_that_tie_for_best() -> None:
    check("max_only", [[1.0, 3.0, 3.0, 2.0], [-1.0, -2.0, NAN, -1.0]], [[0.0, 3.0, 3.0, 0.0], [-1.0, 0.0, 0.0, -1.0]])


def test_leave_one_out_takes_off_the_others_mean() -> None:
    # The others' means: (2 + 6) / 2 = 4, (1 + 6) / 2 = 3.5, (1 + 2) / 2 = 1.5.
    check("leave_one_out", [[1.0, 2.0, 6.0]], [[-3.0, -1.5, 4.5]])
    check("leave_one_out", [[1.0, NAN, 4.0]], [[-3.0, 0.0, 3.0]])


def test_reinforce_plus_plus_baseline_divides_by_the_std_of_all_deviations() -> None:
    # Deviations -1, 1, -3, 3: squares 20, over 3, root 2.5819889; 1 / 2.5820889 and 3 times that.
    check("reinforce_plus_plus_baseline", [[0.0, 2.0], [4.0, 10.0]], [[-0.3872833, 0.3872833], [-1.1618500, 1.1618500]])


def test_opo_takes_off_the_mean_over_tokens() -> None:
    scores, lengths = torch.tensor([[[1.0], [0.0], [NAN]]]), torch.tensor([[3.0, 1.0, 100.0]])
    # (3 x 1 + 1 x 0) / 4 = 3/4; the one without a score has no part.
    assert opo(scores, torch.ones(1), lengths=lengths).tolist() == [[0.25, -0.75, 0.0]]
    assert opo(torch.full((1, 3, 1), 0.1), torch.ones(1), lengths=lengths).tolist() == [[0.0, 0.0, 0.0]]


def test_maxrl_divides_by_the_mean() -> None:
    check("maxrl", [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]], [[3.0, -1.0, -1.0, -1.0], [1 / 3, 1 / 3, 1 / 3, -1.0]])
    check("maxrl", [[0.0, 0.0, NAN]], [[0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"rewards of 0 or more are needed, one is -0\.5"):
        of_rewards("maxrl", [[1.0, -0.5]])


def test_pass_at_k_is_what_a_completion_adds_to_the_best_of_k() -> None:
    def of(rewards: list[float], k: int) -> list[float]:
        return pass_at_k(torch.tensor(rewards)[None, :, None], torch.ones(1), advantage_k=k)[0].tolist()

    # One right of 4: it is in 3 of 6 pairs, and in 3 of 4 triples, and adds 1 to each.
    assert of([0.0, 1.0, 0.0, 0.0], 2) == pytest.approx([0.0, 0.5, 0.0, 0.0])
    assert of([0.0, 1.0, 0.0, 0.0], 3) == pytest.approx([0.0, 0.75, 0.0, 0.0])
    # Two right of 4: of its 3 pairs each adds to the 2 with a wrong one; of its 3 triples to the one without the other.
    assert of([1.0, 1.0, 0.0, 0.0], 2) == pytest.approx([1 / 3, 1 / 3, 0.0, 0.0])
    assert of([1.0, 1.0, 0.0, 0.0], 3) == pytest.approx([1 / 4, 1 / 4, 0.0, 0.0])
    # Pairs of 1, 2, 5: 2 adds 1 beside 1; 5 adds 4 beside 1 and 3 beside 2; over 3 pairs. A NaN is not there.
    assert of([1.0, 5.0, NAN, 2.0], 2) == pytest.approx([0.0, 7 / 3, 0.0, 1 / 3])
    assert of([1.0, 5.0, NAN, 2.0], 9) == pytest.approx([0.0, 3.0, 0.0, 0.0]), "3 of 3"


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_without_a_score_is_0_and_changes_no_other(name: str) -> None:
    group = [1.0, 2.0, 6.0]
    alone = of_rewards(name, [group])
    beside = of_rewards(name, [[NAN, NAN, NAN], group])
    assert beside[0].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(beside[1:], alone)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_completion_without_a_score_is_as_if_it_had_never_been_there(name: str) -> None:
    """To the last bit."""
    alone = of_rewards(name, [[0.1, 0.7, 0.3], [2.0, 2.0, 5.0]])
    beside = of_rewards(name, [[0.1, NAN, 0.7, 0.3], [2.0, 2.0, 5.0, NAN]])
    assert torch.equal(beside[0, [0, 2, 3]], alone[0])
    assert torch.equal(beside[1, :3], alone[1])
    assert beside[0, 1] == beside[1, 3] == 0.0


@pytest.mark.parametrize("name", ADVANTAGES)
def test_no_score_at_all_is_0(name: str) -> None:
    assert of_rewards(name, torch.full((2, 3), NAN)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_one(name: str) -> None:
    of_one = of_rewards(name, [[2.0]]).item()
    assert of_one == (0.0 if name in NEEDS_A_GROUP else 2.0)
    # One scored completion among NaN is a group of one.
    of_scored = of_rewards(name, [[NAN, 2.0, NAN]])
    assert of_scored.tolist() == [[0.0, of_one, 0.0]]


@pytest.mark.parametrize("name", sorted(NEEDS_A_GROUP))
@pytest.mark.parametrize(("size", "dtype"), [(6, torch.float64), (7, torch.float32), (8, torch.float32)])
def test_equal_rewards_are_exactly_0(name: str, size: int, dtype: torch.dtype) -> None:
    rewards = torch.full((1, size), 0.1, dtype=dtype)
    assert (rewards - rewards.mean()).abs().max() > 0, "the mean is meant to round here"
    assert (of_rewards(name, rewards) == 0).all()
    # A group with signal beside it, and a NaN within it, change nothing.
    rewards = torch.cat([rewards, torch.arange(size, dtype=dtype)[None]])
    rewards = torch.cat([rewards, torch.tensor([[NAN], [1.0]], dtype=dtype)], dim=1)
    assert (of_rewards(name, rewards)[0] == 0).all()


@pytest.mark.parametrize("name", ["group", "batch", "gdpo"])
def test_only_normalized_forms_ignore_the_rewards_scale(name: str) -> None:
    rewards = torch.tensor([[0.0, 1.0, 5.0], [2.0, 2.0, 8.0]])
    torch.testing.assert_close(of_rewards(name, 100 * rewards), of_rewards(name, rewards), rtol=1e-3, atol=0)
    assert torch.equal(of_rewards("centered", 128 * rewards), 128 * of_rewards("centered", rewards))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_infinite_reward_is_never_hidden(name: str) -> None:
    advantages = of_rewards(name, [[float("inf"), 1.0, 2.0]])
    assert not advantages.isfinite().all()


# ---- Several objectives


def test_weighted_sum_leaves_out_what_does_not_apply() -> None:
    scores = torch.tensor([[[1.0, 2.0], [NAN, 2.0], [1.0, NAN], [NAN, NAN]]])
    torch.testing.assert_close(
        weighted_sum(scores, torch.tensor([10.0, 0.5])), torch.tensor([[11.0, 1.0, 10.0, NAN]]), equal_nan=True
    )


@pytest.mark.parametrize("name", ["raw", "centered", "group", "batch", "max_only", "leave_one_out"])
def test_these_are_of_the_weighted_sum(name: str) -> None:
    scores = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [0.0, 4.0]], [[0.0, 1.0], [2.0, NAN], [NAN, NAN]]])
    expected = of_rewards(name, [[5.0, 3.0, 8.0], [2.0, 2.0, NAN]])  # of s_1 + 2 s_2
    assert torch.equal(ADVANTAGES[name](scores, torch.tensor([1.0, 2.0])), expected)


def test_gdpo_normalizes_each_objective_first() -> None:
    # First group: scores 0, 2 have mean 1, std √2, so z = ∓1 / 1.4143136 = ∓0.7070568; scores 0, 1 have mean 1/2, std 1/√2,
    # so z = ∓0.5 / 0.7072068 = ∓0.7070068. Second: 0 for the equal scores, ±0.7070068. With weights 1 and 2: Z = ∓2.1210704
    # and ±1.4140136, whose squares add up to 12.9967480; over 3, root: 2.0814056, and + 1e-4.
    scores = torch.tensor([[[0.0, 0.0], [2.0, 1.0]], [[3.0, 1.0], [3.0, 0.0]]])
    advantages = ADVANTAGES["gdpo"](scores, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(advantages, torch.tensor([[-1.0190079, 1.0190079], [0.6793225, -0.6793225]]))
    # The sum first, 0 and 4, then 5 and 3, cannot tell these groups apart.
    of_sum = ADVANTAGES["group"](scores, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(of_sum.abs(), torch.full((2, 2), 0.7071068), rtol=2e-4, atol=0)


def test_gdpo_leaves_out_what_does_not_apply() -> None:
    # First group: scores 0, 2, 4 have std 2, so z = ∓2 / 2.0001 = ∓0.9999500 and 0; scores 0 and 1 give z = ∓0.7070068 as
    # above. Z = ∓2.4139636, 0 and ±1.4140136: squares 15.6533096, over 5 - 1, root: 1.9782131, and + 1e-4.
    scores = torch.tensor([[[0.0, 0.0], [2.0, NAN], [4.0, 1.0]], [[3.0, 1.0], [3.0, 0.0], [NAN, NAN]]])
    advantages = ADVANTAGES["gdpo"](scores, torch.tensor([1.0, 2.0]))
    expected = [[-1.2202131, 0.0, 1.2202131], [0.7147572, -0.7147572, 0.0]]
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_gdpo_of_a_group_whose_objectives_are_each_equal_is_exactly_0() -> None:
    scores = torch.rand(3, 7, 2, generator=torch.Generator().manual_seed(0))
    scores[1] = torch.tensor([0.1, 0.7])
    assert (ADVANTAGES["gdpo"](scores, torch.tensor([0.3, 1.7]))[1] == 0).all()
