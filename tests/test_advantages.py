"""Advantages against numbers worked out by hand."""

import pytest
import torch

from grpo_hf.algorithm.advantages import ADVANTAGES, NEEDS_A_GROUP
from grpo_hf.algorithm.advantages import batch_normalized as batch
from grpo_hf.algorithm.advantages import group_normalized as group

NAN = float("nan")


def check(name: str, rewards: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(ADVANTAGES[name](torch.tensor(rewards)), torch.tensor(expected), rtol=1e-6, atol=1e-7)


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


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_without_a_score_is_0_and_changes_no_other(name: str) -> None:
    group = [1.0, 2.0, 6.0]
    alone = ADVANTAGES[name](torch.tensor([group]))
    beside = ADVANTAGES[name](torch.tensor([[NAN, NAN, NAN], group]))
    assert beside[0].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(beside[1:], alone)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_completion_without_a_score_is_as_if_it_had_never_been_there(name: str) -> None:
    """To the last bit."""
    alone = ADVANTAGES[name](torch.tensor([[0.1, 0.7, 0.3], [2.0, 2.0, 5.0]]))
    beside = ADVANTAGES[name](torch.tensor([[0.1, NAN, 0.7, 0.3], [2.0, 2.0, 5.0, NAN]]))
    assert torch.equal(beside[0, [0, 2, 3]], alone[0])
    assert torch.equal(beside[1, :3], alone[1])
    assert beside[0, 1] == beside[1, 3] == 0.0


@pytest.mark.parametrize("name", ADVANTAGES)
def test_no_score_at_all_is_0(name: str) -> None:
    assert ADVANTAGES[name](torch.full((2, 3), NAN)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_one(name: str) -> None:
    of_one = ADVANTAGES[name](torch.tensor([[2.0]])).item()
    assert of_one == (0.0 if name in NEEDS_A_GROUP else 2.0)
    # One scored completion among NaN is a group of one.
    of_scored = ADVANTAGES[name](torch.tensor([[NAN, 2.0, NAN]]))
    assert of_scored.tolist() == [[0.0, of_one, 0.0]]


@pytest.mark.parametrize("name", sorted(NEEDS_A_GROUP))
@pytest.mark.parametrize(("size", "dtype"), [(6, torch.float64), (7, torch.float32), (8, torch.float32)])
def test_equal_rewards_are_exactly_0(name: str, size: int, dtype: torch.dtype) -> None:
    rewards = torch.full((1, size), 0.1, dtype=dtype)
    assert (rewards - rewards.mean()).abs().max() > 0, "the mean is meant to round here"
    assert (ADVANTAGES[name](rewards) == 0).all()
    # A group with signal beside it, and a NaN within it, change nothing.
    rewards = torch.cat([rewards, torch.arange(size, dtype=dtype)[None]])
    rewards = torch.cat([rewards, torch.tensor([[NAN], [1.0]], dtype=dtype)], dim=1)
    assert (ADVANTAGES[name](rewards)[0] == 0).all()


@pytest.mark.parametrize("normalized", [group, batch])
def test_only_normalized_forms_ignore_the_rewards_scale(normalized) -> None:
    rewards = torch.tensor([[0.0, 1.0, 5.0], [2.0, 2.0, 8.0]])
    torch.testing.assert_close(normalized(100 * rewards), normalized(rewards), rtol=1e-3, atol=0)
    assert torch.equal(ADVANTAGES["centered"](128 * rewards), 128 * ADVANTAGES["centered"](rewards))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_infinite_reward_is_never_hidden(name: str) -> None:
    advantages = ADVANTAGES[name](torch.tensor([[float("inf"), 1.0, 2.0]]))
    assert not advantages.isfinite().all()
