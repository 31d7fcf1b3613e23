"""Planning: advantages and denominators over all processes, what is dropped, and how a rollout is cut into updates."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from grpo_hf.rollout.peers import ALONE, Peers
from grpo_hf.rollout.planning import Plan, Update, assign_advantages
from grpo_hf.types import Completion, Group
from tests.tiny import group


def scored_group(rewards: list[float], lengths: list[int] | None = None, truncated: tuple[int, ...] = ()) -> Group:
    """A prompt of two tokens with completions of these rewards and lengths."""
    lengths = lengths or [3] * len(rewards)
    return group(
        [1, 2],
        [
            Completion([10 + place] * length, truncated=place in truncated, reward=reward)
            for place, (reward, length) in enumerate(zip(rewards, lengths, strict=True))
        ],
    )


def make_plan(**options: Any) -> Plan:
    defaults = {"advantage": "centered", "updates_per_rollout": 1, "layout": "packed"}
    return Plan(**(defaults | {"tokens_per_microbatch": 100, "max_completion_length": 16} | options))


def targets(update: Update) -> list[int]:
    """The distinct completion tokens of an update: 10 for a group's first completion, 11 for its second, ..."""
    return sorted({token for batch in update.microbatches for token in batch.targets.tolist()})


def advantages(groups: list[Group]) -> list[float]:
    return [completion.advantage for group in groups for completion in group.completions]


def on_two_processes(work: Callable[[Peers], Any]) -> list[Any]:
    """Run the work as process 0 and as process 1, each gathering from both."""
    barrier, slots = threading.Barrier(2), [None, None]

    def gather(rank: int, item: Any) -> list[Any]:
        slots[rank] = item
        barrier.wait()
        everyone = list(slots)
        barrier.wait()
        return everyone

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: work(Peers(rank, 2, partial(gather, rank))), range(2)))


def test_advantages_are_set_in_place() -> None:
    groups = [scored_group([1.0, 0.0, 0.0, 3.0]), scored_group([2.0, 2.0, 2.0, math.nan])]
    assign_advantages(groups, "centered", ALONE)
    assert advantages(groups) == [0.0, -1.0, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0]


def test_advantages_see_the_rewards_of_all_processes() -> None:
    """Two processes with a group each get what one process with both would: "batch" divides by the std of all."""
    rewards = [[0.0, 1.0], [4.0, 8.0]]
    together = [scored_group(row) for row in rewards]
    assign_advantages(together, "batch", ALONE)

    def work(peers: Peers) -> list[float]:
        mine = [scored_group(rewards[peers.rank])]
        assign_advantages(mine, "batch", peers)
        return advantages(mine)

    first, second = on_two_processes(work)
    assert first + second == advantages(together)


def test_denominators_count_all_processes() -> None:
    def work(peers: Peers) -> list[Update]:
        lengths = [[1, 2], [3, 5]][peers.rank]
        return make_plan(updates_per_rollout=2).updates([scored_group([0.0, 1.0], lengths)], peers)

    for updates, local in zip(on_two_processes(work), [(1, 2), (3, 5)], strict=True):
        for update, local_tokens in zip(updates, local, strict=True):
            counts = update.denominators
            assert (counts.tokens, counts.sequences, counts.num_processes) == (11 / 2, 4 / 2, 2)
            assert (counts.local_tokens, counts.max_completion_length) == (local_tokens, 16)


def test_zero_signal_is_dropped_but_counted() -> None:
    """The first group has no signal, nor has the second's middle completion."""
    groups = [scored_group([1.0, 1.0, 1.0]), scored_group([0.0, 1.0, 2.0], [2, 4, 3])]
    (update,) = make_plan().updates(groups, ALONE)
    (batch,) = update.microbatches
    assert batch.input_ids.tolist() == [[1, 2, 10, 12, 12]]
    assert batch.advantages.tolist() == [-1.0, 1.0]
    assert batch.weight == 1.0
    assert (update.denominators.tokens, update.denominators.sequences) == (9 + 9, 6)


def test_zero_signal_is_kept_when_asked() -> None:
    groups = [scored_group([1.0, 1.0, 1.0]), scored_group([0.0, 1.0, 2.0])]
    (update,) = make_plan(keep_zero_signal=True).updates(groups, ALONE)
    assert sum(batch.num_sequences for batch in update.microbatches) == 6


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_an_update_without_signal_still_runs_something(layout: str) -> None:
    """Its shortest completion, times 0: every process takes every step."""
    (update,) = make_plan(layout=layout).updates([scored_group([1.0, 1.0], [3, 2])], ALONE)
    (batch,) = update.microbatches
    assert (batch.weight, batch.targets.tolist()) == (0.0, [11, 11])


def test_truncated_completions_are_masked_when_asked() -> None:
    """They keep their part in the advantages, and leave the loss and its token counts."""
    groups = [scored_group([0.0, 1.0, 2.0], [4, 2, 3], truncated=(0,))]
    (update,) = make_plan().updates(groups, ALONE)
    assert (targets(update), update.denominators.tokens) == ([10, 12], 9)
    (update,) = make_plan(mask_truncated_completions=True).updates(groups, ALONE)
    assert (targets(update), update.denominators.tokens, update.denominators.local_tokens) == ([12], 5, 5)
    assert update.microbatches[0].advantages.tolist() == [1.0]


def test_all_truncated_is_an_update_without_signal() -> None:
    groups = [scored_group([0.0, 1.0], truncated=(0, 1))]
    (update,) = make_plan(mask_truncated_completions=True).updates(groups, ALONE)
    assert [batch.weight for batch in update.microbatches] == [0.0]
    assert update.denominators.tokens == 0


@pytest.mark.parametrize("keep_zero_signal", [False, True])
def test_completions_without_a_reward_are_as_if_they_had_never_been_sampled(keep_zero_signal: bool) -> None:
    """Their group, the denominators and the forward pass are those of the others alone, whatever else is kept."""
    plan = make_plan(keep_zero_signal=keep_zero_signal, advantage="group")
    (update,) = plan.updates([scored_group([0.0, 1.0, math.nan, 5.0, math.nan], [2, 3, 9, 1, 9])], ALONE)
    (alone,) = plan.updates([scored_group([0.0, 1.0, 5.0], [2, 3, 1])], ALONE)
    assert update.denominators == alone.denominators
    assert targets(update) == [10, 11, 13]
    for batch, other in zip(update.microbatches, alone.microbatches, strict=True):
        assert torch.equal(batch.advantages, other.advantages)
        assert batch.num_tokens == other.num_tokens


def test_a_rollout_without_any_reward_is_an_update_without_signal() -> None:
    (update,) = make_plan(keep_zero_signal=True).updates([scored_group([math.nan, math.nan])], ALONE)
    assert [batch.weight for batch in update.microbatches] == [0.0]
    assert (update.denominators.tokens, update.denominators.sequences) == (0, 1), "nothing is divided by 0"


def test_completions_without_a_reward_count_over_all_processes() -> None:
    def work(peers: Peers) -> Update:
        rewards = [[0.0, 1.0, math.nan], [2.0, math.nan, math.nan]][peers.rank]
        return make_plan().updates([scored_group(rewards, [1, 2, 4])], peers)[0]

    for update in on_two_processes(work):
        assert (update.denominators.tokens, update.denominators.sequences) == (1 + 2 + 1, 3)


def test_a_cut_through_a_group_has_its_prompt_in_both_updates() -> None:
    groups = [scored_group([0.0, 1.0, 2.0, 4.0]), scored_group([0.0, 3.0, 5.0, 7.0])]
    updates = make_plan(updates_per_rollout=4).updates(groups, ALONE)
    assert [targets(update) for update in updates] == [[10, 11], [12, 13], [10, 11], [12, 13]]
    three = [scored_group([0.0, 1.0, 5.0]), scored_group([0.0, 4.0, 5.0])]
    halves = make_plan(updates_per_rollout=2).updates(three, ALONE)
    assert [targets(update) for update in halves] == [[10, 11, 12]] * 2
    thirds = make_plan(updates_per_rollout=3).updates(three, ALONE)
    assert [targets(update) for update in thirds] == [[10, 11], [10, 12], [11, 12]]
    assert thirds[1].microbatches[0].input_ids.tolist() == [[1, 2, 12, 12, 1, 2, 10, 10]]
    assert [update.denominators.tokens for update in thirds] == [6.0] * 3


def test_micro_batches_keep_the_budget() -> None:
    groups = [scored_group([0.0, 1.0, 3.0]), scored_group([0.0, 1.0, 3.0])]
    (update,) = make_plan(tokens_per_microbatch=6).updates(groups, ALONE)
    assert sorted(batch.num_tokens for batch in update.microbatches) == [4, 4, 6, 6]
