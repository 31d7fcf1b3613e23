"""Scoring: what verifiers are called with, and what becomes of what they return."""

from __future__ import annotations

import asyncio
import math
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from grpo_hf.rewards import get_reward
from grpo_hf.types import Sample
from tests.scoring import score


def sample(text, prompt="Q", chat=False, **row):
    """A sample as the trainer would make it."""
    completion = [{"role": "assistant", "content": text}] if chat else text
    raw = [{"role": "user", "content": prompt}] if chat else prompt
    return Sample(prompt=raw, completion=completion, text=text, completion_ids=[len(text)], row=row)


def returning(value):
    """A per-sample verifier that returns the value."""

    def constant(completion):
        return value

    return get_reward(constant)


def test_per_sample_functions_get_text_and_their_columns():
    calls = []

    def f(completion, answer, prompt, completion_ids, unit="kg"):
        calls.append((completion, answer, prompt, completion_ids, unit))
        return len(calls)

    samples = [sample("a", answer=1, other=0), sample("bb", chat=True, answer=2, unit="g")]
    assert score(get_reward(f), samples) == [1.0, 2.0]
    assert calls == [
        ("a", 1, "Q", [1], "kg"),
        ("bb", 2, [{"role": "user", "content": "Q"}], [2], "g"),
    ]


def test_a_trl_reward_function_runs_unchanged():
    seen = {}

    def accuracy(prompts, completions, solution, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        kwargs["log_extra"]("solution", solution)
        kwargs["log_metric"]("accuracy", 0.5)
        return [1.0 if text == gold else None for text, gold in zip(completions, solution, strict=True)]

    samples = [sample("4", solution="4", level=1), sample("5", solution="6", level=2)]
    scores = score(get_reward(accuracy), samples, trainer_state="state")
    assert scores[0] == 1.0 and math.isnan(scores[1])
    assert seen["prompts"] == ["Q", "Q"] and seen["completions"] == ["4", "5"]
    assert seen["completion_ids"] == [[1], [1]] and seen["level"] == [1, 2] and seen["trainer_state"] == "state"
    assert set(seen) == {
        *("prompts", "completions", "completion_ids", "level"),
        *("trainer_state", "log_extra", "log_metric"),
    }


def test_batch_functions_get_messages_for_chat_prompts():
    def f(completions):
        return [len(messages[0]["content"]) for messages in completions]

    assert score(get_reward(f), [sample("abc", chat=True, answer=1)]) == [3.0]


def test_kwargs_take_everything_per_sample_too():
    seen = {}

    def f(completion, **kwargs):
        seen.update(kwargs)
        return 0

    score(get_reward(f), [sample("a", answer=1)], trainer_state=7)
    assert (seen["answer"], seen["prompt"], seen["completion_ids"], seen["trainer_state"]) == (1, "Q", [1], 7)
    assert "prompts" not in seen and "completions" not in seen


def test_columns_named_like_a_builtin_are_never_passed():
    def f(prompt, completion, completion_ids):
        return float((prompt, completion, completion_ids) == ("Q", "a", [1]))

    row = {"prompt": "row", "completion": "row", "completion_ids": "row"}
    assert score(get_reward(f), [Sample("Q", "a", "a", [1], row)]) == [1.0]


def test_a_bound_option_wins_over_a_column():
    def f(completion, scale=1.0, **kwargs):
        return scale

    assert score(get_reward({"name": f, "scale": 2.0}), [sample("a", scale=9.0)]) == [2.0]


def test_async_calls_of_one_score_run_concurrently():
    running = most = 0

    async def f(completion, answer):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.1)
        running -= 1
        return answer

    assert score(get_reward(f), [sample("a", answer=i) for i in range(5)]) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert most == 5


def test_an_async_batch_function_inside_a_running_loop():
    async def f(completions, **kwargs):
        await asyncio.sleep(0)
        return [None, 1]

    async def notebook():
        return score(get_reward(f), [sample("a"), sample("b")])

    scores = asyncio.run(notebook())
    assert math.isnan(scores[0]) and scores[1] == 1.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (3, 3.0),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (np.array(2), 2.0),
        (torch.tensor(0.25), 0.25),
        (torch.tensor(True), 1.0),
        (Fraction(1, 4), 0.25),
    ],
)
def test_numbers_become_floats(value, expected):
    scores = score(returning(value), [sample("a")])
    assert scores == [expected] and type(scores[0]) is float


@pytest.mark.parametrize(
    "value",
    ["1.0", [1.0], {"score": 1}, 1j, np.array([1.0]), torch.tensor([1.0]), object()],
    ids=lambda value: type(value).__name__,
)
def test_other_things_name_the_verifier_and_what_it_returned(value):
    expected = f"'constant' returned .*\\({type(value).__name__}\\) for a sample; expected a number"
    with pytest.raises(ValueError, match=expected):
        score(returning(value), [sample("a")])


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, np.float16("inf"), torch.tensor(math.inf), torch.tensor(math.nan), 10**400]
)
def test_infinite_values_name_the_verifier(value):
    with pytest.raises(ValueError, match=r"'constant' returned .* expected a finite number"):
        score(returning(value), [sample("a")])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], r"'batch' returned 1 scores for 2 completions: \[1.0\] \(list\); expected one each"),
        ([1.0, 2.0, 3.0], "'batch' returned 3 scores for 2 completions"),
        (1.0, r"'batch' returned 1.0 \(float\); expected a list of 2 numbers"),
        ("ab", r"'batch' returned 'ab' \(str\); expected a list of 2 numbers"),
        (np.ones((2, 1)), "'batch' returned .*; expected a list of 2 numbers"),
        ({0: 1.0, 1: 1.0}, "'batch' returned .*; expected a list of 2 numbers"),
        (None, "'batch' returned None .*; expected a list of 2 numbers"),
        (["a", "b"], r"'batch' returned 'a' \(str\) for a sample; expected a number"),
    ],
)
def test_a_batch_of_wrong_length_or_type_names_the_verifier(result, message):
    def batch(completions):
        return result

    with pytest.raises(ValueError, match=message):
        score(get_reward(batch), [sample("a"), sample("b")])


@pytest.mark.parametrize("result", [(0.5, 1.0), np.array([0.5, 1.0]), torch.tensor([0.5, 1.0])], ids=["t", "np", "pt"])
def test_a_batch_may_be_a_tuple_an_array_or_a_tensor(result):
    def batch(completions):
        return result

    assert score(get_reward(batch), [sample("a"), sample("b")]) == [0.5, 1.0]


@pytest.mark.parametrize("is_async", [False, True])
def test_an_exception_is_told_with_its_traceback(is_async):
    def fails(completion):
        raise KeyError("cause")

    async def fails_async(completion):
        raise KeyError("cause")

    with pytest.raises(ValueError, match=r"(?s)Traceback.*in fails.*KeyError: 'cause'"):
        score(get_reward(fails_async if is_async else fails), [sample("a"), sample("b")])


def test_a_missing_column_is_said_before_the_call():
    with pytest.raises(ValueError, match="'exact_match' asks for the column 'answer'"):
        score(get_reward("exact_match"), [sample("a", question="b")])


def test_no_samples_no_call():
    def f(completions):
        raise AssertionError

    assert score(get_reward(f), []) == []


def test_scoring_a_rollout_costs_little():
    samples = [sample("#### 4", answer="#### 4") for _ in range(512)]
    reward = get_reward("gsm8k")
    start = time.process_time()
    assert sum(score(reward, samples)) == 512.0
    assert time.process_time() - start < 1.0
