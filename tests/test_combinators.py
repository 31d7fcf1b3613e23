"""Verifiers made of verifiers: what they ask for, what they return, and how they are found by name."""

from __future__ import annotations

import doctest
import functools
import json

import cloudpickle
import pytest

from grpo_hf.rewards import (
    RewardSettings,
    check_gold,
    clip,
    combinators,
    gate,
    get_reward,
    get_rewards,
    known_rewards,
    register_reward,
    registry,
    score_samples,
)
from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, NoAnswer, parses_gold
from grpo_hf.rewards.registry import register_combinator
from grpo_hf.rewards.signature import judge_of, parser_of
from grpo_hf.types import Sample
from tests.scoring import score


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Give each test a registry that it may fill."""
    monkeypatch.setattr(registry, "_registry", {})
    monkeypatch.setattr(registry, "_combinators", dict(registry._combinators))


def number(answer):
    if not str(answer).lstrip("-").isdigit():
        raise BadGoldError(f"no number: {answer!r}")
    return int(answer)


@parses_gold(number)
def equals(completion, answer):
    """Right, wrong, or nothing to judge."""
    return float(int(completion) == answer) if completion.isdigit() else NO_ANSWER


def returns(value):
    """A verifier of that name's score."""

    def verifier(completion):
        return value

    return verifier


def scored(spec, completion, **row):
    """The score of one sample by the way that training scores it."""
    (value,) = score(get_reward(spec), [Sample("", completion, completion, [1, 2, 3], row)])
    return value


def test_the_docstring_examples():
    results = doctest.testmod(combinators)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize(
    ("first", "options", "expected"),
    [
        (1.0, {}, 0.7),
        (2.0, {}, 0.7),
        (0.9, {}, 0.0),
        (0.9, {"threshold": 0.5}, 0.7),
        (0.5, {"threshold": 0.5}, 0.7),
        (0.0, {"otherwise": -1.0}, -1.0),
        (None, {}, 0.7),
        (float("nan"), {}, 0.7),
        (True, {}, 0.7),
    ],
)
def test_gate(first, options, expected):
    assert gate(returns(first), returns(0.7), **options)(completion="") == expected


def test_a_closed_gate_does_not_call_what_is_behind_it():
    def fails(completion):
        raise AssertionError("called")

    assert gate(returns(0.0), fails)(completion="") == 0.0


@pytest.mark.parametrize(
    ("scores", "weights", "expected"),
    [
        ([1.0, 0.5], None, 1.5),
        ([1.0, 0.5], [0.2, 1.0], 0.7),
        ([1.0, None], [0.2, 1.0], 0.2),
        ([None, None], None, None),
        ([2.0], [-1.0], -2.0),
    ],
)
def test_weighted_sum(scores, weights, expected):
    verifier = combinators.weighted_sum([returns(score) for score in scores], weights)
    assert verifier(completion="") == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(("value", "expected"), [(-2.0, 0.0), (0.5, 0.5), (7, 1.0), (None, None)])
def test_clip(value, expected):
    assert clip(returns(value))(completion="") == expected


@pytest.mark.parametrize(
    ("verifier", "expected", "no_answer"),
    [
        (gate(returns(1.0), returns(NO_ANSWER)), 0.0, True),
        (gate(returns(NO_ANSWER), returns(1.0), otherwise=-1.0), -1.0, True),
        (gate(returns(0.0), returns(NO_ANSWER)), 0.0, False),
        (combinators.weighted_sum([returns(1.0), returns(NO_ANSWER)]), 1.0, True),
        (combinators.weighted_sum([returns(1.0), returns(0.0)]), 1.0, False),
        (clip(returns(NO_ANSWER), low=0.5), 0.5, True),
        (clip(returns(0.0)), 0.0, False),
    ],
)
def test_no_answer_is_passed_on(verifier, expected, no_answer):
    value = verifier(completion="")
    assert value == expected and isinstance(value, NoAnswer) == no_answer


def test_the_parts_columns_are_asked_for():
    def first(completion, answer, *, unit="kg"): ...
    def second(completion, prompt, numbers, unit, completion_ids, *, log_metric=None): ...

    reward = get_reward({"name": "gate", "first": first, "then": {"name": second, "numbers": [1]}})
    assert (reward.name, reward.per_sample, reward.takes_all, reward.is_async) == ("gate", True, False, False)
    assert (reward.columns, reward.optional_columns) == (("answer", "unit"), ())
    assert reward.built_ins == ("prompt", "completion", "completion_ids", "log_metric")


def test_a_part_gets_only_what_it_takes():
    def everything(completion, **kwargs):
        return float(len(kwargs))

    assert get_reward(gate(returns(1.0), everything)).takes_all
    assert scored(gate(returns(1.0), "exact_match"), "Paris", answer="Paris", strip=False) == 1.0
    assert scored(gate("exact_match", everything), "4", answer="4", other=1) == 8


def test_one_form_in_yaml_and_nested():
    spec = {
        "name": "clip",
        "reward": {
            "name": "weighted_sum",
            "rewards": [
                {"name": "gate", "first": {"name": "format", "pattern": "#### .*"}, "then": "gsm8k", "otherwise": -1},
                {"name": "exact_match", "ignore_case": True},
            ],
            "weights": [2.0, 1.0],
        },
        "low": -0.5,
        "high": 2.5,
    }
    reward = get_reward(json.loads(json.dumps(spec)))
    assert (reward.name, reward.columns) == ("clip", ("answer",))
    assert [scored(spec, text, answer="18") for text in ("#### 18", "#### 17", "18", "so 18")] == [2.0, 0.0, -0.5, -0.5]


def test_in_python_a_combinator_makes_a_reward_function():
    rewards = get_rewards([gate("format", "exact_match"), gate("format", "gsm8k"), "format"])
    assert [reward.name for reward in rewards] == ["gate", "gate_2", "format"]


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "gate", "first": returns(1.0), "then": equals},
        {"name": "weighted_sum", "rewards": [equals, lambda completion: 0.0]},
        {"name": "clip", "reward": gate(returns(1.0), {"name": equals})},
    ],
)
def test_it_survives_pickling(spec):
    reward = cloudpickle.loads(cloudpickle.dumps(get_reward(spec)))
    assert reward.function(completion="4", answer="4") == 1.0
    assert isinstance(reward.function(completion="four", answer="4"), NoAnswer)


def test_bad_gold_is_bad_gold():
    with pytest.raises(BadGoldError, match="no number: 'four'"):
        gate(returns(1.0), equals)(completion="4", answer="four")
    assert gate(returns(0.0), equals)(completion="4", answer="four") == 0.0, "the part is not called"


def test_gold_is_parsed_once_a_prompt_and_can_be_checked_alone():
    parsed = []

    @parses_gold(lambda answer: parsed.append(answer) or number(answer))
    def counted(completion, answer, *, scale=1.0):
        return scale * (int(completion) == answer)

    inner = gate(returns(1.0), {"name": counted, "scale": 2.0})
    reward = get_reward(combinators.weighted_sum([inner, "exact_match", equals]))
    assert (reward.gold_column, reward.columns) == ("answer", ("answer",))
    gold = cloudpickle.loads(cloudpickle.dumps(parser_of(reward.function)("4")))
    assert [judge_of(reward.function)(completion=text, answer=gold) for text in ("4", "5", "04")] == [4.0, 0.0, 3.0]
    assert parsed == ["4"]
    with pytest.raises(BadGoldError, match="no number: 'four'"):
        parser_of(reward.function)("four")


def test_in_workers_each_call_ends_as_its_parts_do():
    def slow(completion):
        while completion == "slow":
            pass
        return 1.0

    rewards = get_rewards(gate(slow, "gsm8k"))
    rows = [("#### 4", "4"), ("#### 5", "4"), ("slow", "4"), ("#### 4", "four")]
    samples = [Sample("", text, text, [1], {"answer": answer}) for text, answer in rows]
    verdicts = [
        verdict["gate"] for verdict in score_samples(rewards, samples, settings=RewardSettings(timeout=2, workers=1))
    ]
    assert [verdict.outcome for verdict in verdicts] == ["scored", "scored", "timeout", "bad_gold"]
    assert [verdict.score for verdict in verdicts[:2]] == [1.0, 0.0]
    assert [bad.row for bad in check_gold(rewards, [{"answer": answer} for _, answer in rows], progress=False)] == [3]


def test_gold_of_several_columns_is_parsed_at_every_call():
    def target(target):
        return number(target)

    @parses_gold(target)
    def hits(completion, target):
        return float(int(completion) == target)

    reward = get_reward(combinators.weighted_sum([equals, hits]))
    assert (reward.gold_column, reward.columns) == (None, ("answer", "target"))
    assert reward.function(completion="4", answer="4", target="4") == 2.0
    assert get_reward(combinators.weighted_sum([returns(1.0)])).gold_column is None


def test_a_bound_gold_answer_is_checked_when_the_reward_is_found():
    reward = get_reward({"name": equals, "answer": "4"})
    assert (reward.columns, reward.gold_column, reward.function(completion="4")) == ((), None, 1.0)
    assert get_reward(gate(reward, equals)).columns == ("answer",)
    assert scored(gate(reward, equals), "4", answer="5") == 0.0
    with pytest.raises(BadGoldError, match="no number: 'four'"):
        get_reward({"name": functools.partial(equals), "answer": "four"})


async def asks_elsewhere(completion): ...
def in_batches(completions, **kwargs): ...


@pytest.mark.parametrize(("part", "kind"), [(asks_elsewhere, "async"), (in_batches, "called once per batch")])
def test_other_forms_are_refused(part, kind):
    with pytest.raises(ValueError, match=f"gate combines verifiers of single samples.*{part.__name__!r} is {kind}"):
        gate("format", part)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gate", r"'gate' needs the options first, then: \{name: gate, first: \.\.\.\}"),
        ({"name": "gate", "first": "format"}, "'gate' needs the options then"),
        ({"name": "gate", "frist": "format"}, r"no option 'frist'; its options are: first, then, .* \(nearest: first\)"),
        ({"name": "gate", "first": "format", "then": "exct_match"}, r"unknown reward 'exct_match'.*nearest: exact_match"),
        ({"name": "weighted_sum", "rewards": ["format"], "weights": [1, 2]}, r"2 weights for 1 rewards \(format\)"),
        ({"name": "weighted_sum", "rewards": []}, r"0 weights for 0 rewards \(none\)"),
        ({"name": "weighted_sum", "rewards": "format"}, "weighted_sum takes a list of rewards; got 'format'"),
        ({"name": "clip", "reward": "format", "low": 2}, r"low <= high; got low=2 and high=1\.0"),
    ],
)
def test_what_is_wrong_is_said(spec, message):
    with pytest.raises(ValueError, match=message):
        get_reward(spec)


def test_names_are_known_and_taken_once():
    assert {"gate", "weighted_sum", "clip", "cosine_length"} <= set(known_rewards())
    with pytest.raises(ValueError, match="the reward name 'gate' is taken"):

        @register_combinator
        def gate(first): ...

    with pytest.raises(ValueError, match=r"the reward name 'clip' is taken by grpo_hf\.rewards\.combinators:clip"):

        @register_reward
        def clip(completion): ...


def test_another_combinator_in_a_few_lines():
    @register_combinator
    def negated(reward):
        return combinators.verifier_of(
            "negated", combinators.parts_of("negated", [reward]), lambda keywords, score: -score()
        )

    assert scored({"name": "negated", "reward": "exact_match"}, "4", answer="4") == -1.0
