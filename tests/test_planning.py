"""Planning: advantages and denominators over all processes, training samples, what is dropped, how a rollout is cut into
updates, and how processes share the work."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from grpo_hf.algorithm.advantages import ADVANTAGES
from grpo_hf.packing.layout import num_tokens, packed_batch
from grpo_hf.rollout.peers import ALONE, Peers
from grpo_hf.rollout.planning import Plan, Update, assign_advantages, balanced, numbered_samples, samples_of, shares, until
from grpo_hf.types import Branch, Completion, Group, TrainingSample
from tests.peers import on_processes
from tests.samples import group, sample

CENTERED = ADVANTAGES["centered"]


def scored(ids: list[int], reward: float, **fields: Any) -> Completion:
    """A completion with one score."""
    return Completion(ids, reward=reward, rewards={"right": reward}, **({"truncated": False} | fields))


def scored_group(rewards: list[float], lengths: list[int] | None = None, truncated: tuple[int, ...] = ()) -> Group:
    """A prompt of two tokens with completions of these rewards and lengths."""
    lengths = lengths or [3] * len(rewards)
    return group(
        [1, 2],
        [
            scored([10 + place] * length, reward, truncated=place in truncated)
            for place, (reward, length) in enumerate(zip(rewards, lengths, strict=True))
        ],
    )


def make_plan(**options: Any) -> Plan:
    defaults = {"credit": CENTERED, "reward_weights": [1.0], "updates_per_rollout": 1, "max_completion_length": 16}
    return Plan(**(defaults | options))


def updates_of(groups: list[Group], peers: Peers = ALONE, **options: Any) -> list[Update]:
    return make_plan(**options).updates(groups, 0, peers)


def targets(update: Update) -> list[int]:
    """The distinct completion tokens of an update: 10 for a group's first completion, 11 for its second, ..."""
    return sorted({token for item in update.samples for token in torch.tensor(item.ids)[item.is_target].tolist()})


def advantages(groups: list[Group]) -> list[float | None]:
    return [completion.advantage for group in groups for completion in group.completions]


# ---- Credit


def test_advantages_are_set_in_place() -> None:
    groups = [scored_group([1.0, 0.0, 0.0, 3.0]), scored_group([2.0, 2.0, 2.0, math.nan])]
    assign_advantages(groups, CENTERED, [1.0], ALONE)
    assert advantages(groups) == [0.0, -1.0, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0]


def test_advantages_see_the_rewards_of_all_processes() -> None:
    """Two processes with a group each get what one process with both would: "batch" divides by the std of all."""
    rewards = [[0.0, 1.0], [4.0, 8.0]]
    together = [scored_group(row) for row in rewards]
    assign_advantages(together, ADVANTAGES["batch"], [1.0], ALONE)

    def work(peers: Peers) -> list[float | None]:
        mine = [scored_group(rewards[peers.rank])]
        assign_advantages(mine, ADVANTAGES["batch"], [1.0], peers)
        return advantages(mine)

    first, second = on_processes(work)
    assert first + second == advantages(together)


def test_credit_is_handed_every_score_and_the_weights() -> None:
    """NaN where a score is missing, and everywhere in a completion that is not valid."""
    seen = []

    def credit(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append((scores, weights))
        return scores.nan_to_num().sum(-1)

    both = [
        Completion([5], truncated=False, rewards={"a": 1.0, "b": 10.0}),
        Completion([6], truncated=False, rewards={"a": 2.0, "b": math.nan}),
        Completion([7], truncated=False, rewards={"a": 3.0, "b": 30.0}, valid=False),
    ]
    item = group([1], both)
    assign_advantages([item], credit, [0.5, 2.0], ALONE)
    ((scores, weights),) = seen
    nan = math.nan
    torch.testing.assert_close(scores, torch.tensor([[[1.0, 10.0], [2.0, nan], [nan, nan]]]).double(), equal_nan=True)
    assert weights.tolist() == [0.5, 2.0]
    assert advantages([item]) == [11.0, 2.0, 0.0]


# ---- Samples


def test_a_single_turn_completion_is_one_sample() -> None:
    item = Completion([7, 8], truncated=False, advantage=-0.5, rollout_logprobs=[-1.0, None])
    (made,) = samples_of([1, 2, 3], item, version=4, completion=9, group=2)
    assert made.ids == (1, 2, 3, 7, 8)
    assert made.is_target.tolist() == [False, False, False, True, True]
    assert made.advantages.tolist() == [0, 0, 0, -0.5, -0.5]
    assert (made.completion, made.group, made.completion_length) == (9, 2, 2)
    assert made.versions.tolist() == [4, 4]
    torch.testing.assert_close(made.rollout_logprobs, torch.tensor([-1.0, math.nan]), equal_nan=True)
    assert made.old_logprobs is made.ref_logprobs is None
    (without,) = samples_of([1], replace(item, rollout_logprobs=None), 0, completion=0, group=0)
    assert without.rollout_logprobs is None


def test_what_a_tool_answered_is_no_target() -> None:
    item = Completion([7, 90, 91, 8], False, advantage=2.0, is_sampled=[True, False, False, True], rollout_logprobs=[-1, -2])
    (made,) = samples_of([1, 2], item, version=0, completion=0, group=0)
    assert made.ids == (1, 2, 7, 90, 91, 8)
    assert made.is_target.tolist() == [False, False, True, False, False, True]
    assert made.advantages.tolist() == [0, 0, 2, 0, 0, 2]
    assert (made.completion_length, made.rollout_logprobs.tolist()) == (2, [-1, -2])  # type: ignore[union-attr]
    batch = packed_batch([made])
    assert (batch.targets.tolist(), batch.scored_at.tolist(), batch.lengths.tolist()) == ([7, 8], [1, 4], [2])


def test_a_rewritten_history_is_a_sample_of_its_own() -> None:
    """Each sampled token is a target once, where it was sampled: thinking (7) that the template has dropped since, too."""
    thought = Branch([1, 2, 7, 8], [False, False, True, True], [-1.0, -2.0])
    item = Completion(
        [8, 90, 9], False, advantage=2.0, is_sampled=[False, False, True], rollout_logprobs=[-3.0], earlier=[thought]
    )
    first, last = samples_of([1, 2], item, version=0, completion=5, group=0)
    assert (first.ids, last.ids) == ((1, 2, 7, 8), (1, 2, 8, 90, 9))
    assert (first.advantages.tolist(), last.advantages.tolist()) == ([0, 0, 2, 2], [0, 0, 0, 0, 2])
    assert (first.completion, last.completion, first.completion_length, last.completion_length) == (5, 5, 3, 3)
    assert first.rollout_logprobs.tolist() + last.rollout_logprobs.tolist() == [-1, -2, -3]  # type: ignore[union-attr]
    batch = packed_batch([first, last])
    assert (batch.targets.tolist(), batch.lengths.tolist(), batch.completion.tolist()) == ([7, 8, 9], [3], [0, 0, 0])


def test_an_episode_may_have_a_prompt_of_its_own() -> None:
    (made,) = samples_of([1, 2], Completion([7], False, advantage=1.0, prompt_ids=[1, 2, 3]), 0, completion=0, group=0)
    assert (made.ids, made.is_target.tolist()) == ((1, 2, 3, 7), [False, False, False, True])


def test_tokens_that_tools_answered_are_in_no_denominator() -> None:
    with_tool = scored([7, 90, 91, 8], 1.0, is_sampled=[True, False, False, True])
    (update,) = updates_of([group([1], [with_tool, scored([5, 6, 7], 0.0)])])
    assert (update.denominators.tokens, update.denominators.update_tokens, update.denominators.local_tokens) == (5, 5, 5)


@pytest.mark.parametrize("options", [{}, {"keep_zero_signal": True}], ids=str)
def test_a_completion_without_a_sampled_token_is_not_trained_on(options: dict[str, bool]) -> None:
    """It counts among its group's rewards; in an update of such completions alone, another one is what is run idly."""
    of_tools = scored([90, 91], 1.0, is_sampled=[False, False])
    item = group([1], [of_tools, scored([], 1.0), scored([5, 6, 7], 0.0), scored([8, 9], 0.0)])
    first, second = updates_of([item], updates_per_rollout=2, **options)
    assert first.idle and [sample.ids for sample in first.samples] == [(1, 8, 9)]
    assert [sample.ids for sample in second.samples] == [(1, 5, 6, 7), (1, 8, 9)]
    assert second.samples[0].advantages.tolist() == [0, -0.5, -0.5, -0.5]
    with pytest.raises(ValueError, match="no token of 1 completions was sampled by the model"):
        updates_of([group([1], [of_tools])])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rollout_logprobs": [-1.0, -1.0]},
            "4 ids with its prompt, is_sampled for 4 of them, and 2 log-probs for the 3 that",
        ),
        (
            {"rollout_logprobs": [-1.0] * 3, "is_sampled": [True, False, True]},
            "4 ids with its prompt, is_sampled for 4 of them, and 3 log-probs for the 2 that",
        ),
        ({"is_sampled": [True] * 4}, "4 ids with its prompt, is_sampled for 5 of them"),
    ],
    ids=["log-probs missing", "log-probs of a tool's tokens", "is_sampled too long"],
)
def test_what_does_not_fit_a_completions_ids_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"completion 7 has {message}"):
        samples_of([1], Completion([2, 3, 4], False, advantage=1.0, **fields), version=0, completion=7, group=0)


def test_an_advantage_that_was_never_set_is_an_error() -> None:
    groups = [group([1], [Completion([2], truncated=False, advantage=0.0), Completion([3], truncated=False)])]
    with pytest.raises(ValueError, match="completion 1 has no advantage; assign_advantages compares it with its group"):
        numbered_samples(groups, 0)


def test_samples_are_numbered_over_all_processes() -> None:
    def work(peers: Peers) -> list[tuple[int, int]]:
        (update,) = updates_of([scored_group([0.0, 1.0, 5.0])] * 2, peers, keep_zero_signal=True)
        return [(item.completion, item.group) for item in update.samples]

    first, second = on_processes(work)
    assert first == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]
    assert second == [(6, 2), (7, 2), (8, 2), (9, 3), (10, 3), (11, 3)]


# ---- Denominators


def test_denominators_count_all_processes() -> None:
    """Of the rollout over its updates, and of each update by itself."""

    def work(peers: Peers) -> list[Update]:
        return updates_of([scored_group([0.0, 1.0], [[1, 2], [3, 5]][peers.rank])], peers, updates_per_rollout=2)

    for updates, local in zip(on_processes(work), [(1, 2), (3, 5)], strict=True):
        for update, local_tokens, update_tokens in zip(updates, local, (1 + 3, 2 + 5), strict=True):
            counts = update.denominators
            assert (counts.tokens, counts.update_tokens, counts.local_tokens) == (11 / 2, update_tokens, local_tokens)
            assert (counts.sequences, counts.num_processes, counts.max_completion_length) == (4 / 2, 2, 16)


# ---- What is dropped


def test_zero_signal_is_dropped_but_counted() -> None:
    """The first group has no signal, nor has the second's middle completion."""
    groups = [scored_group([1.0, 1.0, 1.0]), scored_group([0.0, 1.0, 2.0], [2, 4, 3])]
    (update,) = updates_of(groups)
    assert [item.ids for item in update.samples] == [(1, 2, 10, 10), (1, 2, 12, 12, 12)]
    assert [item.advantages.tolist() for item in update.samples] == [[0, 0, -1, -1], [0, 0, 1, 1, 1]]
    assert not update.idle
    assert (update.denominators.tokens, update.denominators.update_tokens, update.denominators.sequences) == (18, 18, 6)


def test_zero_signal_is_kept_when_asked() -> None:
    groups = [scored_group([1.0, 1.0, 1.0]), scored_group([0.0, 1.0, 2.0])]
    (update,) = updates_of(groups, keep_zero_signal=True)
    assert len(update.samples) == 6


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, (1, 2, 10)),
        ({"whole_completions": True}, (1, 2, 10, 90, 91)),
        ({"keep_zero_signal": True}, (1, 2, 10, 90, 91)),
    ],
    ids=["plain", "whole completions", "zero signal too"],
)
def test_what_follows_the_last_signal_is_dropped(options: dict[str, bool], ids: tuple[int, ...]) -> None:
    """Here a tool's last answer; but not where the loss sums over whole completions, or every token counts."""
    item = group([1, 2], [scored([10, 90, 91], 1.0, is_sampled=[True, False, False]), scored([11], 0.0)])
    (update,) = updates_of([item], **options)
    assert update.samples[0].ids == ids
    assert update.samples[0].completion_length == 1


def test_a_tail_without_signal_is_cut_off_with_all_that_belongs_to_it() -> None:
    """Targets without gradient too: credit by token may give the last ones an advantage of 0."""
    whole = sample(
        [1, 2, 3, 4, 5, 6],
        [1, 3, 5],
        advantages=torch.tensor([0, 0.5, 0, -1, 0, 0]),
        versions=torch.tensor([0, 1, 2]),
        rollout_logprobs=torch.tensor([-1.0, -2.0, -3.0]),
        old_logprobs=torch.tensor([-1.5, -2.5, -3.5]),
    )
    cut = make_plan()._pruned(whole)
    assert cut is not None
    assert (cut.ids, cut.is_target.tolist()) == ((1, 2, 3, 4), [False, True, False, True])
    assert cut.advantages.tolist() == [0, 0.5, 0, -1]
    assert cut.versions.tolist() == [0, 1]
    assert cut.rollout_logprobs.tolist() == [-1.0, -2.0]  # type: ignore[union-attr]
    assert cut.old_logprobs.tolist() == [-1.5, -2.5]  # type: ignore[union-attr]
    assert cut.ref_logprobs is None
    assert cut.completion_length == 3, "what losses divide by is the whole completion's"
    assert make_plan(whole_completions=True)._pruned(whole) is whole
    assert make_plan()._pruned(replace(whole, advantages=torch.zeros(6))) is None
    assert until(whole, 6).ids == whole.ids


@pytest.mark.parametrize("options", [{}, {"whole_completions": True}, {"balance": True}], ids=str)
def test_an_update_without_signal_still_runs_something(options: dict[str, bool]) -> None:
    """Its shortest completion, times 0: every process takes every step."""
    (update,) = updates_of([scored_group([1.0, 1.0], [3, 2])], **options)
    assert update.idle
    assert [item.ids for item in update.samples] == [(1, 2, 11, 11)]


def test_truncated_completions_are_masked_when_asked() -> None:
    """They keep their part in the advantages, and leave the loss and its token counts."""
    groups = [scored_group([0.0, 1.0, 2.0], [4, 2, 3], truncated=(0,))]
    (update,) = updates_of(groups)
    assert (targets(update), update.denominators.tokens) == ([10, 12], 9)
    (update,) = updates_of(groups, mask_truncated_completions=True)
    counts = update.denominators
    assert (targets(update), counts.tokens, counts.update_tokens, counts.local_tokens) == ([12], 5, 5, 5)
    assert update.samples[0].advantages.tolist() == [0, 0, 1, 1, 1]


def test_all_truncated_is_an_update_without_signal() -> None:
    groups = [scored_group([0.0, 1.0], truncated=(0, 1))]
    (update,) = updates_of(groups, mask_truncated_completions=True)
    assert update.idle and len(update.samples) == 1
    assert update.denominators.tokens == 0


@pytest.mark.parametrize("keep_zero_signal", [False, True])
def test_completions_without_a_reward_are_as_if_they_had_never_been_sampled(keep_zero_signal: bool) -> None:
    """Their group, the denominators and the forward pass are those of the others alone, whatever else is kept."""
    options: dict[str, Any] = {"keep_zero_signal": keep_zero_signal, "credit": ADVANTAGES["group"]}
    (update,) = updates_of([scored_group([0.0, 1.0, math.nan, 5.0, math.nan], [2, 3, 9, 1, 9])], **options)
    (alone,) = updates_of([scored_group([0.0, 1.0, 5.0], [2, 3, 1])], **options)
    assert update.denominators == alone.denominators
    assert targets(update) == [10, 11, 13]
    for made, other in zip(update.samples, alone.samples, strict=True):
        assert torch.equal(made.advantages, other.advantages)
    assert num_tokens(update.samples) == num_tokens(alone.samples)


def test_a_rollout_without_any_reward_is_an_update_without_signal() -> None:
    (update,) = updates_of([scored_group([math.nan, math.nan])], keep_zero_signal=True)
    assert update.idle and len(update.samples) == 1
    assert (update.denominators.tokens, update.denominators.sequences) == (0, 1), "nothing is divided by 0"


def test_completions_without_a_reward_count_over_all_processes() -> None:
    def work(peers: Peers) -> Update:
        rewards = [[0.0, 1.0, math.nan], [2.0, math.nan, math.nan]][peers.rank]
        return updates_of([scored_group(rewards, [1, 2, 4])], peers)[0]

    for update in on_processes(work):
        assert (update.denominators.tokens, update.denominators.sequences) == (1 + 2 + 1, 3)


# ---- How a rollout is cut into updates


def test_a_cut_through_a_group_has_its_prompt_in_both_updates() -> None:
    groups = [scored_group([0.0, 1.0, 2.0, 4.0]), scored_group([0.0, 3.0, 5.0, 7.0])]
    updates = updates_of(groups, updates_per_rollout=4)
    assert [targets(update) for update in updates] == [[10, 11], [12, 13], [10, 11], [12, 13]]
    three = [scored_group([0.0, 1.0, 5.0]), scored_group([0.0, 4.0, 5.0])]
    halves = updates_of(three, updates_per_rollout=2)
    assert [targets(update) for update in halves] == [[10, 11, 12]] * 2
    thirds = updates_of(three, updates_per_rollout=3)
    assert [targets(update) for update in thirds] == [[10, 11], [10, 12], [11, 12]]
    assert [item.ids[:3] for item in thirds[1].samples] == [(1, 2, 12), (1, 2, 10)]
    assert [update.denominators.tokens for update in thirds] == [6.0] * 3


# ---- How processes share the work (the same gradient: invariant 2)


def some_samples(seed: int, count: int) -> list[TrainingSample]:
    """Groups of very different sizes."""
    generator = random.Random(seed)
    groups = []
    for number in range(count):
        lengths = [generator.choice((1, 5, 90)) for _ in range(4)]
        completions = [Completion([7 + n] * length, truncated=False, advantage=float(n)) for n, length in enumerate(lengths)]
        groups.append(group([100 * seed + number] * generator.choice((3, 40)), completions))
    return [sample for own in numbered_samples(groups, 0, 4 * count * seed, count * seed) for sample in own]


def imbalance(parts: list[list[TrainingSample]]) -> float:
    """max / mean of the tokens."""
    tokens = [num_tokens(part) for part in parts]
    return max(tokens) * len(tokens) / sum(tokens)


@pytest.mark.parametrize("count", [2, 4])
def test_shares_are_even_and_hold_every_sample_once(count: int) -> None:
    own = [some_samples(seed, 6) for seed in range(count)]
    parts = shares([item for part in own for item in part], count)
    assert sorted(item.completion for part in parts for item in part) == list(range(4 * 6 * count))
    print(f"\n{count} processes: max / mean {imbalance(own):.2f} -> {imbalance(parts):.2f}")
    assert imbalance(parts) < 1.05 and imbalance(parts) <= imbalance(own)


def test_a_group_stays_whole() -> None:
    """Its prompt is computed once."""
    parts = shares([item for seed in range(3) for item in some_samples(seed, 6)], 3)
    groups = [{item.group for item in part} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 18


def test_every_process_finds_the_same_shares() -> None:
    own = [some_samples(seed, 5) for seed in range(2)]
    both = on_processes(lambda peers: balanced(own[peers.rank], peers))
    everything = [item for part in own for item in part]
    assert [[item.completion for item in part] for part in both] == [
        [item.completion for item in part] for part in shares(everything, 2)
    ]


def test_a_process_that_gets_nothing_still_runs_something() -> None:
    """One group has a signal, and one process takes it, whichever has sampled it."""
    rewards = [[0.0, 1.0], [1.0, 1.0]]
    updates = on_processes(lambda peers: updates_of([scored_group(rewards[peers.rank])], peers, balance=True)[0])
    assert sorted(update.idle for update in updates) == [False, True]
    assert all(update.samples for update in updates)


@pytest.mark.parametrize("count", [2, 4])
def test_an_update_holds_the_same_completions_however_many_processes_share_it(count: int) -> None:
    """Four groups in two updates: each process has sampled its groups, and trains on a share of every update."""
    rewards = [[0.0, 1.0, 3.0], [2.0, 0.0, 1.0], [5.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    groups = [scored_group(row, [1 + place, 2, 3]) for place, row in enumerate(rewards)]
    plan = make_plan(updates_per_rollout=2, balance=True)

    def held(updates: list[Update]) -> list[list[tuple[int, float]]]:
        return [
            sorted((s.completion, s.advantages.sum().item()) for s in update.samples if not update.idle)
            for update in updates
        ]

    alone = plan.updates(groups, 0, ALONE)
    share = len(groups) // count
    everyone = on_processes(lambda peers: plan.updates(groups[peers.rank * share :][:share], 0, peers), count)
    shared = zip(*map(held, everyone), strict=True)
    assert [sorted(item for part in parts for item in part) for parts in shared] == held(alone)
    for updates in everyone:
        for mine, whole in zip(updates, alone, strict=True):
            assert mine.denominators.update_tokens == whole.denominators.update_tokens
            assert mine.denominators.sequences == whole.denominators.sequences
