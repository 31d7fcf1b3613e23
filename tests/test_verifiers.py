"""The small verifiers: what each takes for an answer, what it refuses, and what its dataset columns must be."""

from __future__ import annotations

import doctest
import importlib
import io
import json
import sys
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import cloudpickle
import pytest

from grpo_hf.reward_fns.countdown import countdown
from grpo_hf.reward_fns.format import format
from grpo_hf.reward_fns.json_schema import json_schema
from grpo_hf.reward_fns.length import cosine_length, soft_overlong
from grpo_hf.reward_fns.marks import last_tagged
from grpo_hf.reward_fns.math import math
from grpo_hf.reward_fns.multiple_choice import gold_choice, multiple_choice
from grpo_hf.reward_fns.regex import regex
from grpo_hf.reward_fns.repetition import repetition
from grpo_hf.rewards import get_reward
from grpo_hf.rewards.loading import load_function
from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, NoAnswer

N = NO_ANSWER
LONG = 100_000
"""Repeats of a piece of text that a pattern with a bad worst case would never come back from."""


def is_scored(score: float, expected: float) -> bool:
    """Equal, and both or neither say that there was no answer."""
    return score == expected and isinstance(score, NoAnswer) == isinstance(expected, NoAnswer)


@pytest.mark.parametrize("name", ["countdown", "format", "json_schema", "length", "multiple_choice", "regex", "repetition"])
def test_the_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(f"grpo_hf.reward_fns.{name}"))
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a\nb</think>\n<answer>4</answer>", 1.0),
        ("\n<think></think><answer></answer>\n", 1.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
        ("Sure! <think>a</think> <answer>4</answer>", 0.0),
        ("<think>a</think> <answer>4</answer> done", 0.0),
        ("<think>a<think>b</think> <answer>4</answer>", 0.0),
        ("<think>a</think> <answer>4</answer><answer>5</answer>", 0.0),
        ("<answer>4</answer> <think>a</think>", 0.0),
        ("<think><answer>4</think></answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("", 0.0),
        ("<think>" * LONG, 0.0),
        ("<think>" + " " * LONG + "</think>" + " " * LONG, 0.0),
    ],
)
def test_format_wants_each_tag_once_and_in_order(completion, expected):
    assert format(completion) == expected


def test_last_tagged():
    assert last_tagged("<answer>1</answer> <answer>2</answer>") == "2"
    assert last_tagged("<answer>1 <answer>2</answer>") == "2"
    assert last_tagged("</answer>1<answer>") is None
    assert last_tagged("<b>x</b>", "b") == "x"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"\boxed{C}", 1.0),
        (r"\boxed{\text{(C)}}", 1.0),
        (r"\boxed{C. Paris}", 1.0),
        (r"\boxed{B}, no, \boxed{C}", 1.0),
        (r"The answer is C, so \boxed{B}", 0.0),
        (r"The answer is C: \boxed{42}", N),
        (r"\boxed{B, C}", N),
        (r"\boxed{C or D}", N),
        ("The answer is (C).", 1.0),
        ("the answer is c.", 1.0),
        ("The answer is **C**", 1.0),
        ("**Answer:** C", 1.0),
        ("Answer:\n\nC", 1.0),
        ("ANSWER: [C]", 1.0),
        ("The answer is: option C because it fits", 1.0),
        ("The correct option is (c)", 1.0),
        ("Answer: B. Wait. Answer: C\nDone.", 1.0),
        ("The answer is C.\nOption B is wrong.", 1.0),
        ("The answer is C and not B", 1.0),
        ("The answer is (C) or (D)", N),
        ("Answer: B, C", N),
        ("The answer is not C", N),
        ("The answer is a matter of taste", N),
        ("The answer is A dog", N),
        ("The answer is A because", 0.0),
        ("<answer>C</answer>", 1.0),
        ("Answer: B <answer> (c) </answer>", 1.0),
        (r"<answer>\boxed{C}</answer>", 1.0),
        ("C", 1.0),
        ("c)", 1.0),
        ("Some thoughts on B.\nI choose C", 1.0),
        ("It is C, not the others", 1.0),
        ("It is C, not B", 1.0),
        ("C or D", N),
        ("The answer is B or C", N),
        ("Answer: C; D", N),
        ("The answer is C (or D)", N),
        (r"\boxed{B} or \boxed{C}", N),
        ("Not C", N),
        ("C\n\nExplanation: A is too big and B is too small.", 1.0),
        ("Answer: C\nOnly B and D are left out.", 1.0),
        (r"<think>\boxed{C}</think> I choose B", 0.0),
        ("A dog is in D.C. now", N),
        ("Type-C cables", N),
        ("I don't know", N),
        ("", N),
        ("Answer: Z", 0.0),
        ("answer" + " " * LONG + "is" + " " * LONG + "(C)", 1.0),
        ("(" * LONG, N),
        ("answer is " * LONG, N),
    ],
)
def test_multiple_choice(completion, expected):
    assert is_scored(multiple_choice(completion, "C", choices="ABCD"), expected)
    assert is_scored(multiple_choice(completion, 2, choices="ABCD"), expected)


@pytest.mark.parametrize("answer", ["C", "c", "(C)", "C.", " C: ", 2])
def test_forms_of_the_right_choice(answer):
    assert multiple_choice("Answer: C", answer) == 1.0


@pytest.mark.parametrize("answer", ["", "Paris", "3", -1, 26, 2.0, None, True])
def test_what_is_no_choice_is_bad_gold(answer):
    with pytest.raises(BadGoldError, match="as a letter or as an index from 0; the answer is"):
        gold_choice(answer)


@pytest.mark.parametrize("answer", ["E", 4])
def test_a_right_choice_that_is_none_of_the_choices_is_bad_gold(answer):
    with pytest.raises(BadGoldError, match="is none of the choices ABCD"):
        multiple_choice("Answer: A", answer, choices="abcd")


def test_choices_are_letters():
    with pytest.raises(ValueError, match="choices='1234' are not letters"):
        multiple_choice("Answer: A", "A", choices="1234")


@pytest.mark.parametrize(
    ("completion", "pattern", "options", "expected"),
    [
        ("abc 42", r"\d+", {}, 1.0),
        ("abc", r"\d+", {}, 0.0),
        ("ABC", "(?i)b", {}, 1.0),
        ("x = 3, x = 4", r"x = (\d)", {"group": 1, "answer": "4"}, 1.0),
        ("x = 3, x = 4", r"x = (\d)", {"group": 1, "answer": 3}, 0.0),
        ("x = 4", r"x = (?P<value>\d)", {"group": "value", "answer": 4}, 1.0),
        ("x =  4 ;", "x =([^;]*)", {"group": 1, "answer": " 4"}, 1.0),
        ("none", r"x = (\d)", {"group": 1, "answer": "4"}, N),
        ("x", r"x( \d)?", {"group": 1, "answer": "4"}, N),
        ("x = 4", r"x = (\d)", {"answer": "5"}, 1.0),
    ],
)
def test_regex(completion, pattern, options, expected):
    assert is_scored(regex(completion, pattern, **options), expected)


def test_regex_says_what_is_wrong_with_its_options():
    with pytest.raises(ValueError, match=r"has no group 2; it has 0 to 1, value"):
        regex("x", "(?P<value>x)", group=2, answer="x")
    with pytest.raises(ValueError, match="compares the group 1 with the column 'answer', which is missing"):
        regex("x", "(x)", group=1)
    with pytest.raises(BadGoldError, match="needs a pattern as text; got 3"):
        regex("x", 3)


def test_a_bad_pattern_fails_when_the_reward_is_found():
    with pytest.raises(ValueError, match=r"'\(x' is not a regular expression: missing \)"):
        get_reward({"name": "regex", "pattern": "(x"})
    reward = get_reward({"name": "regex", "pattern": "x{2}"})
    assert (reward.columns, reward.function("axxa"), reward.function("axa")) == ((), 1.0, 0.0)
    assert get_reward("regex").columns == ("pattern",)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        (' \n{"name": "Ada"}\n', 1.0),
        ('{"name": "Ada", "age": -1}', 0.0),
        ('{"age": 36}', 0.0),
        ('{"name": "Ada", "x": 1}', 0.0),
        ("[]", 0.0),
        ('Sure:\n```json\n{"name": "Ada"}\n```\nThere.', 1.0),
        ('```\n{"name": "Ada"}\n```', 1.0),
        ('```json\n{"name": 1}\n```\n```json\n{"name": "Ada"}\n```', 1.0),
        ('```json\n{"name": "Ada"}\n```\n```python\nprint()\n```', 1.0),
        ('```json\n{"name": "Ada"}\n```\n```json\n{"name": \n```', N),
        ('```json\n{"name": "Ada"}', N),
        ('It is {"name": "Ada"}', N),
        ("{'name': 'Ada'}", N),
        ("NaN", N),
        ("", N),
        ("[" * LONG, N),
        ("[" * 60 + "]" * 60, 0.0),
        ('{"name": ' + "1" * 5000 + "}", N),
    ],
)
def test_json_schema(completion, expected):
    assert is_scored(json_schema(completion, PERSON), expected)
    assert is_scored(json_schema(completion, json.dumps(PERSON)), expected)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "no such type"}, "not a JSON Schema"),
        ({"type": "object", "required": None}, "keep schemas as JSON text"),
        ("{", "as its JSON text; got '{'"),
        (None, "as its JSON text; got None"),
        (["type"], "as its JSON text"),
        ({"$ref": "#/$defs/lost"}, r"refers to '/\$defs/lost', which it does not hold"),
        ({"$ref": "http://localhost:9/schema.json"}, "refers to 'http://localhost:9/schema.json', which it does not hold"),
    ],
)
def test_a_bad_schema_is_bad_gold(schema, message):
    with pytest.raises(BadGoldError, match=message):
        json_schema("{}", schema)


def test_formats_are_asserted_unless_they_are_not_to_be():
    schema = {"type": "string", "format": "date"}
    assert [json_schema(text, schema) for text in ('"2024-03-05"', '"2024-13-45"')] == [1.0, 0.0]
    assert json_schema('"2024-13-45"', schema, formats=False) == 1.0


@pytest.mark.parametrize(
    ("verifier", "right", "columns"),
    [
        ("math", r"\boxed{7}", {"answer": "7"}),
        ("gsm8k", "#### 7", {"answer": "7"}),
        ("multiple_choice", "Answer: C", {"answer": "C"}),
        ("json_schema", "7", {"schema": {"type": "integer"}}),
        ("countdown", "<answer>3 + 4</answer>", {"numbers": [3, 4], "target": 7}),
        ("regex", "x = 7", {"pattern": r"x = (\d)", "group": 1, "answer": 7}),
        ("sorting", "1 2", {"numbers": [2, 1]}),
    ],
)
def test_what_is_thought_earns_nothing(verifier, right, columns):
    judge = get_reward(verifier).function
    thought, said = f"<think>{right}</think>\nnothing", f"Hmm.</think>\n{right}"
    assert (judge(thought, **columns), judge(said, **columns), judge(right, **columns)) == (0.0, 1.0, 1.0)
    assert judge(f"<think>a</think> nothing <think>{right}", **columns) == 0.0
    assert is_scored(judge(right, scope="after_think", **columns), N)
    assert judge(said, scope="after_think", **columns) == 1.0
    with pytest.raises(ValueError, match="there is no scope 'before'"):
        judge(right, scope="before", **columns)


def test_the_whole_counts_where_that_is_asked_for():
    assert math(r"<think>\boxed{7}</think> nothing", "7", scope="whole") == 1.0
    assert regex("<think>a</think> b", "(?s)<think>.*</think>") == 1.0, "a search for a form sees everything"
    assert get_reward({"name": "gsm8k", "scope": "whole"}).function("#### 7</think>", "7") == 1.0


def test_a_bad_schema_fails_when_the_reward_is_found():
    with pytest.raises(ValueError, match="not a JSON Schema"):
        get_reward({"name": "json_schema", "schema": {"type": "whole"}})
    reward = cloudpickle.loads(cloudpickle.dumps(get_reward({"name": "json_schema", "schema": '{"type": "integer"}'})))
    assert is_scored(reward.function("one"), N)
    assert (reward.columns, reward.function("1"), reward.function('"1"')) == ((), 1.0, 0.0)


def test_a_recursive_schema_and_an_older_draft():
    tree = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "items": {"$ref": "#"},
        "maximum": 3,
        "exclusiveMaximum": True,
    }
    assert json_schema("[[1, [2]]]", tree) == 1.0
    assert json_schema("[[1, [3]]]", tree) == 0.0
    assert json_schema("[" * 49 + "]" * 49, tree) == 1.0
    assert is_scored(json_schema("[" * 400 + "]" * 400, tree), 0.0), "the validator would run out of Python's stack"


def test_a_schema_is_never_fetched(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda request: io.BytesIO(b"{}"))
    with pytest.raises(BadGoldError, match="which it does not hold"):
        json_schema("{}", {"$ref": "http://localhost/schema.json"})


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>(6 - 2) * 5 + 1</answer>", 1.0),
        ("<answer> (6 - 2) * 5 + 1 = 21 </answer>", 1.0),
        ("<answer>(6 - 2) * 5 + 1 = 22</answer>", 0.0),
        ("<answer>1</answer> no <answer>1 + 5 * (6 - 2)</answer>", 1.0),
        (r"\boxed{(6 - 2) \times 5 + 1}", 1.0),
        (r"So $\boxed{\left(6 − 2\right) \cdot 5 + 1 = 21}$.", 1.0),
        ("#### (6-2)*5+1\nthat is it", 1.0),
        ("Let me see.\n6 - 2 = 4\nAnswer: **(6 - 2) × 5 + 1**", 1.0),
        ("(6 - 2) * 5 + 1.", 1.0),
        ("-(2 - 6) * 5 + 1", 1.0),
        ("(6 - 2) * 5 + 1 + 0", 0.0),
        ("(6 - 2) * (5 + 1)", 0.0),
        ("(6 - 2) * 5 + 2 - 1", 0.0),
        ("21", 0.0),
        ("16 + 5", 0.0),
        ("6 * 5 / (1 - 1)", 0.0),
        ("(6 - 2) * 5 + 1 and more", N),
        ("6 - 2 = 4, 4 * 5 = 20, 20 + 1 = 21", N),
        ("(6 - 2) * 5 + 1 = x", N),
        ("__import__('os').system('true')", N),
        ("(6 - 2) * 5 + 1 if 1 else 0", N),
        ("6 ** 2", N),
        ("6 // 2", N),
        ("0x6 + 1", N),
        ("6.0 - 2", N),
        ("06 + 1", N),
        ("6 -", N),
        ("()", N),
        ("6(2)", N),
        ("I give up", N),
        ("", N),
        ("9**9**9**9", N),
        ("(" * LONG + "1" + ")" * LONG, N),
        ("(" * 140 + "1" + ")" * 140, 0.0),
        ("-" * 299 + "1", 0.0),
        (r"\frac{" * 100, N),
        ("1" * LONG, N),
        ("(6 - 2) * 5 + 1" + " " * 400 + "* 0", N),
    ],
)
def test_countdown(completion, expected):
    assert is_scored(countdown(completion, [1, 2, 5, 6], 21), expected)


@pytest.mark.parametrize(
    ("expression", "numbers", "target", "use_all", "expected"),
    [
        ("3 * 8", [3, 8, 5], 24, False, 1.0),
        ("3 * 8", [3, 8, 5], 24, True, 0.0),
        ("3 * 8 * 1", [3, 8, 5], 24, False, 0.0),
        ("3 + 3 * 7", [3, 7], 24, False, 0.0),
        ("3 + 3 * 7", [3, 3, 7], 24, True, 1.0),
        ("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24, True, 1.0),
        (r"\boxed{\frac{8}{3 - \frac{8}{3}}}", [3, 3, 8, 8], 24, True, 1.0),
        ("49 / 49 - 1 / 49 * 49", [49, 49, 1, 49, 49], 0, True, 1.0),
        ("2 - 5", [2, 5], -3, True, 1.0),
        ("2 - 5 = -3", [2, 5], -3, True, 1.0),
        ("12", [1, 2], 12, True, 0.0),
        ("1 / 0", [1, 0], 0, True, 0.0),
    ],
)
def test_countdown_is_exact_about_numbers_and_values(expression, numbers, target, use_all, expected):
    assert is_scored(countdown(expression, numbers, target, use_all=use_all), expected)


@pytest.mark.parametrize("numbers", ["1 2", [], [1.5], [-1], None, 7])
def test_countdown_numbers_that_are_none_are_bad_gold(numbers):
    with pytest.raises(BadGoldError, match="list of whole numbers, none below 0; got numbers="):
        countdown("1", numbers, 1)


def test_a_countdown_target_that_is_no_number_is_bad_gold():
    with pytest.raises(BadGoldError, match="whole number as its target; got '24'"):
        countdown("24", [24], "24")


def solution(parts: list[tuple[Fraction, str]], target: int) -> str | None:
    """Some expression of the parts that reaches the target."""
    if len(parts) == 1:
        return parts[0][1] if parts[0][0] == target else None
    for (a, left), (b, right), *rest in permutations(parts):
        ways = [(a + b, "+"), (a - b, "-"), (a * b, "*"), *([(a / b, "/")] if b else [])]
        for value, sign in ways:
            if found := solution([(value, f"({left} {sign} {right})"), *rest], target):
                return found
    return None


def test_the_countdown_recipe_makes_puzzles_that_can_be_solved():
    make_data = load_function("recipes/countdown.py", "make_data", "")
    train, held_out = make_data(train=30, held_out=10)
    assert (len(train), len(held_out)) == (30, 10)
    assert make_data(train=30, held_out=10)[1].to_list() == held_out.to_list()
    for row in [*train, *held_out]:
        expression = solution([(Fraction(number), str(number)) for number in row["numbers"]], row["target"])
        assert countdown(f"<answer>{expression}</answer>", row["numbers"], row["target"]) == 1.0
    puzzles = [(*sorted(row["numbers"]), row["target"]) for row in [*train, *held_out]]
    assert len(set(puzzles)) == 40


def test_soft_overlong_is_daposs_equation_13():
    scores = {length: soft_overlong("", [0] * length, max_length=100, cache=20) for length in (0, 80, 81, 90, 100, 101, 500)}
    assert scores == {0: 0.0, 80: 0.0, 81: -0.05, 90: -0.5, 100: -1.0, 101: -1.0, 500: -1.0}
    reward = get_reward({"name": "soft_overlong", "max_length": 100, "cache": 20})
    assert (reward.columns, reward.built_ins) == ((), ("completion", "completion_ids"))


@pytest.mark.parametrize(("max_length", "cache"), [(10, 0), (10, 11), (10, -1)])
def test_soft_overlong_refuses_a_cache_outside_of_the_length(max_length, cache):
    with pytest.raises(ValueError, match=f"cache={cache} and max_length={max_length}"):
        soft_overlong("", [], max_length=max_length, cache=cache)


@pytest.mark.parametrize(
    ("right", "length", "expected"),
    [
        (1, 0, 2.0),
        (1, 25, 1.8536),
        (1, 50, 1.5),
        (1, 100, -10.0),
        (0, 0, -10.0),
        (0, 25, -8.5355),
        (0, 50, -5.0),
        (0, 200, -10.0),
    ],
)
def test_cosine_length(right, length, expected):
    verifier = cosine_length("exact_match", max_length=100)
    score = verifier(completion="4", answer="4" if right else "5", completion_ids=[0] * length)
    assert score == pytest.approx(expected, abs=1e-4)


def test_cosine_length_by_name_asks_for_its_parts_columns():
    reward = get_reward({"name": "cosine_length", "correct": {"name": "exact_match", "ignore_case": True}, "max_length": 10})
    assert (reward.name, reward.columns, reward.optional_columns) == ("cosine_length", ("answer",), ("strip",))
    assert reward.built_ins == ("completion", "completion_ids")
    with pytest.raises(ValueError, match="'cosine_length' needs the options correct, max_length"):
        get_reward("cosine_length")
    with pytest.raises(ValueError, match="max_length above 0; got 0"):
        cosine_length("exact_match", max_length=0)


@pytest.mark.parametrize(
    ("completion", "options", "expected"),
    [
        ("a b c d e", {}, 0.0),
        ("a b c a b c", {}, -0.25),
        ("A b\nc a  B c", {}, -0.25),
        ("a a a a", {"n": 1}, -0.75),
        ("a a a a", {"n": 1, "max_penalty": -2.0}, -1.5),
        ("a b", {}, 0.0),
        ("", {}, 0.0),
        ("a a a a", {"max_penalty": 0.0}, 0.0),
    ],
)
def test_repetition(completion, options, expected):
    assert repetition(completion, **options) == expected


def test_repetition_refuses_bad_options():
    with pytest.raises(ValueError, match="n=0 words"):
        repetition("a", n=0)
    with pytest.raises(ValueError, match=r"max_penalty=0\.5 would reward"):
        repetition("a", max_penalty=0.5)


def test_the_recipes_folder_hides_no_package_that_is_imported():
    """`python recipes/train.py` puts the folder first on the Python path."""
    names = {path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.py")}
    assert not names & {"reasoning_gym", "datasets", "torch", "math", "regex", "code", *sys.stdlib_module_names}
