"""The numbers of a rollout, by hand."""

from grpo_hf.rollout.record import num_padded_tokens, num_tokens
from grpo_hf.types import Completion
from tests.samples import group

GROUPS = [group([1, 2], [[10, 11], [20]]), group([3], [[30, 31, 32]]), group([4, 5], [[40, 41, 42]])]


def test_tokens_when_every_completion_is_a_padded_row() -> None:
    assert num_padded_tokens(GROUPS) == 4 * (2 + 3)


def test_what_a_tool_answered_was_not_sampled() -> None:
    with_tool = group([1], [Completion([7, 90, 91, 8], truncated=False, is_sampled=[True, False, False, True])])
    assert num_tokens(GROUPS) == 2 + 1 + 3 + 3
    assert num_tokens([*GROUPS, with_tool]) == 9 + 2
