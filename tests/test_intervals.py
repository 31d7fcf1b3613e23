"""Intervals hold the truth as often as they say, also near 0 and 1 and with few prompts; pairs are compared as pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from grpo_hf.evaluation.estimates import Question, estimates_of
from grpo_hf.evaluation.intervals import mean_of_numbers, mean_of_shares
from grpo_hf.evaluation.paired import differences
from grpo_hf.types import Completion, Group, Prompt

ROUNDS = 1000


@pytest.mark.parametrize("prompts", [20, 200])
@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize(
    ("a", "b"),
    [(0.1, 4.9), (0.5, 0.5), (3.0, 2.0), (9.8, 0.2), (20.0, 20.0)],
    ids=["0.02", "all or none", "0.6", "0.98", "alike"],
)
def test_coverage(prompts: int, samples: int, a: float, b: float) -> None:
    """Prompts have their own chances, drawn from a beta distribution, and so many samples each."""
    rng = np.random.default_rng(0)
    chances = rng.beta(a, b, (ROUNDS, prompts))
    values = rng.binomial(samples, chances) / samples
    found = [mean_of_shares(list(row), samples) for row in values]
    covered = np.mean([item.low <= a / (a + b) <= item.high for item in found])
    assert covered > 0.915, f"said 0.95, and is {covered}"
    plain = np.mean([abs(row.mean() - a / (a + b)) <= 1.96 * row.std(ddof=1) / math.sqrt(prompts) for row in values])
    if prompts == 20 and a in (0.1, 9.8):
        assert plain < 0.85, "where the usual interval is far too sure"
    width, usual = (
        np.mean([item.high - item.low for item in found]),
        2 * 1.96 * values.std(axis=1, ddof=1).mean() / prompts**0.5,
    )
    if prompts == 200:
        assert width < 1.25 * usual


def test_literals() -> None:
    """Of 0 and 1 alone it is Wilson's interval, with Student's quantile in the number of trials."""
    found = mean_of_shares([1.0] * 7 + [0.0] * 3)
    trials = 9 * (1.959964 / 2.262157) ** 2  # s^2 / P = 0.21 / 9
    wilson = stats.binomtest(7, 10).proportion_ci(method="wilson")
    assert found.value == 0.7 and found.low < wilson.low and found.high > wilson.high
    middle, half = (0.7 + 1.959964**2 / (2 * trials)) / (1 + 1.959964**2 / trials), (found.high - found.low) / 2
    assert (found.low + found.high) / 2 == pytest.approx(middle, rel=1e-5) and half == pytest.approx(0.28528, rel=1e-4)
    numbers = mean_of_numbers([1.0, 2.0, 6.0])
    assert (numbers.value, numbers.low) == (3.0, pytest.approx(3 - 4.302653 * math.sqrt(7 / 3), rel=1e-5))
    assert (mean_of_shares([0.5]).low, mean_of_shares([0.5]).high) == (0.0, 1.0), "one prompt says nothing of others"


def question(row: int, scores: list[float], **more: object) -> Question:
    return Question(row, 100 + row, f"prompt {row}", {"right": scores}, scores, [str(score) for score in scores])


def test_estimates_of_questions() -> None:
    questions = [question(0, [1.0, 0.0, 0.0, 0.0]), question(1, [1.0, 1.0, 1.0, 0.0]), question(2, [math.nan] * 4)]
    found = estimates_of(questions)
    assert list(found) == ["reward", *(f"rewards/right/{name}" for name in ("mean", "pass@2", "maj@2", "pass@4", "maj@4"))]
    assert found["rewards/right/mean"].value == 0.5 and found["rewards/right/mean"].count == 2
    assert found["rewards/right/pass@2"].value == pytest.approx((1 / 2 + 1) / 2)
    assert found["rewards/right/maj@4"].value == 0.5, "0 has three votes of four, then 1 has"
    graded = estimates_of([question(0, [0.5, 0.0]), question(1, [1.0, 1.0])])
    assert set(graded) == {"reward", "rewards/right/mean"}, "pass@k is of right and wrong"


def test_votes_are_for_what_a_verifier_logs() -> None:
    from grpo_hf.evaluation.estimates import question_of

    items = [Completion([1], False, text=f"so it is {x}", rewards={"right": 0.0}, extra={"answer": x}) for x in (3, 3, 4)]
    group = Group(Prompt([0], "?", {}, 5), items)
    assert question_of(group, 1).answers == ["3", "3", "4"]
    items[0].extra = {}
    assert question_of(group, 1).answers[0] == "so it is 3"


def test_pairs() -> None:
    rng = np.random.default_rng(0)
    a = [question(row, [float(value)]) for row, value in enumerate(rng.random(60) < 0.5)]
    b = [question(item.row, [1.0] if row < 9 else item.scores["right"]) for row, item in enumerate(a)]
    gained = sum(item.scores["right"] == [0.0] for item in a[:9])
    found = differences(a, b)["rewards/right/mean"]
    assert (found.better, found.worse, found.estimate.value) == (gained, 0, pytest.approx(gained / 60))
    assert found.p_value == pytest.approx(stats.binomtest(gained, gained).pvalue)
    assert found.estimate.low < gained / 60 < found.estimate.high
    same = differences(a, a)["rewards/right/mean"]
    assert same.p_value == 1 and same.estimate.low < 0 < same.estimate.high, "and not sure of it"


def test_p_values_are_even_where_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    values = []
    for _ in range(60):
        a, b = (rng.binomial(4, 0.5, 12) for _ in range(2))
        both = [[question(row, [1.0] * n + [0.0] * (4 - n)) for row, n in enumerate(of)] for of in (a, b)]
        values.append(differences(*both)["rewards/right/mean"].p_value)
    assert stats.kstest(values, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": 7}, "other rows: row 1 is 'prompt 1' in A and None in B"),
        ({"prompt": "else"}, "other rows: row 1 is 'prompt 1' in A and 'else' in B"),
        ({"seed": 5}, "other seeds: row 1 is 101 in A and 5 in B"),
        ({"rewards": [1.0, 0.0]}, ""),
    ],
)
def test_what_is_no_pair(change: dict[str, object], message: str) -> None:
    a, b = [question(row, [1.0]) for row in range(3)], [question(row, [1.0]) for row in range(3)]
    vars(b[1]).update(change)
    if message:
        with pytest.raises(ValueError, match=message):
            differences(a, b)
    b = [question(row, [1.0, 0.0]) for row in range(3)]
    with pytest.raises(ValueError, match="A has 1 samples of each row and B 2"):
        differences(a, b)
