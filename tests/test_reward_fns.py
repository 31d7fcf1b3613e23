"""The verifiers that ship."""

from __future__ import annotations

import doctest
import importlib
import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from grpo_hf.reward_fns.exact_match import exact_match
from grpo_hf.reward_fns.format import format
from grpo_hf.reward_fns.gsm8k import completion_number, gold_number, gsm8k, last_boxed, parse_number
from grpo_hf.reward_fns.sorting import (
    distance,
    inclusion_ordering,
    parse_integers,
    sort_distance,
    sort_inclusion_ordering,
    sorting,
)
from grpo_hf.rewards.outcomes import NoAnswer

GSM8K_FILES = sorted((Path(__file__).parents[2] / "shared" / "gsm8k").glob("*.jsonl"))


@pytest.mark.parametrize("name", ["exact_match", "format", "gsm8k", "marks", "sorting"])
def test_the_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(f"grpo_hf.reward_fns.{name}"))
    assert results.attempted > 0 and results.failed == 0


def test_exact_match():
    assert exact_match(" Paris\n", "Paris") == 1.0
    assert exact_match("Paris!", "Paris") == 0.0
    assert exact_match("PARIS", "Paris") == 0.0
    assert exact_match("PARIS", "Paris", ignore_case=True) == 1.0
    assert exact_match(" Paris", "Paris", strip=False) == 0.0
    assert exact_match("42", 42) == 1.0
    with pytest.raises(ValueError, match="the answer is None"):
        exact_match("None", None)


def test_format_matches_the_whole_completion():
    good = "<think>a\nb</think>\n<answer>4</answer>"
    assert format(good) == 1.0
    assert format(f"Sure! {good}") == 0.0
    assert format(f"{good} done") == 0.0
    assert format("<answer>4</answer>") == 0.0
    assert format("AB", pattern="[A-Z]{2}") == 1.0
    assert format("ABC", pattern="[A-Z]{2}") == 0.0


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("16 - 3 - 4 = 9 eggs.\n#### 18", "She makes $<<9*2=18>>18.\n#### 18", 1.0),
        ("#### 17", "#### 18", 0.0),
        ("#### 18.00", "18", 1.0),
        ("#### $18", "18.0", 1.0),
        ("#### 18 dollars.", "18", 1.0),
        ("#### **18**", "18", 1.0),
        ("#### 50%", "#### 50", 1.0),
        ("#### 70,000", "#### 70000", 1.0),
        ("#### 1450000", "#### 1,450,000", 1.0),
        ("#### -3", "#### -3", 1.0),
        ("#### −3", "#### -3", 1.0),
        ("#### 3", "#### -3", 0.0),
        ("#### 0.1", "0.10000000000000001", 0.0),
        ("#### 1/2", "0.5", 1.0),
        ("#### 18 1/2", "18", 0.0),
        ("first #### 4, then\n#### 5", "5", 1.0),
        ("first #### 4, then\n#### 5", "4", 0.0),
        (r"\boxed{18}", "18", 1.0),
        (r"\boxed{3}, no: $\boxed{\$70{,}000.00 \text{ in all}}$", "70000", 1.0),
        (r"\boxed{-\frac{7}{2}}", "-3.5", 1.0),
        (r"\boxed{x = 18}", "18", 1.0),
        (r"\boxed{18} and #### 19", "18", 0.0),
        ("#### 19\n" + r"\boxed{18}", "18", 1.0),
        (r"\boxed{17} <answer>18</answer>", "18", 1.0),
        ("#### 18\n\n#### Explanation\nThere are 17 of them.", "18", 1.0),
        ("#### 18\n#### Step 2: add 17\nDone.", "18", 1.0),
        ("#### 18 or 19", "18", 0.0),
        ("#### 18 | 19 | 20", "18", 0.0),
        ("#### 18; 19", "18", 0.0),
        ("#### 18 apples and 3 pears", "18", 0.0),
        ("#### 18!", "18", 0.0),
        ("#### 18 million", "18", 0.0),
        ("#### 18 million", "18000000", 1.0),
        ("#### negative 18", "18", 0.0),
        ("#### minus $18", "-18", 1.0),
        ("#### not 18", "18", 0.0),
        ("<answer>18 dollars</answer>", "18", 1.0),
        ("<think>#### 18</think> I am not sure.", "18", 0.0),
        (r"\boxed{18}</think>" + "\n#### 19", "19", 1.0),
        ("#### so\n" + r"\boxed{18}", "18", 1.0),
        (r"\boxed{18", "18", 0.0),
        ("The answer is 18.", "18", 0.0),
        ("####", "18", 0.0),
        ("", "18", 0.0),
        ("#### 18", 18, 1.0),
        ("#### 0.5", 0.5, 1.0),
    ],
)
def test_gsm8k(completion, answer, expected):
    assert gsm8k(completion, answer) == expected


@pytest.mark.parametrize(
    ("completion", "answer"),
    [("It is 18.", 18), ("12 - 5 = -18", -18), ("#### 17 of $1,018.50!", "1018.5"), ("from 10-18", 18), (".5", 0.5)],
)
def test_gsm8k_can_read_the_last_number_of_a_text(completion, answer):
    assert gsm8k(completion, answer, reading="last_number") == 1.0
    assert gsm8k(completion + " Or 3?", answer, reading="last_number") == 0.0
    assert isinstance(gsm8k("No idea.", answer, reading="last_number"), NoAnswer)
    with pytest.raises(ValueError, match="no reading 'first'; its readings are: marked, last_number"):
        gsm8k(completion, answer, reading="first")


def test_gsm8k_without_a_number_is_no_answer():
    assert isinstance(gsm8k("It is 18.", "18"), NoAnswer) and isinstance(gsm8k("#### none", "18"), NoAnswer)
    assert not isinstance(gsm8k("#### 17", "18"), NoAnswer)


@pytest.mark.parametrize("answer", ["It is 18", "no number", "", "#### none", "#### 2 + 3", "1e5", None, float("nan")])
def test_gsm8k_gold_without_a_number_is_an_error_with_its_text(answer):
    with pytest.raises(ValueError, match="finds no number in the answer") as error:
        gsm8k("#### 18", answer)
    assert repr(str(answer)) in str(error.value)


def test_gold_numbers_are_exact():
    assert gold_number("#### 0.1") == Fraction(1, 10)
    assert gold_number("1,234.50") == Fraction(2469, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18-year-old", 18),
        ("US$18", 18),
        (r"18\,000", 18000),
        (r"18,\!000", 18000),
        ("5 m^2", 5),
        (r"90^\circ", 90),
        (".5", Fraction(1, 2)),
        ("7.", 7),
        ("18,0000", None),
        ("1.2.3", None),
        ("12:30", None),
        (r"10^{18}", None),
        (r"\sqrt{18}", None),
        ("3/0", None),
        (r"x_{1} = 7", 7),
        (r"1\ 1/2", None),
        ("words", None),
    ],
)
def test_parse_number(text, expected):
    assert parse_number(text) == expected


def test_last_boxed_balances_braces():
    assert last_boxed(r"\boxed{1} \boxed{a{b}{c{d}}e} }") == "a{b}{c{d}}e"
    assert last_boxed(r"\boxed{\{1\}}") == r"\{1\}"
    assert last_boxed(r"\boxed{1} then \boxed{2") is None
    assert last_boxed("boxed{1}") is None


@pytest.mark.parametrize(
    "hostile",
    [
        "#### " + "9" * 200000,
        "#### 1/" + "9" * 200000,
        "#### " + "1," * 100000,
        "#### x" + " " * 200000 + "y",
        "#### 1" + " -" * 100000 + " 2",
        r"\boxed{" * 50000,
        r"\boxed{" + "{" * 200000,
        "####" * 50000,
        "#### " + "$" * 200000,
        "#### 1" + ",000" * 50000 + "0",
    ],
    ids=lambda text: text[:10],
)
def test_hostile_completions_are_quickly_no_answer(hostile):
    start = time.process_time()
    assert completion_number(hostile) is None
    assert sorting(hostile, [1, 0]) < 1.0
    assert time.process_time() - start < 2.0


def test_an_absurdly_long_gold_is_an_error():
    with pytest.raises(ValueError, match="finds no number"):
        gsm8k("#### 1", "9" * 5000)


@pytest.mark.skipif(not GSM8K_FILES, reason="the GSM8K files are not beside the checkout")
def test_every_gsm8k_solution_scores_one_against_itself():
    answers = [json.loads(line)["answer"] for file in GSM8K_FILES for line in file.open(encoding="utf-8")]
    assert len(answers) == 8792
    assert [answer for answer in answers if gsm8k(answer, answer) != 1.0] == []
    numbers = [gold_number(answer) for answer in answers]
    neighbours = zip(answers, answers[1:], numbers, numbers[1:], strict=False)
    assert all(gsm8k(first, second) == float(a == b) for first, second, a, b in neighbours)


def test_the_lectures_sorting_rewards_on_lists():
    assert inclusion_ordering([3, 1, 0, 2], [0, 1, 2, 3]) == 7.0
    assert inclusion_ordering([3, 1, 0, 2], [7, 2, 2, 5]) == 3.0
    assert inclusion_ordering([1, 1, 2], [2, 1, 0]) == 3.0
    assert inclusion_ordering([1, 0], []) == 0.0
    assert distance([3, 1, 0, 2], [0, 1, 2, 3]) == 4.0
    assert distance([3, 1, 0, 2], [3, 1, 2, 0]) == 2.0
    assert distance([3, 1, 0, 2], [0, 1]) == 2.0


def test_the_lectures_sorting_rewards_on_text():
    assert sort_inclusion_ordering("0, 1, 2, 3", [3, 1, 0, 2]) == 7.0
    assert sort_inclusion_ordering("[7 2 2 5]", [3, 1, 0, 2]) == 3.0
    assert sort_inclusion_ordering("0 0 0 0 0 0 0 0", [1, 0]) == 2.0
    assert sort_distance("0 1 3 2", [3, 1, 0, 2]) == 2.0
    assert sort_distance("no idea", [3, 1, 0, 2]) == 0.0


@pytest.mark.parametrize(
    ("completion", "graded", "exact"),
    [
        ("0 1 2 3", 1.0, 1.0),
        ("Sorted: [0,1,2,3].", 1.0, 1.0),
        ("0 1 3 2", 0.5, 0.0),
        ("0 1 2", 0.75, 0.0),
        ("0 1 2 3 3", 0.8, 0.0),
        ("1 2 3", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_sorting(completion, graded, exact):
    assert sorting(completion, [3, 1, 0, 2]) == graded
    assert sorting(completion, [3, 1, 0, 2], partial_credit=False) == exact


def test_sorting_of_an_empty_list_and_of_negative_numbers():
    assert sorting("nothing", []) == 1.0
    assert sorting("1", []) == 0.0
    assert sorting("-10 -2 5", [5, -2, -10]) == 1.0


def test_integers_of_a_text():
    assert parse_integers("1,2;-3 4-5 x6.") == [1, 2, -3, 4, 5, 6]
    assert len(str(parse_integers("1" * 9999)[0])) == 100


@pytest.mark.parametrize("numbers", ["3 1 2", [1.5, 2.0], None])
def test_a_numbers_column_of_another_type_is_an_error(numbers):
    for verifier in (sorting, sort_distance, sort_inclusion_ordering):
        with pytest.raises(TypeError):
            verifier("1 2 3", numbers)
