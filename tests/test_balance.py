"""Sharing groups out between processes: evenly by tokens, each to one of them, with the same gradient (invariant 2)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from grpo_hf.packing.layout import num_tokens
from grpo_hf.rollout.balance import balanced, shares
from grpo_hf.rollout.planning import Plan, Update
from grpo_hf.types import Completion, Group, Prompt
from tests.test_planning import on_two_processes

PLAN: dict[str, Any] = {"advantage": "centered", "updates_per_rollout": 1, "layout": "packed", "max_completion_length": 100}


def some_groups(seed: int, count: int) -> list[Group]:
    """Of very different sizes; every completion has a reward of its own."""
    generator = random.Random(seed)
    groups = []
    for number in range(count):
        lengths = [generator.choice((1, 5, 90)) for _ in range(4)]
        completions = [Completion([7] * length, truncated=False, reward=float(n)) for n, length in enumerate(lengths)]
        prompt = Prompt([number + 1] * generator.choice((3, 40)), raw=f"p{seed}-{number}", row={"x": 1}, index=number)
        groups.append(Group(prompt, completions))
    return groups


def imbalance(parts: list[list[Group]]) -> float:
    """max / mean of the tokens."""
    tokens = [sum(map(num_tokens, part)) for part in parts]
    return max(tokens) * len(tokens) / sum(tokens)


@pytest.mark.parametrize("count", [2, 4])
def test_shares_are_even_and_hold_every_group_once(count: int) -> None:
    own = [some_groups(seed, 6) for seed in range(count)]
    parts = shares([group for part in own for group in part], count)
    assert sorted(id(group) for part in parts for group in part) == sorted(id(group) for part in own for group in part)
    print(f"\n{count} processes: max / mean {imbalance(own):.2f} -> {imbalance(parts):.2f}")
    assert imbalance(parts) < 1.05 and imbalance(parts) <= imbalance(own)


def test_every_process_finds_the_same_shares_and_no_text_travels() -> None:
    own = [some_groups(seed, 5) for seed in range(2)]
    both = on_two_processes(lambda peers: balanced(own[peers.rank], peers))
    assert all(group.prompt.raw == "" and group.prompt.row == {} for part in both for group in part)
    tokens = sorted((len(group.prompt.ids), num_tokens(group)) for part in both for group in part)
    assert tokens == sorted((len(group.prompt.ids), num_tokens(group)) for part in own for group in part)


@pytest.mark.parametrize("balance", [False, True])
def test_as_many_microbatches_each_where_forwards_are_run_together(balance: bool) -> None:
    """Those that only make up the number have weight 0."""
    own = [some_groups(0, 2), some_groups(1, 2)]

    def plans(same_number: bool) -> list[Update]:
        plan = Plan(tokens_per_microbatch=60, **PLAN, balance=balance, same_number=same_number)
        return [update for (update,) in on_two_processes(lambda peers: plan.updates(own[peers.rank], peers))]

    free, together = plans(False), plans(True)
    numbers = [len(update.microbatches) for update in free]
    assert [len(update.microbatches) for update in together] == [max(numbers)] * 2
    for update, number in zip(together, numbers, strict=True):
        assert [batch.weight for batch in update.microbatches] == [1.0] * number + [0.0] * (max(numbers) - number)
    assert balance or len(set(numbers)) == 2, "nothing had to be made up"
