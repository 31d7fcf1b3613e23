"""Aggregation weights and the sums over completions beneath them, against numbers worked out by hand."""

import pytest
import torch

from grpo_hf.algorithm.aggregation import AGGREGATIONS, Denominators
from grpo_hf.algorithm.sequences import sequence_lengths, sequence_mean, sequence_sum

SEQUENCE = torch.tensor([0, 0, 0, 1])
LOSSES = torch.tensor([3.0, 0.0, 3.0, 8.0])
ALONE = Denominators(tokens=4, sequences=2, local_tokens=4, num_processes=1, max_completion_length=8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_mean", 14 / 4),
        ("sequence_mean", (6 / 3 + 8 / 1) / 2),
        ("constant_length", 14 / (2 * 8)),
        ("local_token_mean", 14 / 4),
        ("sequence_sum", (6 + 8) / 2),
    ],
)
def test_weighted_sum_is_the_documented_mean(name: str, expected: float) -> None:
    assert (AGGREGATIONS[name](SEQUENCE, 2, ALONE) * LOSSES).sum().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_mean", [0.1] * 4),  # 1 / 10 tokens of all processes
        ("sequence_mean", [1 / 15] * 3 + [1 / 5]),  # 1 / (5 x 3) and 1 / (5 x 1)
        ("constant_length", [1 / 40] * 4),  # 1 / (5 x 8)
        ("local_token_mean", [1 / 8] * 4),  # 1 / (4 x 2)
        ("sequence_sum", [1 / 5] * 4),
    ],
)
def test_denominators_are_the_callers(name: str, expected: list[float]) -> None:
    denominators = Denominators(tokens=10, sequences=5, local_tokens=4, num_processes=2, max_completion_length=8)
    assert AGGREGATIONS[name](SEQUENCE, 2, denominators).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_microbatches_get_the_weights_of_the_whole(name: str) -> None:
    whole = AGGREGATIONS[name](SEQUENCE, 2, ALONE)
    parts = [AGGREGATIONS[name](torch.zeros(n, dtype=torch.long), 1, ALONE) for n in (3, 1)]
    assert torch.equal(torch.cat(parts), whole)


def test_local_token_mean_is_the_mean_of_the_processes_means() -> None:
    # One process has losses 2, 4, 6, 8, the other has 10: (5 + 10) / 2, where the token mean is 30 / 5.
    losses = {4: torch.tensor([2.0, 4.0, 6.0, 8.0]), 1: torch.tensor([10.0])}
    totals = {"local_token_mean": 0.0, "token_mean": 0.0}
    for name in totals:
        for count, of_process in losses.items():
            denominators = Denominators(tokens=5, sequences=2, local_tokens=count, num_processes=2, max_completion_length=8)
            weights = AGGREGATIONS[name](torch.zeros(count, dtype=torch.long), 1, denominators)
            totals[name] += (weights * of_process).sum().item()
    assert totals == pytest.approx({"local_token_mean": 7.5, "token_mean": 6.0})


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_an_update_whose_tokens_are_all_masked_has_no_weights(name: str) -> None:
    empty = Denominators(tokens=0, sequences=2, local_tokens=0, num_processes=1, max_completion_length=8)
    assert AGGREGATIONS[name](torch.zeros(0, dtype=torch.long), 2, empty).tolist() == []


def test_sequence_sums_lengths_and_means() -> None:
    # Completion 0 has tokens 1 and 4, completion 1 none, completion 2 has 2, 3 and 10, in any order.
    values, sequence = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]), torch.tensor([0, 2, 2, 0, 2])
    assert sequence_sum(values, sequence, 3).tolist() == [5.0, 0.0, 15.0]
    assert sequence_lengths(sequence, 3).tolist() == [2, 0, 3]
    assert sequence_mean(values, sequence, 3).tolist() == [2.5, 0.0, 5.0]
    assert sequence_lengths(sequence, 4).tolist() == [2, 0, 3, 0]
