"""Aggregation weights and the sums over completions beneath them, against numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch

from grpo_hf.algorithm.aggregation import AGGREGATIONS, Denominators
from grpo_hf.algorithm.sequences import sequence_mean, sequence_sum
from grpo_hf.types import TokenBatch
from tests.batches import token_batch

LOSSES = torch.tensor([3.0, 0.0, 3.0, 8.0])
ALONE = Denominators(tokens=4, sequences=2, local_tokens=4, num_processes=1, max_completion_length=8, update_tokens=4)


def batch_of(*completion: int, lengths: list[int] | None = None) -> TokenBatch:
    """Tokens by the completion that they are of."""
    return token_batch([1.0] * len(completion), completion=completion, lengths=lengths)


THREE_AND_ONE = batch_of(0, 0, 0, 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_mean", 14 / 4),
        ("update_mean", 14 / 4),
        ("sequence_mean", (6 / 3 + 8 / 1) / 2),
        ("constant_length", 14 / (2 * 8)),
        ("local_token_mean", 14 / 4),
        ("sequence_sum", (6 + 8) / 2),
    ],
)
def test_weighted_sum_is_the_documented_mean(name: str, expected: float) -> None:
    assert (AGGREGATIONS[name](THREE_AND_ONE, ALONE) * LOSSES).sum().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_mean", [0.1] * 4),  # 1 / 10 tokens of all processes
        ("update_mean", [0.125] * 4),  # 1 / 8 of them in this update
        ("sequence_mean", [1 / 15] * 3 + [1 / 5]),  # 1 / (5 x 3) and 1 / (5 x 1)
        ("constant_length", [1 / 40] * 4),  # 1 / (5 x 8)
        ("local_token_mean", [1 / 8] * 4),  # 1 / (4 x 2)
        ("sequence_sum", [1 / 5] * 4),
    ],
)
def test_denominators_are_the_callers(name: str, expected: list[float]) -> None:
    denominators = Denominators(
        tokens=10, sequences=5, local_tokens=4, num_processes=2, max_completion_length=8, update_tokens=8
    )
    assert AGGREGATIONS[name](THREE_AND_ONE, denominators).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_microbatches_get_the_weights_of_the_whole(name: str) -> None:
    whole = AGGREGATIONS[name](THREE_AND_ONE, ALONE)
    parts = [AGGREGATIONS[name](batch_of(*[0] * count), ALONE) for count in (3, 1)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_token_left_out_changes_no_other_tokens_weight(name: str) -> None:
    """Because it has no gradient: completions keep their lengths."""
    left = AGGREGATIONS[name](batch_of(0, 0, 1, lengths=[3, 1]), ALONE)
    assert torch.equal(left, AGGREGATIONS[name](THREE_AND_ONE, ALONE)[1:])


def test_local_token_mean_is_the_mean_of_the_processes_means() -> None:
    # One process has losses 2, 4, 6, 8, the other has 10: (5 + 10) / 2, where the token mean is 30 / 5.
    losses = {4: torch.tensor([2.0, 4.0, 6.0, 8.0]), 1: torch.tensor([10.0])}
    totals = {"local_token_mean": 0.0, "token_mean": 0.0}
    for name in totals:
        for count, of_process in losses.items():
            denominators = replace(ALONE, tokens=5, local_tokens=count, num_processes=2)
            weights = AGGREGATIONS[name](batch_of(*[0] * count), denominators)
            totals[name] += (weights * of_process).sum().item()
    assert totals == pytest.approx({"local_token_mean": 7.5, "token_mean": 6.0})


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_an_update_whose_tokens_are_all_masked_has_no_weights(name: str) -> None:
    empty = replace(ALONE, tokens=0, local_tokens=0, update_tokens=0)
    assert AGGREGATIONS[name](batch_of(lengths=[2, 2]), empty).tolist() == []


def test_sequence_sums_and_means() -> None:
    # Completion 0 has tokens 1 and 4, completion 1 none, completion 2 has 2, 3 and 10, in any order.
    values, completion = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]), (0, 2, 2, 0, 2)
    batch = batch_of(*completion)
    assert sequence_sum(values, batch).tolist() == [5.0, 0.0, 15.0]
    assert sequence_mean(values, batch).tolist() == [2.5, 0.0, 5.0]
    # The mean is over all targets of a completion, those that are not in the batch too.
    assert sequence_mean(values, batch_of(*completion, lengths=[4, 2, 3, 1])).tolist() == [1.25, 0.0, 5.0, 0.0]
