"""Tasks of reasoning-gym: their puzzles as datasets, their scoring as a verifier."""

from __future__ import annotations

import doctest
import importlib
import json
import random
import sys

import pytest

pytest.importorskip("reasoning_gym")

from grpo_hf.reward_fns.reasoning_gym import reasoning_gym, reasoning_gym_data
from grpo_hf.rewards.outcomes import BadGoldError, NoAnswer


def test_the_docstring_examples():
    results = doctest.testmod(importlib.import_module("grpo_hf.reward_fns.reasoning_gym"))
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize(
    "task", ["chain_sum", "knights_knaves", "codeio", "gsm_symbolic", "time_intervals", "game_of_life", "sudoku"]
)
def test_reasoning_gym_scores_a_tasks_own_answers(task):
    train, held_out = reasoning_gym_data(task, size=24, held_out=2, seed=11)
    assert train.column_names == ["prompt", "answer", "entry"] and (len(train), len(held_out)) == (24, 2)
    for row in [*train, *held_out]:
        assert reasoning_gym(f"So <answer>{row['answer']}</answer>", row["entry"]) == 1.0
        assert reasoning_gym(row["answer"], row["entry"]) == 1.0
        assert reasoning_gym("<answer>no idea at all</answer>", row["entry"]) < 0.1
        assert isinstance(reasoning_gym("Hm. <answer> </answer>", row["entry"]), NoAnswer)


def test_reasoning_gym_keeps_what_json_would_lose():
    """The task has no answer of its own to compare with; its checks read dictionaries with numbers as their keys."""
    train, _ = reasoning_gym_data("graph_color", size=2, held_out=1, config={"min_num_vertices": 4, "max_num_vertices": 4})
    row = train[0]
    parsed = reasoning_gym.parse_gold(row["entry"])["puzzle"]["metadata"]["puzzle"]
    colors, vertices, edges = parsed["color_options"], parsed["vertices"], parsed["edges"]
    generator = random.Random(0)
    while True:
        coloring = {vertex: generator.choice(colors) for vertex in vertices}
        if all(coloring[a] != coloring[b] for a, b in edges):
            break
    assert reasoning_gym(json.dumps(coloring), row["entry"]) == 1.0
    assert reasoning_gym(json.dumps(dict.fromkeys(vertices, colors[0])), row["entry"]) < 0.1


def test_no_text_is_an_answer_where_the_right_answer_is_none():
    train, _ = reasoning_gym_data("ab", size=40, held_out=1, seed=11)
    row = next(row for row in train if row["answer"] == "")
    assert reasoning_gym("<answer></answer>", row["entry"]) == 1.0


def test_reasoning_gym_scores_an_answer_of_the_wrong_form_0():
    """This task's own scoring raises on it."""
    train, _ = reasoning_gym_data("prime_factorization", size=1, held_out=1)
    score = reasoning_gym("<answer>two times three</answer>", train[0]["entry"])
    assert score == 0.0 and not isinstance(score, NoAnswer)


def test_reasoning_gym_data_is_a_function_of_its_seed_and_keeps_the_held_out_apart():
    first, again = (reasoning_gym_data("chain_sum", size=20, held_out=5, seed=3) for _ in range(2))
    assert [part.to_list() for part in first] == [part.to_list() for part in again]
    other = reasoning_gym_data("chain_sum", size=20, held_out=5, seed=1000)
    assert other[0]["prompt"] != first[0]["prompt"]
    train, held_out = reasoning_gym_data("coin_flip", size=60, held_out=20, config={"min_trials": 2, "max_trials": 3})
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert 0 < len(train) < 60


def test_reasoning_gym_mixes_tasks():
    parts = [{"name": name, "weight": 1, "config": {}} for name in ("chain_sum", "letter_counting")]
    train, _ = reasoning_gym_data("composite", size=8, held_out=1, config={"datasets": parts})
    assert [reasoning_gym(row["answer"], row["entry"]) for row in train] == [1.0] * 8


def test_reasoning_gym_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match=r"no task 'chain_sun'; it has: .*\(nearest: chain_sum\)"):
        reasoning_gym_data("chain_sun")
    with pytest.raises(ValueError, match=r"'chain_sum' has no setting 'min_term'; it has: .*\(nearest: min_terms\)"):
        reasoning_gym_data("chain_sum", config={"min_term": 2})
    with pytest.raises(ValueError, match="no other puzzles than the 9 held-out ones"):
        reasoning_gym_data("coin_flip", size=1, held_out=9, config={"min_trials": 1, "max_trials": 1})
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'grpo_hf\[reasoning-gym\]'"):
        reasoning_gym_data("chain_sum", size=7)


def test_a_reasoning_gym_entry_that_cannot_be_used_is_bad_gold():
    for entry in ("", "{}", "[1]", None, "{'task': 'chain_sum'}"):
        with pytest.raises(BadGoldError, match="not an entry that reasoning_gym_data wrote"):
            reasoning_gym("7", entry)
    train, _ = reasoning_gym_data("countdown", size=1, held_out=1)
    spoilt = reasoning_gym.parse_gold(train[0]["entry"])
    spoilt["puzzle"]["answer"] = "nothing"
    with pytest.raises(BadGoldError, match=r"'countdown' scores 0\.\d+ for its own answer 'nothing'"):
        reasoning_gym("7", repr(spoilt))
